"""The launchers that the project names, and how a program is started under them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "configs" / "accelerate"

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc_per_node",
    "2",
    "--master_port",
    "PORT",
]
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--num_processes",
    "2",
    "--main_process_port",
    "PORT",
]

# Name of a launch -> its commands, which run side by side, and the cases of distributed_worker.py.
LAUNCHES = {
    "accelerate-cpu": ([[*LAUNCH, "--cpu"]], ("selective", "decay", "lit", "stream", "snake")),
    "torchrun": ([TORCHRUN], ("selective", "resumed", "broken", "packed")),
    "fsdp2": (
        [[*LAUNCH, "--config_file", str(SETTINGS / "fsdp2.yaml")]],
        ("selective", "decay", "lit", "snake", "recomputed", "bf16", "resumed", "broken", "packed"),
    ),
}


def start(commands: list[list[str]], *program: str) -> list[str]:
    """Runs a program under launchers, side by side; returns what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    hidden = ("TRITON_INTERPRET", "ACCELERATE_USE_CPU", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for command in commands:
        words = [*(port if word == "PORT" else word for word in command), *program]
        process = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
    try:
        outputs = [process.communicate(timeout=480)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-5000:]
    return outputs
