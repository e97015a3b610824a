"""Teaches a LION copy of a softmax model, first layer by layer, then by its answers.

`lion_hf.linearize` makes the copy and calls `distil`.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..convert.errors import ConversionError
from ..modeling.lion_choice import check_score_dropout
from ..modeling.modeling_lion import LionPreTrainedModel
from .data import lesson_data
from .families import FAMILIES, without_distillation_token
from .losses import answer_loss, class_logits, problem_type, relative_error
from .settings import Distillation
from .softmax_models import source_name, theirs_in

if TYPE_CHECKING:
    from ..training.trainer import LionTrainingArguments


class Lesson(nn.Module):
    """A student beside its frozen teacher; calling it with a batch gives the loss of a stage.

    Args:
        student: copy of the teacher by `linearize_model`.
        teacher: the softmax model.
        alpha: weight of the teacher's answers; the rest is that of the student's own loss, where
            there are labels.
        tau: temperature of the answers.
    """

    def __init__(
        self,
        student: LionPreTrainedModel,
        teacher: PreTrainedModel,
        alpha: float = 1.0,
        tau: float = 1.0,
    ):
        super().__init__()
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.alpha, self.tau, self.stage = alpha, tau, "layers"
        self._seen: dict[str, list[torch.Tensor]] = {"input": [], "output": []}
        self.family = FAMILIES[teacher.config.model_type]
        for n in range(student.config.num_hidden_layers):
            first = source_name(f"lion.layers.{n}.attention.q_proj", teacher)
            last = _attention_output(n, teacher)
            teacher.get_submodule(first).register_forward_pre_hook(
                lambda _m, args: self._seen["input"].append(args[0])
            )
            teacher.get_submodule(last).register_forward_hook(
                lambda _m, _a, output: self._seen["output"].append(output)
            )

    def begin(self, stage: str) -> None:
        """Makes a stage's parameters trainable: the attention's for "layers", else all."""
        self.stage = stage
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(stage == "answers" or ".attention." in name)

    def train(self, mode: bool = True) -> "Lesson":
        """Without dropout in the teacher, and in the student while its layers are compared."""
        super().train(mode)
        self.teacher.eval()
        self.student.train(mode and self.stage == "answers")
        return self

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        labels = batch.pop("labels", None)
        answers, hidden_states, targets = self.ask(batch)
        if self.stage == "layers":
            return {"loss": self.layer_errors(batch, hidden_states, targets).mean()}
        own = labels if self.alpha < 1 else None
        outputs = self.student(**batch, **({} if own is None else {"labels": own}))
        given = batch if labels is None else batch | {"labels": labels}
        loss = answer_loss(self.student, outputs, answers, given, tau=self.tau)
        return {
            "loss": loss if own is None else self.alpha * loss + (1 - self.alpha) * outputs.loss
        }

    @torch.no_grad()
    def ask(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
        """The teacher's outputs, and inputs and outputs of its attentions, (B, L, hidden).

        All are without the tokens that the student does not have.
        """
        for seen in self._seen.values():
            seen.clear()
        outputs = self.teacher(**batch)
        cut = without_distillation_token if self.family.second_token else lambda x: x
        if "last_hidden_state" in outputs:
            outputs["last_hidden_state"] = cut(outputs.last_hidden_state)
        hidden_states, targets = (
            [cut(x) for x in self._seen[name]] for name in ("input", "output")
        )
        return outputs, hidden_states, targets

    def layer_errors(
        self, batch: dict, hidden_states: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> torch.Tensor:
        """`relative_error` of each layer's attention, (layers,), given the teacher's inputs."""
        encoder = self.student.base_model
        order = (
            encoder.embeddings.reading_orders(batch["pixel_values"])
            if "pixel_values" in batch
            else None
        )
        tokens = batch.get("attention_mask")
        errors = []
        for layer, x, target in zip(encoder.layers, hidden_states, targets):
            output, _ = layer.attention(x, attention_mask=tokens, order=order)
            errors.append(relative_error(output, target, tokens))
        return torch.stack(errors)


def _attention_output(layer: int, teacher: PreTrainedModel) -> str:
    """The teacher's module whose output is an attention's."""
    row = FAMILIES[teacher.config.model_type].attention_output
    if row.startswith("lion."):
        return source_name(row.format(n=layer), teacher)
    return theirs_in(row, layer, teacher)


@torch.no_grad()
def measure(lesson: Lesson, data: Dataset, collate: Callable, batch_size: int) -> dict[str, float]:
    """How near the student is to its teacher.

    Returns:
        `layer_error`, the mean relative squared error of the attentions; for classes also
        `agreement`, the share of samples (or masked tokens) with the teacher's class, and with
        labels `accuracy` and `teacher_accuracy`. Where a sample has several labels, `agreement` is
        the share of all labels that both give or both do not give.
    """
    lesson.eval()
    device, kind = next(lesson.student.parameters()).device, problem_type(lesson.student)
    sums: defaultdict[str, float] = defaultdict(float)
    for batch in DataLoader(data, batch_size, collate_fn=collate):
        batch = {name: x.to(device) for name, x in batch.items()}
        labels = batch.pop("labels", None)
        answers, *layers = lesson.ask(batch)
        rows = len(layers[0][0])
        sums["rows"] += rows
        sums["layer_error"] += lesson.layer_errors(batch, *layers).mean().item() * rows
        outputs = lesson.student(**batch)
        targets = class_logits(answers)
        if targets is None or kind == "regression":
            continue
        if kind == "multi_label_classification":
            same = (outputs.logits > 0) == (targets > 0)
            sums["samples"] += same.numel()
            sums["agreement"] += same.sum().item()
            continue
        chosen = torch.ones(targets.shape[:-1], dtype=torch.bool, device=device)
        if labels is not None and labels.shape == chosen.shape:
            chosen = labels != -100
        elif chosen.dim() == 2 and "attention_mask" in batch:
            chosen = batch["attention_mask"] != 0
        mine, theirs = outputs.logits[chosen].argmax(-1), targets[chosen].argmax(-1)
        sums["samples"] += len(mine)
        sums["agreement"] += (mine == theirs).sum().item()
        if labels is not None:
            sums["accuracy"] += (mine == labels[chosen]).sum().item()
            sums["teacher_accuracy"] += (theirs == labels[chosen]).sum().item()
    result = {"layer_error": sums["layer_error"] / sums["rows"]}
    names = [name for name in ("agreement", "accuracy", "teacher_accuracy") if name in sums]
    return result | {name: sums[name] / sums["samples"] for name in names if sums["samples"]}


def distil(
    student: LionPreTrainedModel,
    teacher: PreTrainedModel,
    processor: Any,
    settings: Distillation,
    folder: Path,
    seed: int,
) -> tuple[dict[str, float], list[str]]:
    """Teaches the student, in place.

    Args:
        student: the copy.
        teacher: what it was copied from.
        processor: their tokenizer or image processor.
        settings: data and stages.
        folder: for what Trainer writes on the way.
        seed: of order and masks.

    Returns:
        What `measure` finds on the validation data: "copied_..." before, "..._layers" between the
        stages and the plain names at the end; and notes.

    Raises:
        ConversionError: for data that do not fit, or a model whose answers need data of another
            kind (multiple choice).
    """
    if type(student).__name__ == "LionForMultipleChoice":
        raise ConversionError(
            "distillation of LionForMultipleChoice is not offered: its answers need questions with"
            " choices"
        )
    if settings.steps:
        check_score_dropout(student.config)
    if processor is None:
        raise ConversionError(
            "the source has no tokenizer or image processor, which distillation needs"
        )
    train, validation, collate, notes = lesson_data(student, processor, settings, seed)
    lesson = Lesson(student, teacher, settings.alpha, settings.tau)
    stages = [
        stage
        for stage, steps in (("layers", settings.layer_steps), ("answers", settings.steps))
        if steps
    ]
    # refused before anything is measured
    arguments = {stage: _arguments(stage, settings, folder, seed) for stage in stages}

    def measured() -> dict[str, float]:
        found = (
            {} if validation is None else measure(lesson, validation, collate, settings.batch_size)
        )
        return {name: round(value, 4) for name, value in found.items()}

    found = measured()
    metrics = {f"copied_{name}": value for name, value in found.items()}
    for stage in stages:
        _train(lesson, stage, train, collate, arguments[stage])
        found = measured()
        if stage == "layers":
            metrics |= {f"layers_{name}": value for name, value in found.items()}
    student.requires_grad_(True).eval().cpu()
    return metrics | found, notes


def _arguments(
    stage: str, settings: Distillation, folder: Path, seed: int
) -> "LionTrainingArguments":
    from ..training.trainer import LionTrainingArguments

    steps, rate, seed = {
        "layers": (settings.layer_steps, settings.layer_learning_rate, seed),
        "answers": (settings.steps, settings.learning_rate, seed + 1),
    }[stage]
    args = LionTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.0,
        per_device_train_batch_size=settings.batch_size,
        bf16=settings.bf16,
        seed=seed,
        logging_steps=max(steps // 10, 1),
        save_strategy="no",
        report_to="none",
    )
    # replicas on several GPUs would share the hooks on the teacher
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _train(
    lesson: Lesson, stage: str, data: Dataset, collate: Callable, args: "LionTrainingArguments"
) -> None:
    from ..training.trainer import LionTrainer

    lesson.begin(stage)
    trainer = LionTrainer(lesson, args, train_dataset=data, data_collator=collate)
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean
    trainer.train()
