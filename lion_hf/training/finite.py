"""Values that are not finite: noticed without waiting for the device, found, and named."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

NEVER = torch.iinfo(torch.long).max  # the step of a value that was always finite
WATCHED = ("loss", "gradient")


class Watch:
    """Notes the first step in which the loss or the gradient was not finite.

    The notes stay on the device, so that taking them does not wait for it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forgets what was noted."""
        self.steps = {name: torch.tensor(NEVER, device=self.device) for name in WATCHED}

    def note(self, name: str, value: torch.Tensor, step: int) -> None:
        """Notes the step if the value, one of `WATCHED`, is not finite."""
        before = self.steps[name]
        finite = _local(value.detach()).isfinite().all().to(self.device)
        self.steps[name] = torch.where(finite, before, before.clamp(max=step))

    def first(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> tuple[str, int, bool] | None:
        """The name and step of the first value that was not finite in any process.

        Args:
            gather: joins the tensors (1, n) of all processes to (processes, n). This waits for the
                device, and every process must take part.

        Returns:
            Name, step and whether it was in this process; None if all values were finite.
        """
        own = torch.stack(list(self.steps.values()))
        steps = gather(own[None]).amin(0).tolist()
        step = min(steps)
        if step == NEVER:
            return None
        return WATCHED[steps.index(step)], step, own.min().item() == step


@torch.no_grad()
def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors that hold a value that is not finite; of DTensors the local share.

    The device is waited for once. Integers and quantised tensors are left out.
    """
    names, flags = [], []
    for name, tensor in tensors:
        tensor = _local(tensor)
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_floating_point():
            names.append(name)
            flags.append(tensor.isfinite().all())
    if not flags:
        return []
    device = flags[0].device
    finite = torch.stack([flag.to(device, non_blocking=True) for flag in flags]).tolist()
    return [name for name, flag in zip(names, finite) if not flag]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> list[tuple[str, torch.Tensor]]:
    """The tensors of an optimizer's state with the names of their parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (f"the optimizer's {key} of {names.get(id(parameter), 'a parameter')}", value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if torch.is_tensor(value)
    ]


@torch.no_grad()
def where_not_finite(model: nn.Module, inputs: dict[str, Any] | None = None) -> str:
    """Says which parameter, input or module's output is the first that is not finite.

    Args:
        model: in which to look.
        inputs: what it was called with; None if it is no longer known.
    """
    broken = not_finite(model.named_parameters())
    if broken:
        when = "by now, steps later" if inputs is None else "an earlier step broke them"
        return f"{len(broken)} parameters are not finite, first {broken[0]}: {when}"
    tensors = {name: x for name, x in (inputs or {}).items() if torch.is_tensor(x)}
    for name in not_finite(tensors.items()):
        return f"the batch's {name} holds values that are not finite"
    found = _first_output(model, inputs) if inputs else None
    if found is None:
        return "all parameters are finite"
    return f"the first output that is not finite is that of {found}"


def _first_output(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """The name of the first module whose output is not finite."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if not found and not_finite((name, x) for x in outputs if torch.is_tensor(x)):
            found.append(name)

    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: look(name, out))
        for name, module in model.named_modules()
    ]
    try:
        device = next(model.parameters()).device
        model(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
