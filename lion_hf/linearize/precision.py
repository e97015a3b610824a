"""Whether a device multiplies matrices faster in bfloat16 than in float32."""

import time

import torch

SHAPES = (1024, 384, 1536)  # rows, width, outer width of a small encoder's MLP
REPEATS = 3
FASTER = 1.5  # times, from which the rounding is worth it


def bf16_is_faster(device: torch.device) -> bool:
    """Times a product of matrices in both types, which takes some milliseconds.

    Args:
        device: where it is going to be used. On a CPU the answer depends on its instructions.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    return _seconds(device, torch.float32) >= FASTER * _seconds(device, torch.bfloat16)


def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The best time of some products, after one that does not count."""
    rows, width, outer = SHAPES
    left = torch.ones(rows, width, device=device, dtype=dtype)
    right = torch.ones(width, outer, device=device, dtype=dtype)
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", lambda: None)
    seconds = []
    for _ in range(1 + REPEATS):
        synchronize()
        start = time.perf_counter()
        left @ right
        synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
