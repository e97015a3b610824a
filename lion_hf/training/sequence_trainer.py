"""Training on rows that several processes share: each holds a piece of every row."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from ..modeling.lion_ranks import piece_of_rank, sequence_parallel
from .arguments import LionTrainingArguments
from .options import SequenceOptions
from .trainer import LionTrainer


@dataclass
class SequenceArguments(SequenceOptions, LionTrainingArguments):
    """`LionTrainingArguments` for rows that several processes may share.

    Args:
        sequence_parallel_size: processes that share a row; a divisor of their number.
    """

    own_options: ClassVar[type] = SequenceOptions

    def __post_init__(self):
        size = self.sequence_parallel_size
        if size < 1:
            raise ValueError(f"sequence_parallel_size={size}: expected an integer of at least 1")
        super().__post_init__()
        if self.world_size % size:
            raise ValueError(
                f"sequence_parallel_size={size}: expected a divisor of the number of processes,"
                f" which is {self.world_size}"
            )
        if size > 1 and not self.average_tokens_across_devices:
            raise ValueError(
                f"average_tokens_across_devices=False with sequence_parallel_size={size}: expected"
                " True, because pieces of a row differ in the number of their labels"
            )

    @property
    def samples_at_once(self) -> int:
        groups = self.world_size // self.sequence_parallel_size
        return self.train_batch_size * max(groups, 1)  # no group: an error that is yet to come


class SequenceTrainer(LionTrainer):
    """`LionTrainer` whose rows may be shared by several processes (`SequenceArguments`).

    Every process computes the loss of its own piece of the rows, see
    `lion_hf.modeling.lion_ranks.sequence_parallel`. Gradients and logged losses are those of whole
    rows. Evaluation deals out whole rows, as without it: it needs less memory.

    Raises:
        ValueError: with several processes per row, for a model without LION's encoder for text, or
            for dropout of its scores. In a step, for rows of different lengths, and for pieces
            shorter than what a convolution sees of a neighbour.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        size = getattr(self.args, "sequence_parallel_size", 1)
        self._group: distributed.ProcessGroup | None = None
        if size == 1:
            return
        self._group, _ = distributed.new_subgroups(size)
        with sequence_parallel(self.model, self._group):
            dropout = self.model.config.attention_probs_dropout_prob
        if dropout > 0:
            raise ValueError(
                f"attention_probs_dropout_prob={dropout} with sequence_parallel_size={size}:"
                " expected 0"
            )

    @property
    def _row_reader(self) -> tuple[int, int]:
        """Which of how many readers of rows this process is, or belongs to."""
        size = getattr(self.args, "sequence_parallel_size", 1)
        return self.args.process_index // size, self.args.world_size // size

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows per step."""
        return self._train_batch_size * args.gradient_accumulation_steps * self._row_reader[1]

    def _get_dataloader(
        self, dataset: Dataset, description: str, batch_size: int, *args, **kwargs
    ) -> DataLoader:
        loader = super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        if self._group is not None and kwargs.get("is_training", False):
            deal_to(loader, *self._row_reader)
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """As in Trainer; of shared rows, this process's pieces, whose labels are counted."""
        if self._group is not None:
            place = distributed.get_rank(self._group), distributed.get_world_size(self._group)
            epoch_iterator = (piece_of(batch, *place) for batch in epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch=None
    ) -> torch.Tensor:
        if self._group is None:
            return super().training_step(model, inputs, num_items_in_batch)
        with sequence_parallel(self.accelerator.unwrap_model(model), self._group):
            return super().training_step(model, inputs, num_items_in_batch)


def deal_to(loader: DataLoader, reader: int, readers: int) -> None:
    """Lets a process's data loader take the batches of a reader, which may be several processes.

    Args:
        loader: as accelerate prepared it, with a share of the batches for every process.
        reader: number of the reader.
        readers: how many there are.

    Raises:
        ValueError: if its batches are not dealt out, but sent by the first process or streamed.
    """
    dealt = loader.batch_sampler
    if not isinstance(dealt, BatchSamplerShard):
        raise ValueError(
            "sequence_parallel_size above 1: expected a training set with a length, and no"
            " dispatch_batches in accelerator_config, so that processes can read the same rows"
        )
    dealt.process_index, dealt.num_processes = reader, readers


def piece_of(batch: dict[str, Any], rank: int, count: int) -> dict[str, Any]:
    """One process's piece of the rows of a batch, with the places of its tokens.

    Args:
        batch: has `input_ids` and other columns of (B, L). What else it has is passed on.
        rank: number of the process among those that share the rows.
        count: how many they are.

    Returns:
        The columns of the piece, (B, about L / count), and its `position_ids`.
    """
    ids = batch["input_ids"]
    piece = piece_of_rank(ids.shape[1], rank, count)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return {
        name: x[:, piece] if torch.is_tensor(x) and x.shape == ids.shape else x
        for name, x in (batch | {"position_ids": positions}).items()
    }
