"""The operation's peers on a GPU, apart from softmax attention.

They are what else gives LION's sums there, the torch forms among them.

    pip install flash-linear-attention      # the version read: 0.6.0

Two causal passes of its `chunk_simple_gla` make LION-D and LION-S. Where it refuses a pass (on
Hopper GPUs with triton 3.4 to 3.7.0 the backward pass of one gate a token) the peer is left out. It
has no kernel for linear attention without causality, and two causal passes would be a weak peer of
LION-lit, whose sums are two matrix products: those are timed.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lion_hf import lion_attention


class Peer(NamedTuple):
    """The family whose sums it gives, and its function of query, key, value and log-decay.

    `learns_gates` says whether gates get a gradient.
    """

    family: str
    function: Callable[..., torch.Tensor]
    learns_gates: bool = True


def load_peers() -> dict[str, Peer]:
    """Column of the table -> peer, as many as can be had here."""
    torch_forms = partial(lion_attention, backend="torch")
    peers = {
        f"{family}, torch": Peer(family, torch_forms) for family in ("LION-lit", "LION-D", "LION-S")
    }
    peers["two products"] = Peer("LION-lit", two_products)
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except Exception as error:  # no package, or one that does not go with what is installed here
        print(
            f"flash-linear-attention is left out: {type(error).__name__}: {error}", file=sys.stderr
        )
        return peers
    # fuses what stands before its kernels and behind them; they are left as they are
    passes = torch.compile(two_passes)
    torch._dynamo.config.recompile_limit = 64  # more than there are gates, lengths and passes
    peers["two simple_gla, fixed gates"] = Peer(
        "LION-D", partial(passes, chunk_simple_gla, True), learns_gates=False
    )
    peers["two simple_gla"] = Peer("LION-S", partial(passes, chunk_simple_gla, False))
    return peers


def two_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: None
) -> torch.Tensor:
    """LION-lit by two matrix products; the arguments are those of `lion_attention`."""
    return query @ (key.transpose(-1, -2) @ value * query.shape[-1] ** -0.5)


def two_passes(
    causal: Callable, fixed: bool, query, key, value, log_decay: torch.Tensor
) -> torch.Tensor:
    """LION-D or LION-S by two passes of a causal operation.

    The diagonal, which both of them count, is taken off once.

    Both passes are one call on a batch of the rows and their mirror images, which takes half the
    launches and, where rows times heads are few, fills the GPU better. Counted beside the kernels
    are therefore one copy of query, key and value in both directions, and one reading of the
    outputs, query, key and value for the sum.

    Args:
        causal: (q, k, v, g or g_gamma, scale) to a pair whose first is o_t = scale q_t S_t, S_t =
            exp(g_t) S_(t-1) + k_t v_t, of layout (B, L, H, ...), as `chunk_simple_gla`: the gate of
            the target acts, that of the source does not.
        fixed: whether the gates are LION-D's, which `causal` then takes as constants of the heads,
            its fastest way. It gives them no gradient, though LION-D learns them: in training the
            peer does less.
        query: (B, H, L, D); as a view of (B, L, H, D), as projections leave it, it need not be
            copied for `causal`.
        key: (B, H, L, D).
        value: (B, H, L, Dv).
        log_decay: (1, H, 1) if `fixed`, or else (B, H, L).

    Returns:
        (B, H, L, Dv).
    """
    scale = query.shape[-1] ** -0.5
    # (B, L, H, ...)
    query, key, value, gates = (x.transpose(1, 2) for x in (query, key, value, log_decay))
    q, k, v, g = (torch.cat([x, x.flip(1)]) for x in (query, key, value, gates))
    # The source's gate acts at the token that is next in its direction.
    decay = (
        {"g_gamma": log_decay.detach().flatten()}
        if fixed
        else {"g": F.pad(g[:, :-1], (0, 0, 1, 0))}
    )
    there, back = causal(q, k, v, **decay, scale=scale)[0].chunk(2)
    own = (query * key).sum(-1, keepdim=True) * scale * value
    return (there + back.flip(1) - own).transpose(1, 2)
