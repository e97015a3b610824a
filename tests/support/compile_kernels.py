"""Compiles the kernels for a GPU that need not be there.

It prints what each takes of the GPU, one JSON line per kernel.

    python tests/support/compile_kernels.py 90 bfloat16 64 normalize masked chunk

It runs the library's own launches on small tensors, with every launch replaced by a compilation,
for a compute capability, a type, a size of heads, and the cases that are named, or all of CASES;
"normalize", "masked" and "dropout" (for rows of one chunk) add what they say.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lion_hf.modeling import lion_triton

CASES = {
    "attention": {"length": 197},
    "orders": {"length": 197, "orders": 2},
    "chunk": {"length": 4096},
    "lit": {"length": 197, "orders": 0},
    "lit-states": {"length": 4096, "orders": 0},
    "recurrent": {"length": 197},
    "features": {"length": 197},
}


class Driver:
    """Stands where the driver of a real GPU would."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(kernel) -> dict:
    """What a kernel takes of the GPU.

    Registers per thread, bytes of its local memory, where spilled registers go, and shared memory
    of a program.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": kernel.metadata.name,
        "registers": found["REG"],
        "local": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
    }


def run(
    case: str, dtype: torch.dtype, head: int, options: tuple[str, ...], length: int, orders: int = 1
) -> None:
    batch, heads = 2, 2
    query, key, value = (
        torch.zeros(batch, length, heads, head, dtype=dtype).transpose(1, 2) for _ in range(3)
    )
    edges = (torch.zeros(orders, batch, heads, length),) * 2 if orders else (None, None)
    order = torch.arange(length).expand(orders, -1).contiguous() if orders > 1 else None
    if case == "recurrent":
        lion_triton.fused_recurrent(query, key, value, *(x[0] for x in edges), 1.0, None)
        return
    if case == "features":
        for name in ("elu_plus_one", "normalized_silu", "sqrt_softmax"):
            for grad in (None, key):
                lion_triton.fused_features(query, grad, None, name, dtype)
        return
    normalize, dropout = "normalize" in options, 0.1 * ("dropout" in options)
    mask = torch.ones(batch, length, dtype=torch.bool) if "masked" in options else None
    seed = torch.zeros(1, dtype=torch.long) if dropout else None
    inputs = (query, key, value, *edges, order, mask, seed)
    output, divisor = lion_triton.fused_forward(*inputs, dropout, 1.0, normalize, 1e-6, None, dtype)
    lion_triton.fused_backward(output, *inputs, output, divisor, dropout, 1.0, normalize, None)


def main(capability: str, dtype: str, head: str, *options: str) -> None:
    triton.runtime.driver.set_active(Driver(int(capability)))
    launch, seen = JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            print(json.dumps({"case": case, **resources(kernel)}), flush=True)

    JITFunction.run = compile_only
    for case in [name for name in options if name in CASES] or CASES:
        run(case, getattr(torch, dtype), int(head), options, **CASES[case])


if __name__ == "__main__":
    main(*sys.argv[1:])
