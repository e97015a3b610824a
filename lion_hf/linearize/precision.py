"""Whether a device multiplies matrices faster in bfloat16 than in float32."""

import torch

from ..training.speed import matmul_rate

SIZE, SECONDS = 1024, 0.02  # of the timed product, and how long it is repeated
# Without instructions for it, a processor can be fifty times slower in bfloat16: the product would
# take many seconds. A small one shows that first.
SMALL = 128
FASTER = 1.5  # times, from which the rounding is worth it
SLOWER = 0.5  # times, below which a small product decides


def bf16_is_faster(device: torch.device) -> bool:
    """Times a product of matrices in both types, which takes some milliseconds.

    Args:
        device: where it is going to be used. On a CPU the answer depends on its instructions.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    return _advantage(device, SMALL) >= SLOWER and _advantage(device, SIZE) >= FASTER


def _advantage(device: torch.device, size: int) -> float:
    """How many times as fast products of matrices of a size are in bfloat16."""
    single, half = (
        matmul_rate(device, dtype, size, SECONDS) for dtype in (torch.float32, torch.bfloat16)
    )
    return half / single
