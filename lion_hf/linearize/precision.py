"""Whether a device multiplies matrices faster in bfloat16 than in float32."""

import torch

from ..training.speed import matmul_rate

SIZE, SECONDS = 1024, 0.02  # of the timed product, and how long it is repeated
FASTER = 1.5  # times, from which the rounding is worth it


def bf16_is_faster(device: torch.device) -> bool:
    """Times a product of matrices in both types, which takes some milliseconds.

    Args:
        device: where it is going to be used. On a CPU the answer depends on its instructions.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    single, half = (
        matmul_rate(device, dtype, SIZE, SECONDS) for dtype in (torch.float32, torch.bfloat16)
    )
    return half >= FASTER * single
