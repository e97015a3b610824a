"""Several processes: started where accelerate would start one, on CPUs without being told, and FSDP2 on CPUs too."""

import os
import sys
from dataclasses import replace

import psutil
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

# How accelerate's launcher is called: `accelerate launch`, `accelerate-launch`, `python -m accelerate.commands.launch`.
LAUNCHERS = ("launch", "accelerate-launch", "accelerate.commands.launch")
# One of these is set in every process that a launcher of several, torchrun or MPI, has started.
RANKS = ("LOCAL_RANK", "RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def start_processes() -> None:
    """Turns the one process that `accelerate launch --cpu --num_processes N` starts into the N that it was asked for.

    Without MPI accelerate starts a single process for CPUs, and says nothing. This replaces it by torchrun with the same
    script; anywhere else it does nothing. A script calls it before it reads its options.

    Raises:
        SystemExit: if N cannot be found out.
    """
    asked = (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    )
    if not asked or any(name in os.environ for name in RANKS):
        return
    launcher = psutil.Process().parent()
    count = None if launcher is None else _asked_processes(launcher.cmdline())
    if count is None:
        raise SystemExit(
            "accelerate launch --cpu starts one process: for N of them use torchrun --nproc_per_node N, or accelerate launch"
            " --config_file configs/accelerate/ddp.yaml --num_processes N"
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
    """The number of processes in accelerate's command line, or in its settings file; None if it is no such command."""
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
    """Lets the processes of torchrun find each other on a machine without GPU; by itself each would train on its own."""
    if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def settle_fsdp(accelerator: Accelerator) -> bool:
    """Makes FSDP what it was asked to be: also on CPUs, for which accelerate drops it, and with exact sums and losses.

    With bf16 or fp16 FSDP2 computes in that type. accelerate would also add up the processes' gradients in it, and round the
    loss to it.

    Args:
        accelerator: made, but not used yet.

    Returns:
        Whether it uses FSDP.
    """
    state = accelerator.state
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if state.distributed_type == DistributedType.MULTI_CPU and asked:
        state.fsdp_plugin = (
            FullyShardedDataParallelPlugin()
        )  # reads the launcher's settings from the environment
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
    """Gives all processes the first one's weights. DDP does so by itself; FSDP2 would cut up what each process has made."""
    for tensor in model.state_dict().values():
        shared = tensor.to(device)
        torch.distributed.broadcast(shared, 0)
        tensor.copy_(shared)
