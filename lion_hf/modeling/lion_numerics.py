"""Types, precision, and what may be done with a tensor: looking at its values, writing over it."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

# Devices, by `torch.device.type`, that have no float64.
WITHOUT_FLOAT64 = ("mps",)
# exp() of these is exactly 0. A cut edge (log-decay -inf) becomes one of them, so that differences
# of prefix sums stay finite.
LOG_ZERO = {torch.float64: -800.0, torch.float32: -110.0}


def compute_type(tensor: torch.Tensor) -> torch.dtype:
    """The type that the operation computes in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def sum_type(tensor: torch.Tensor) -> torch.dtype:
    """The type that long sums are taken in: float64 where the tensor's device has it."""
    return torch.float32 if tensor.device.type in WITHOUT_FLOAT64 else torch.float64


def prefix_sums(log_decay: torch.Tensor) -> torch.Tensor:
    """Exclusive prefix sums over the last dimension, in float64 where the device has it.

    Differences of prefix sums cancel. In float32 a thousand tokens with gates of 0.5 would leave an
    error of 1e-4.

    Args:
        log_decay: (..., L).

    Returns:
        (..., L + 1).
    """
    return F.pad(log_decay.to(sum_type(log_decay)).cumsum(-1), (1, 0))


def saturated(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another type; float16 saturates where sums leave its range."""
    if dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        tensor = tensor.clamp(-limit, limit)
    return tensor.to(dtype)


def full_precision(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off on the tensor's device.

    Gates, prefix sums and states are never rounded to half precision.
    """
    # torch 2.11 cannot trace the question; torch.compile serves only devices that have autocast.
    if torch.compiler.is_compiling() or autocasts(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    device_type = tensor.device.type
    available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether derivatives may be recorded of what is done with the tensors.

    If so, nothing may be overwritten. Inside a transform of torch.func a tensor does not say what
    is recorded outside of it.
    """
    given = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return True
    return not torch.compiler.is_compiling() and any(
        in_transform(x) or has_tangent(x) for x in given
    )


def gradients_again(
    function: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor | None],
    grad: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Gradients of a function, which can be differentiated themselves where grad mode is on.

    Operators have a backward pass of their own, which autograd cannot look into. Where derivatives
    of derivatives are wanted, this runs the function again in its place.

    Args:
        function: of the tensors, made of operations that autograd knows.
        tensors: its arguments, with None for what it is not given.
        grad: the gradient of its result.

    Returns:
        One gradient for each tensor, None for those that need none.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases, because one tensor may be several arguments
        aliases = [None if x is None else x.view_as(x) for x in tensors]
        wanted = [x for x in aliases if x is not None and x.requires_grad]
        output = function(*aliases)
    found = torch.autograd.grad(output, wanted, grad, create_graph=recorded, allow_unused=True)
    grads = iter(found)
    return [None if x is None or not x.requires_grad else next(grads) for x in aliases]


def has_values(x: torch.Tensor) -> bool:
    """Whether Python may branch on a tensor's values.

    It may not if the tensor is traced, fake, captured in a CUDA graph, or inside a transform of
    torch.func. vmap of grad hides a batch in a tensor that calls itself one of grad, so any wrapped
    tensor counts.
    """
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return False
    if type(x) not in (torch.Tensor, nn.Parameter):
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not (torch.jit.is_tracing() or in_transform(x))


def values_known(x: torch.Tensor) -> bool:
    """Whether looking at a tensor's values costs nothing: it has some, and they are on the CPU."""
    return x.device.type == "cpu" and has_values(x)


def plainly_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether tensors are on the CPU, and nobody but autograd follows what is done with them."""
    batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd, for many gradients
    return all(values_known(x) and not has_tangent(x) and not batched(x) for x in tensors)


def has_tangent(x: torch.Tensor) -> bool:
    """Whether a tensor is one of torch.autograd.forward_ad, which carries a derivative along."""
    return forward_ad.unpack_dual(x).tangent is not None


def in_transform(x: torch.Tensor) -> bool:
    """Whether a tensor is inside a transform of torch.func, such as vmap or grad."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)
