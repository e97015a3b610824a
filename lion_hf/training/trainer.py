"""Trainer for LION: weight decay, items counted for every head, sealed checkpoints, a stop at NaN, speed in the logs."""

import importlib.util
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import ProgressCallback, TrainingArguments

from ..modeling.modeling_lion import LionPreTrainedModel
from . import checkpoints
from .callbacks import LogAtCheckpoints, Progress, SetEpoch
from .processes import settle_fsdp, share_weights, use_cpu_without_accelerator
from .speed import items_and_flops, matmul_rate
from .uploads import UploadingTrainer

NEVER = torch.iinfo(
    torch.long
).max  # the step at which the loss was not finite, while it always was


@dataclass
class LionTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for long runs, and how to continue an interrupted one.

    Args:
        output_dir: the run's folder; required.
        resume: "auto" continues from the newest whole checkpoint in `output_dir` if there is one, "never" starts anew, a
            checkpoint's folder continues from it.
        do_train: whether to train; without it `run` only evaluates or predicts.
        do_eval: whether to evaluate without training.
        do_predict: whether to write predictions.
        total_batch_size: samples a step over all processes; sets `gradient_accumulation_steps`.
        peak_tflops: the device's peak in TFLOP/s, for model FLOPs utilisation; None to measure its rate of matrix products.
    """

    output_dir: str = field(
        metadata={"help": "Folder of the run: checkpoints, final model, curves, settings, metrics."}
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto: continue from the newest whole checkpoint in output_dir; never; or a checkpoint's folder."
        },
    )
    do_train: bool = field(
        default=True,
        metadata={"help": "Train; with false, only evaluate (do_eval) or predict (do_predict)."},
    )
    do_eval: bool = field(
        default=False,
        metadata={"help": "Evaluate without training. A training is always evaluated at its end."},
    )
    do_predict: bool = field(
        default=False, metadata={"help": "Write predictions, after the training if there is one."}
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples a step over all processes; sets gradient_accumulation_steps."},
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "Peak of the device in TFLOP/s for model FLOPs utilisation; measured with matrix products if not given."
        },
    )
    report_to: None | str | list[str] = field(
        default_factory=lambda: (
            "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        ),
        metadata={
            "help": "Where to report to besides curves.csv and curves.png: tensorboard (if installed), wandb, none, ..."
        },
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep, besides the best one."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not used: a loss that is not finite stops the run."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop columns that the model's forward does not take."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Whether batches are made in pinned memory."},
    )

    def __post_init__(self):
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops={self.peak_tflops}: expected None or a positive number")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(
                f"save_total_limit={self.save_total_limit}: expected None or an integer of at least 1"
            )
        use_cpu_without_accelerator()
        super().__post_init__()
        if self.total_batch_size is not None:
            at_once = (
                self.train_batch_size * self.world_size
            )  # with several GPUs in a process, of all of them
            if self.total_batch_size < 1 or self.total_batch_size % at_once:
                raise ValueError(
                    f"total_batch_size={self.total_batch_size}: expected a multiple of the {at_once} samples at a time"
                    f" (per_device_train_batch_size={self.per_device_train_batch_size} on each device)"
                )
            self.gradient_accumulation_steps = self.total_batch_size // at_once


class LionTrainer(UploadingTrainer):
    """`transformers.Trainer` that a long run can be left alone with. Works with other models than LION's too.

    - Weight decay also spares class token, mask token and position embeddings. (Trainer itself spares biases and norms, and
      with them LION's decays and gate biases, `gate.bias`.)
    - Gradient accumulation is exact for question answering and masked image modelling too, whose batches have no `labels` that
      Trainer could count.
    - A checkpoint is sealed (`lion_hf.checkpoints`) before older ones go. If it cannot be written, no half of it stays.
    - Uploads to the Hub hold code and model card, and nothing that is only for this machine.
    - A loss that is not finite stops the run with FloatingPointError, which says where.
    - Logs hold tokens (or images) a second and model FLOPs utilisation, and the progress bar the latest numbers.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = getattr(self.model, "config", None)
        form, dropout = (
            getattr(config, "attention_form", "auto"),
            getattr(config, "attention_probs_dropout_prob", 0),
        )
        if form in ("chunk", "recurrent") and dropout:
            raise ValueError(
                f"attention_form={form!r} with attention_probs_dropout_prob={dropout}: only 'attention' (which 'auto' then"
                " picks) keeps scores to drop; set the dropout to 0 to train in this form"
            )
        for callback in self.callback_handler.callbacks:
            if type(callback) is ProgressCallback:
                self.remove_callback(callback)
                self.add_callback(Progress)
        self.add_callback(LogAtCheckpoints)
        self.add_callback(SetEpoch)
        if self.is_fsdp_enabled and self.args.world_size > 1:
            share_weights(self.model, self.args.device)
        self._bad_step = torch.tensor(NEVER, device=self.args.device)
        self._items, self._flops, self._since, self._peak = 0, 0.0, None, None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = settle_fsdp(self.accelerator)

    def load_weights(self, folder: str | os.PathLike) -> None:
        """Loads the weights of a checkpoint or of a finished run's folder into the model."""
        super()._load_from_checkpoint(str(folder), self.model)

    # What the loss is divided by, and what decays

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters to which weight decay applies, also in a model that wraps a LION model (PEFT, for one)."""
        exempt = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in model.named_modules()
            if isinstance(module, LionPreTrainedModel)
            for name in module.no_weight_decay()
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    def _get_num_items_in_batch(
        self, batch_samples: list, device: torch.device
    ) -> torch.Tensor | int | None:
        return super()._get_num_items_in_batch(
            [_with_labels(batch) for batch in batch_samples], device
        )

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in Trainer; a metric `exact_loss` of `compute_metrics` takes the place of the mean of the batches' losses."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        exact = output.metrics.pop(f"{metric_key_prefix}_exact_loss", None)
        if exact is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = exact
        return output

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """As in Trainer, but nothing for a run that was interrupted after its last step, in which Trainer would do one more."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # Losses that are not finite

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None
    ) -> torch.Tensor:
        if self._since is None:
            self._since = time.perf_counter()
        items, flops = items_and_flops(self.model, inputs)
        self._items, self._flops = self._items + items, self._flops + flops
        loss = super().training_step(model, inputs, num_items_in_batch)
        here = torch.full_like(self._bad_step, self.state.global_step)
        self._bad_step = torch.where(
            loss.isfinite(), self._bad_step, torch.minimum(self._bad_step, here)
        )
        if (
            self.args.device.type == "cpu"
        ):  # elsewhere asking would wait for the device, so logs and checkpoints do
            self._stop_if_not_finite(inputs)
        return loss

    def _stop_if_not_finite(self, inputs: dict[str, Any] | None = None) -> None:
        step = (
            self.accelerator.gather(self._bad_step).min().item()
        )  # all processes stop, or some would wait for others
        if step == NEVER:
            return
        place = where_not_finite(self.model, inputs)
        if self._bad_step.item() != step:
            place = "it did so in another process and was finite in this one"
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else float("nan")
        whole = [
            folder
            for folder in checkpoints.checkpoints(self.args.output_dir)
            if checkpoints.damage(folder) is None
        ]
        raise FloatingPointError(
            f"the loss became nan or infinite in step {step + 1} (epoch {self.state.epoch:.2f}, learning rate {rate:.3g});"
            f" {place}. {f'{whole[-1]} is from before' if whole else 'There is no checkpoint'}."
            " Usual cures: a lower learning rate, a longer warm-up, max_grad_norm=1, bf16 in place of fp16, other data."
        )

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_if_not_finite()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():  # of an earlier try
            checkpoints.remove(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = (
            self.args.save_total_limit,
            None,
        )  # older ones go after this one is whole
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.seal(folder)
        except Exception as error:
            if not _cannot_write(error):
                raise
            if self.args.should_save and folder.exists():
                checkpoints.remove(folder)
            raise OSError(
                f"{folder} could not be written and was removed: {error}. Make room and start the run again: it continues"
                " from its last whole checkpoint"
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.upload_checkpoint(folder)
        if self.args.should_save:
            checkpoints.rotate(folder.parent, limit, keep=self.state.best_model_checkpoint)

    # Speed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the numbers; to those of training it adds items a second, of all processes, and model FLOPs utilisation."""
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
        self._items, self._flops, self._since = (
            0,
            0.0,
            None,
        )  # the next step starts the clock: evaluations are not counted

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


@torch.no_grad()
def where_not_finite(model: nn.Module, inputs: dict[str, Any] | None = None) -> str:
    """Says which parameter, input or module's output is the first that is not finite."""
    broken = [
        name for name, parameter in model.named_parameters() if not parameter.isfinite().all()
    ]
    if broken:
        when = "by now, steps later" if inputs is None else "an earlier step broke them"
        return f"{len(broken)} parameters are not finite, first {broken[0]}: {when}"
    for name, value in (inputs or {}).items():
        if torch.is_tensor(value) and not value.isfinite().all():
            return f"the batch's {name} holds values that are not finite"
    found: list[str] = []

    def look(name, output):
        tensors = [
            x for x in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(x)
        ]
        if not found and any(not x.isfinite().all() for x in tensors):
            found.append(name)

    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: look(name, out))
        for name, module in model.named_modules()
    ]
    try:
        if inputs:
            device = next(model.parameters()).device
            model(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return (
        f"the first output that is not finite is that of {found[0]}"
        if found
        else "all parameters are finite"
    )


def _mean_loss(log_history: list[dict[str, float]]) -> float:
    """The mean over all logged steps, of which every entry has the mean since the one before."""
    entries = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    starts = [0, *(step for step, _ in entries)]
    return sum(loss * (step - start) for (step, loss), start in zip(entries, starts)) / max(
        starts[-1], 1
    )


def _cannot_write(error: Exception) -> bool:
    """Whether an error means that a file could not be written: Python's own, that of safetensors, or that of torch.save."""
    return isinstance(error, OSError | SafetensorError) or (
        isinstance(error, RuntimeError)
        and any(word in str(error) for word in ("PytorchStreamWriter", "inline_container"))
    )


def _with_labels(batch: dict) -> dict:
    """The batch with `labels` to count: -100 for patches that are not masked, and for answers outside of the text."""
    if "labels" in batch:
        return batch
    if "bool_masked_pos" in batch:
        return {"labels": torch.where(batch["bool_masked_pos"].bool(), 0, -100)}
    if "start_positions" in batch and "input_ids" in batch:
        return {
            "labels": torch.where(batch["start_positions"] < batch["input_ids"].shape[1], 0, -100)
        }
    return batch
