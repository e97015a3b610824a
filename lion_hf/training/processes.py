"""Several processes: started where accelerate would start one, on CPUs too, and with FSDP2."""

import os
import sys
from dataclasses import replace

import psutil
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

from ..status import stop

# Names of accelerate's launcher: `accelerate launch`, `accelerate-launch`, and as a module.
LAUNCHERS = ("launch", "accelerate-launch", "accelerate.commands.launch")
# Launchers of several processes, such as torchrun or MPI, set one of these in each.
RANKS = ("LOCAL_RANK", "RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def start_processes() -> None:
    """Starts the N processes that `accelerate launch --cpu --num_processes N` asks for.

    Without MPI, accelerate silently starts a single process on CPUs. This replaces it by torchrun
    with the same script. Under other launchers it does nothing. A script calls it before it reads
    its options.

    Raises:
        SystemExit: if N cannot be determined.
    """
    asked = (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    )
    if not asked or any(name in os.environ for name in RANKS):
        return
    launcher = psutil.Process().parent()
    count = None if launcher is None else _asked_processes(launcher.cmdline())
    if count is None:
        stop(
            "accelerate launch --cpu starts one process: for N of them use"
            " torchrun --nproc_per_node N, or"
            " accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes N"
        )
    if count > 1:
        address = [
            f"--{name}={os.environ[name.upper()]}" for name in ("master_addr", "master_port")
        ]
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={count}",
            *address,
        ]
        os.execv(sys.executable, [*torchrun, *sys.orig_argv[1:]])


def _asked_processes(command: list[str]) -> int | None:
    """The number of processes that accelerate's command line or its settings file asks for.

    None if this is not a command of accelerate's launcher.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    place = next((i for i, word in enumerate(command) if os.path.basename(word) in LAUNCHERS), None)
    if place is None:
        return None
    args = launch_command_parser().parse_args(command[place + 1 :])
    if args.num_machines not in (None, 1):
        return None
    file = args.config_file or (
        None if args.cpu or not os.path.isfile(default_config_file) else default_config_file
    )
    return args.num_processes or (1 if file is None else load_config_from_file(file).num_processes)


def use_cpu_without_accelerator() -> None:
    """Connects the processes of torchrun on a machine without GPU.

    Without this each of them would train alone.
    """
    if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def settle_fsdp(accelerator: Accelerator) -> bool:
    """Sets FSDP up as it was asked for: on CPUs too, and with exact sums and losses.

    accelerate drops FSDP on CPUs. With bf16 or fp16, FSDP2 computes in that type; accelerate would
    also add up the processes' gradients in it, and round the loss to it.

    Args:
        accelerator: has not been used yet.

    Returns:
        Whether it uses FSDP.
    """
    state = accelerator.state
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if state.distributed_type == DistributedType.MULTI_CPU and asked:
        # reads the launcher's settings from the environment
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    plugin = getattr(state, "fsdp_plugin", None)
    if (
        plugin is not None
        and plugin.fsdp_version == 2
        and plugin.mixed_precision_policy is not None
    ):
        exact = {"reduce_dtype": torch.float32, "output_dtype": None}
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **exact)
    return plugin is not None


@torch.no_grad()
def share_weights(model: torch.nn.Module, device: torch.device) -> None:
    """Gives all processes the first one's weights.

    DDP does so by itself. FSDP2 would shard the different weights of each process.
    """
    for tensor in model.state_dict().values():
        shared = tensor.to(device)
        torch.distributed.broadcast(shared, 0)
        tensor.copy_(shared)
