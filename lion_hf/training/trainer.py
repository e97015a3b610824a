"""Trainer for LION: weight decay, exact losses, sealed checkpoints, a stop at NaN, speed."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import ProgressCallback

from ..folders import cannot_write
from ..modeling.lion_choice import check_score_dropout, why_quadratic
from ..modeling.modeling_lion import LionPreTrainedModel
from . import checkpoints
from .arguments import LionTrainingArguments
from .callbacks import LogAtCheckpoints, Progress, SetEpoch
from .evaluation import SharedBatches, gather_rows, kept_weights, loader_options
from .finite import Watch, not_finite, optimizer_tensors, where_not_finite
from .lock import run_lock
from .processes import settle_fsdp, share_weights
from .speed import items_and_flops, matmul_rate
from .uploads import UploadingTrainer

__all__ = ["LionTrainer", "LionTrainingArguments"]

logger = logging.getLogger(__name__)

CURES = (
    "Usual cures: a lower learning rate, a longer warm-up, max_grad_norm=1, bf16 in place of fp16,"
    " other data."
)


class LionTrainer(UploadingTrainer):
    """`transformers.Trainer` for long runs that nobody watches. Works with any model.

    - Weight decay also spares class token, mask token and position embeddings. (Trainer itself
      spares biases and norms, and with them LION's decays and gate biases, `gate.bias`.)
    - Gradient accumulation is exact for question answering and masked image modelling too, whose
      batches have no `labels` that Trainer could count.
    - Several processes evaluate as one does: no sample twice, and batches of different sizes.
    - `bf16_full_eval` and `fp16_full_eval` do not change the model that is trained or saved.
    - A checkpoint is sealed (`lion_hf.training.checkpoints`) before older ones are deleted. If it
      cannot be written, no half of it stays. Only one run at a time writes to `output_dir`.
    - Uploads to the Hub hold code and model card, and nothing that is only for this machine.
    - A loss or gradient that is not finite stops the run with FloatingPointError, which says where.
      No model or checkpoint with such values is saved.
    - Logs hold tokens (or images) per second and model FLOPs utilisation, and the progress bar the
      latest numbers.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.do_train:
            check_score_dropout(getattr(self.model, "config", None))
        if self.is_fsdp_enabled and (self.args.bf16_full_eval or self.args.fp16_full_eval):
            raise ValueError(
                "bf16_full_eval or fp16_full_eval with FSDP: expected neither, because they would"
                " round the only copy of the weights; bf16=True evaluates in bfloat16 too"
            )
        for callback in self.callback_handler.callbacks:
            if type(callback) is ProgressCallback:
                self.remove_callback(callback)
                self.add_callback(Progress)
        self.add_callback(LogAtCheckpoints)
        self.add_callback(SetEpoch)
        if self.is_fsdp_enabled and self.args.world_size > 1:
            share_weights(self.model, self.args.device)
        self._optimizer_is_ours = self.optimizer is None
        # buffers may hold an infinity on purpose, as masks do
        self._never_finite = set(not_finite(self.model.named_buffers()))
        self._watch, self._broken_gradient = Watch(self.args.device), None
        self._items, self._flops, self._since, self._peak = 0, 0.0, None, None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = settle_fsdp(self.accelerator)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in Trainer; with True it continues from the newest whole checkpoint in `output_dir`.

        Raises:
            ValueError: if another run writes checkpoints to `output_dir`.
            FloatingPointError: if the loss, the gradient or what would be saved is not finite. The
                trainer can then train again, from a checkpoint.
            OSError: if a checkpoint cannot be written.
        """
        check_score_dropout(getattr(self.model, "config", None))
        quadratic = why_quadratic(getattr(self.model, "config", None))
        if quadratic is not None and self.is_world_process_zero():
            logger.warning(quadratic)
        self._watch.reset()
        self._items, self._flops, self._since = 0, 0.0, None
        saves = self.args.save_strategy != "no"
        checkpoint = self._checkpoint_of(resume_from_checkpoint, saves)
        try:
            with run_lock(self.args) if saves else contextlib.nullcontext():
                output = super().train(checkpoint, *args, **kwargs)
            self.check_finite("the model")
        except FloatingPointError:
            if self._optimizer_is_ours:  # its state may be broken too
                self.optimizer = self.lr_scheduler = None
            raise
        finally:
            self.is_in_train = False
        return output

    def _checkpoint_of(self, resume: str | bool | None, saves: bool) -> str | None:
        warns = saves and self.is_world_process_zero()
        return checkpoints.named_or_newest(self.args.output_dir, resume, warns)

    def load_weights(self, folder: str | os.PathLike) -> None:
        """Loads the weights of a checkpoint or of a finished run's folder into the model."""
        super()._load_from_checkpoint(str(folder), self.model)

    # What the loss is divided by, and what decays

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay, also in a model that wraps a LION model (PEFT)."""
        exempt = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in model.named_modules()
            if isinstance(module, LionPreTrainedModel)
            for name in module.no_weight_decay()
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    def create_scheduler(self, *args, **kwargs):
        """As in Trainer.

        Raises:
            ValueError: if `lr_scheduler_kwargs` do not fit the schedule.
        """
        try:
            return super().create_scheduler(*args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"lr_scheduler_kwargs={self.args.lr_scheduler_kwargs!r} do not fit"
                f" lr_scheduler_type={str(self.args.lr_scheduler_type)}: {error}"
            ) from error

    def _get_num_items_in_batch(
        self, batch_samples: list, device: torch.device
    ) -> torch.Tensor | int | None:
        return super()._get_num_items_in_batch(
            [_with_labels(batch) for batch in batch_samples], device
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """As in Trainer, but nothing if the run was interrupted after its last step.

        Trainer would do one more.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # Evaluation

    def _get_dataloader(
        self, dataset: Dataset, description: str, batch_size: int, *args, **kwargs
    ) -> DataLoader:
        if kwargs.get("is_training", False):
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            loader = super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        if isinstance(dataset, IterableDataset):
            return loader
        batches = self.evaluation_batches(dataset, batch_size)
        if batches is None:
            return loader
        shared = SharedBatches(
            loader.dataset,
            batches,
            self.args.process_index,
            self.args.world_size,
            **loader_options(self.args, loader),
        )
        for key, kept in getattr(self, "_eval_dataloaders", {}).items():
            if kept is loader:  # for the next evaluation
                self._eval_dataloaders[key] = shared
        return shared

    def evaluation_batches(self, dataset: Dataset, batch_size: int) -> list[list[int]] | None:
        """The samples of each batch over all processes; None where one process counts them off."""
        if self.args.world_size == 1:
            return None
        places = range(len(dataset))  # type: ignore[arg-type]
        return [list(places[n : n + batch_size]) for n in range(0, len(places), batch_size)]

    def evaluation_loop(self, dataloader: Any, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in Trainer; a metric `exact_loss` replaces the mean of the batches' losses."""
        if self.accelerator.is_fsdp2 and not self.accelerator._models:
            self._shard()
        shared = isinstance(dataloader, SharedBatches)
        rounded = self.args.bf16_full_eval or self.args.fp16_full_eval
        averaged = self.args.average_tokens_across_devices
        kept = kept_weights(self.model) if rounded else contextlib.nullcontext()
        if shared:

            def gather(data: Any, use_gather_object: bool = self.args.eval_use_gather_object):
                size, batch = self.args.eval_batch_size, dataloader.samples
                return gather_rows(self.accelerator, data, batch, size, use_gather_object)

            self.gather_function = gather
            self.args.average_tokens_across_devices = False  # each batch has a loss of its own
        try:
            with kept:
                output = super().evaluation_loop(
                    dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
                )
        finally:
            self.args.average_tokens_across_devices = averaged
        exact = output.metrics.pop(f"{metric_key_prefix}_exact_loss", None)
        if exact is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = exact
        return output

    def _shard(self) -> None:
        """Shards a model that has not been trained; accelerate needs an optimizer for that."""
        self.create_optimizer()
        prepared = self.accelerator.prepare(self.model, self.optimizer)
        self.model = self.model_wrapped = prepared[0]
        self.optimizer = None if self._optimizer_is_ours else prepared[1]

    # Values that are not finite

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None
    ) -> torch.Tensor:
        if self._since is None:
            self._since = time.perf_counter()
        items, flops = items_and_flops(self.model, inputs)
        self._items, self._flops = self._items + items, self._flops + flops
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._note("loss", loss, inputs)
        return loss

    def _clip_grad_norm(self, model: nn.Module):
        self._find_broken_gradient(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        if grad_norm is None:
            self._find_broken_gradient(model)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if getattr(self.accelerator, "scaler", None) is None:  # which skips such steps itself
            self._note("gradient", torch.as_tensor(norm))
        return norm

    def _find_broken_gradient(self, model: nn.Module) -> None:
        """Keeps the name of a gradient that is not finite, which clipping would spread to all."""
        if self.args.device.type == "cpu":
            gradients = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
            self._broken_gradient = next(iter(not_finite(gradients)), None)

    def _note(self, name: str, value: torch.Tensor, inputs: dict[str, Any] | None = None) -> None:
        self._watch.note(name, value, self.state.global_step)
        if self.args.device.type == "cpu":  # elsewhere logs and checkpoints wait for the device
            self._stop_if_not_finite(inputs)

    def _stop_if_not_finite(self, inputs: dict[str, Any] | None = None) -> None:
        """Raises FloatingPointError in all processes, or some would wait for others."""
        found = self._watch.first(self.accelerator.gather)
        if found is None:
            return
        name, step, here = found
        place = where_not_finite(self.model, inputs)  # in all processes: FSDP joins shards for it
        if not here:
            place = "it did so in another process and was finite in this one"
        elif name == "gradient" and self._broken_gradient is not None:
            place = f"the first one is that of {self._broken_gradient}"
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else float("nan")
        raise FloatingPointError(
            f"the {name} became nan or infinite in step {step + 1} (epoch {self.state.epoch:.2f},"
            f" learning rate {rate:.3g}); {place}. {self._last_checkpoint()}. {CURES}"
        )

    def _last_checkpoint(self) -> str:
        for folder in reversed(checkpoints.checkpoints(self.args.output_dir)):
            if checkpoints.damage(folder) is None:
                return f"{folder} is from before"
        return "There is no checkpoint"

    def saved_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of all that a checkpoint holds of the model and the optimizer."""
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()
        if self.optimizer is not None:
            yield from optimizer_tensors(self.optimizer, self.model)

    def check_finite(self, what: str, together: bool = True) -> None:
        """Makes sure that nothing is saved that is not finite.

        Args:
            what: what is to be saved, for the message.
            together: whether all processes call this, and stop if one of them has to.

        Raises:
            FloatingPointError: if a parameter, buffer or part of the optimizer's state is not.
        """
        found = [
            name for name in not_finite(self.saved_tensors()) if name not in self._never_finite
        ]
        count = torch.tensor([len(found)], device=self.args.device)
        if not found and not (together and self.accelerator.gather(count).any()):
            return
        if found and together:
            self.accelerator.gather(count)
        place = (
            f"{len(found)} tensors are not finite, first {found[0]}"
            if found
            else ("it holds values that are not finite in another process")
        )
        raise FloatingPointError(
            f"{what} is not saved: {place}. {self._last_checkpoint()}. {CURES}"
        )

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer.

        Raises:
            FloatingPointError: if the model holds values that are not finite.
        """
        folder = output_dir or self.args.output_dir
        self.check_finite(f"the model for {folder}", together=self.is_fsdp_enabled)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_if_not_finite()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        self.check_finite(str(folder))
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # older ones go after this one is whole
        try:
            if self.args.should_save:
                checkpoints.begin(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.seal(folder)
        except BaseException as error:
            if self.args.should_save and checkpoints.is_own(folder):
                checkpoints.remove(folder)
            if not cannot_write(error):
                raise
            raise OSError(
                f"{folder} could not be written and was removed: {error}. Make room and start the"
                " run again: it continues from its last whole checkpoint"
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.upload_checkpoint(folder)
        if self.args.should_save:
            checkpoints.rotate(folder, limit, keep=self.state.best_model_checkpoint)

    def _finalize_training(self, *args, **kwargs):
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # with 1 Trainer deletes all but the best, whose ever
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    # Speed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the numbers; adds to those of training items per second and FLOPs utilisation."""
        if "loss" in logs or "train_loss" in logs:
            self._stop_if_not_finite()
        if "train_loss" in logs:  # Trainer's knows only the steps since the run was continued
            logs["train_loss"] = _mean_loss(self.state.log_history)
        if "loss" in logs and self._since is not None:
            seconds, processes = time.perf_counter() - self._since, self.args.world_size
            unit = (
                "images"
                if getattr(self.model, "main_input_name", "") == "pixel_values"
                else "tokens"
            )
            if self._items:
                logs[f"{unit}_per_second"] = float(self._items) * processes / seconds
                if float(self._flops):
                    logs["mfu"] = float(self._flops) / seconds / self._peak_flops()
        super().log(logs, start_time)
        # the next step starts the clock: evaluations are not counted
        self._items, self._flops, self._since = 0, 0.0, None

    def _peak_flops(self) -> float:
        if self._peak is None:
            dtype = (
                torch.bfloat16
                if self.args.bf16
                else torch.float16
                if self.args.fp16
                else torch.float32
            )
            given = getattr(self.args, "peak_tflops", None)
            self._peak = matmul_rate(self.args.device, dtype) if given is None else given * 1e12
        return self._peak


def _mean_loss(log_history: list[dict[str, float]]) -> float:
    """The mean over all steps; each log entry has the mean since the one before."""
    entries = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    starts = [0, *(step for step, _ in entries)]
    return sum(loss * (step - start) for (step, loss), start in zip(entries, starts)) / max(
        starts[-1], 1
    )


def _with_labels(batch: dict) -> dict:
    """The batch with `labels` to count.

    They are -100 for patches that are not masked, and for answers outside of the text.
    """
    if "labels" in batch:
        return batch
    if "bool_masked_pos" in batch:
        return {"labels": torch.where(batch["bool_masked_pos"].bool(), 0, -100)}
    if "start_positions" in batch and "input_ids" in batch:
        return {
            "labels": torch.where(batch["start_positions"] < batch["input_ids"].shape[1], 0, -100)
        }
    return batch
