"""Trainer with LION's exemptions from weight decay, and items counted for every head."""

import torch
from torch import nn
from transformers import Trainer

from .modeling.modeling_lion import LionPreTrainedModel


class LionTrainer(Trainer):
    """`transformers.Trainer` with two differences.

    Weight decay also spares class token, mask token and position embeddings. (Trainer itself spares biases and norms, and
    with them LION's decays and gate biases, `gate.bias`.) And gradient accumulation is exact for question answering and
    masked image modelling too, whose batches have no `labels` that Trainer could count.
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters to which weight decay applies, also in a model that wraps a LION model (PEFT, for one)."""
        exempt = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in model.named_modules()
            if isinstance(module, LionPreTrainedModel)
            for name in module.no_weight_decay()
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        return super()._get_num_items_in_batch([_with_labels(batch) for batch in batch_samples], device)


def _with_labels(batch: dict) -> dict:
    """The batch with `labels` to count: -100 for patches that are not masked, and for answers outside of the text."""
    if "labels" in batch:
        return batch
    if "bool_masked_pos" in batch:
        return {"labels": torch.where(batch["bool_masked_pos"].bool(), 0, -100)}
    if "start_positions" in batch and "input_ids" in batch:
        return {"labels": torch.where(batch["start_positions"] < batch["input_ids"].shape[1], 0, -100)}
    return batch
