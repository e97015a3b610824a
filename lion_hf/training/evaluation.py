"""Evaluation that leaves the model as it is, and does not depend on the number of processes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments


@contextlib.contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Gives a model its own weights and buffers back, in their types and on their devices.

    Inside, `model.to(dtype)` may round them: `Trainer` does so for `bf16_full_eval` and
    `fp16_full_eval`. Both copies are in memory then.
    """
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


class SharedBatches(DataLoader):
    """The batches of one process when several evaluate a data set.

    The batches are those of a single process, dealt out in turn, in their order. No sample is
    evaluated twice: a process without a batch in the last round gets the first batch again, with
    `samples` = 0, so that all of them call the model equally often.

    Args:
        dataset: the samples.
        batches: the numbers of the samples of each batch.
        process: number of this process.
        processes: how many there are.
        options: other arguments of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        batches: list[list[int]],
        process: int,
        processes: int,
        **options: Any,
    ):
        rounds = -(-len(batches) // processes)
        own = batches[process::processes]
        self.counts = [len(batch) for batch in own] + [0] * (rounds - len(own))
        own += batches[:1] * (rounds - len(own))
        super().__init__(dataset, batch_sampler=own, **options)
        self.samples = 0  # of the batch that was given last

    def __iter__(self) -> Any:
        for count, batch in zip(self.counts, super().__iter__()):
            self.samples = count
            yield batch


def loader_options(args: TrainingArguments, loader: DataLoader) -> dict[str, Any]:
    """What a loader with batches of our own has in common with one of Trainer's."""
    return {
        "collate_fn": loader.collate_fn,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "persistent_workers": args.dataloader_persistent_workers,
    }


def gather_rows(
    accelerator: Accelerator,
    data: Any,
    samples: int,
    batch_size: int,
    use_gather_object: bool = False,
) -> Any:
    """Joins the processes' rows, which may be different numbers of them.

    Args:
        accelerator: of the processes.
        data: tensors with rows in their first dimension, or tuples, lists and dictionaries of them.
        samples: samples in this process's batch; with 0 none of its rows count.
        batch_size: samples in a full batch. A loss is repeated for so many.
        use_gather_object: join a list of what the processes have, as it is.
    """
    if use_gather_object:
        return gather_object(data if samples else data[:0])
    options = (samples, batch_size)
    if isinstance(data, tuple | list):
        return type(data)(gather_rows(accelerator, x, *options) for x in data)
    if isinstance(data, dict):
        return {name: gather_rows(accelerator, x, *options) for name, x in data.items()}
    rows = data[None] if data.dim() == 0 else data
    if samples == 0 or rows.shape == (batch_size,):
        rows = rows[:samples]
    counts = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    found = accelerator.gather(padded[None].contiguous())
    return torch.cat([part[:count] for part, count in zip(found, counts)])
