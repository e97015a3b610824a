"""Distillation: the loss, and teaching a LION copy of a softmax model first layer by layer, then by its answers.

`lion_hf.linearize` makes the copy and calls `distil`.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..convert.errors import ConversionError
from ..modeling.modeling_lion import LionPreTrainedModel
from .softmax_models import source_name, without_distillation_token

if TYPE_CHECKING:
    from ..training.trainer import LionTrainingArguments

from .settings import Distillation


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str, tau: float
) -> torch.Tensor:
    """Loss of a student against its teacher for every sample, (B,).

    Args:
        logits: the student's, (B, C).
        teacher_logits: (B, C).
        kind: "hard" for cross-entropy with the teacher's class, "soft" for tau^2 times the Kullback-Leibler divergence of the
            softened probabilities (arXiv 1503.02531).
        tau: temperature of "soft".
    """
    logits, teacher_logits = logits.float(), teacher_logits.float()
    if kind == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(-1), reduction="none")
    student, teacher = (F.log_softmax(x / tau, dim=-1) for x in (logits, teacher_logits))
    return tau**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def relative_error(
    output: torch.Tensor, target: torch.Tensor, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error over squared target, of tokens (B, L) that are not 0 only; outputs and targets are (B, L, ...)."""
    error, power = (output.float() - target.float()).square(), target.float().square()
    if tokens is not None:
        real = (tokens != 0)[..., None]
        error, power = error * real, power * real
    return error.sum() / power.sum().clamp(min=1e-12)


class Lesson(nn.Module):
    """A student beside its frozen teacher; calling it with a batch gives the loss of a stage.

    Args:
        student: copy of the teacher by `linearize_model`.
        teacher: the softmax model.
        alpha: weight of the teacher's answers; the rest is that of the student's own loss, where there are labels.
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
        for n in range(student.config.num_hidden_layers):
            first, last = (
                source_name(f"lion.layers.{n}.attention.{name}", teacher)
                for name in ("q_proj", "o_proj")
            )
            teacher.get_submodule(first).register_forward_pre_hook(
                lambda _m, args: self._seen["input"].append(args[0])
            )
            teacher.get_submodule(last).register_forward_hook(
                lambda _m, _a, output: self._seen["output"].append(output)
            )

    def begin(self, stage: str) -> None:
        """Makes the parameters of a stage trainable: "layers", those of the attention only, or "answers", all."""
        self.stage = stage
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(stage == "answers" or ".attention." in name)

    def train(self, mode: bool = True) -> "Lesson":
        """The teacher never drops anything out, nor does the student while its layers are compared."""
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
        loss = self.answer_loss(outputs, answers, batch, labels)
        return {
            "loss": loss if own is None else self.alpha * loss + (1 - self.alpha) * outputs.loss
        }

    @torch.no_grad()
    def ask(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
        """The teacher's outputs, and what goes into and comes out of each of its attentions, (B, L, hidden)."""
        for seen in self._seen.values():
            seen.clear()
        outputs = self.teacher(**batch)
        cut = (
            without_distillation_token if self.teacher.config.model_type == "deit" else lambda x: x
        )
        hidden_states, targets = (
            [cut(x) for x in self._seen[name]] for name in ("input", "output")
        )
        return outputs, hidden_states, targets

    def layer_errors(
        self, batch: dict, hidden_states: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> torch.Tensor:
        """`relative_error` of each layer's attention, (layers,), all given the teacher's hidden states."""
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

    def answer_loss(
        self, outputs: Any, answers: Any, batch: dict, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """How far the student's outputs are from the teacher's: divergence of classes, else relative error."""
        head, tokens = type(self.student).__name__, batch.get("attention_mask")
        if head == "LionModel":
            target = answers.last_hidden_state
            target = (
                without_distillation_token(target)
                if self.teacher.config.model_type == "deit"
                else target
            )
            return relative_error(outputs.last_hidden_state, target, tokens)
        if head == "LionForMaskedImageModeling":
            return relative_error(outputs.reconstruction, answers.reconstruction)
        if head == "LionForQuestionAnswering":
            pairs = [
                (outputs.start_logits, answers.start_logits),
                (outputs.end_logits, answers.end_logits),
            ]
            if tokens is not None:
                pairs = [tuple(x.masked_fill(tokens == 0, -1e4) for x in pair) for pair in pairs]
            first, last = (distillation_loss(*pair, "soft", self.tau).mean() for pair in pairs)
            return first + last
        logits, targets = outputs.logits, _logits(answers)
        assert targets is not None  # the answers of a teacher with a head
        kind = problem_type(self.student)
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits.float(), targets.float().sigmoid())
        if kind == "regression":
            return F.mse_loss(logits.float(), targets.float())
        if head == "LionForMaskedLM":
            masked = labels != -100
            logits, targets = logits[masked], targets[masked]
        elif head == "LionForTokenClassification" and tokens is not None:
            real = tokens != 0
            logits, targets = logits[real], targets[real]
        losses = distillation_loss(logits.flatten(0, -2), targets.flatten(0, -2), "soft", self.tau)
        return losses.mean() if losses.numel() else losses.sum()


def problem_type(student: LionPreTrainedModel) -> str:
    """What the logits of a model are: of "single_label_classification", "multi_label_classification" or "regression"."""
    config = student.config
    if type(student).__name__ not in (
        "LionForSequenceClassification",
        "LionForImageClassification",
    ):
        return "single_label_classification"
    return config.problem_type or (
        "regression" if config.num_labels == 1 else "single_label_classification"
    )


def _logits(outputs: Any) -> torch.Tensor | None:
    """Logits of classes; `BertForPreTraining` has two kinds."""
    return outputs.get("prediction_logits", outputs.get("logits"))


@torch.no_grad()
def measure(lesson: Lesson, data: Dataset, collate: Callable, batch_size: int) -> dict[str, float]:
    """How near the student is to its teacher.

    Returns:
        `layer_error`, the mean relative squared error of the attentions; for classes also `agreement`, the share of samples (or
        masked tokens) with the teacher's class, and with labels `accuracy` and `teacher_accuracy`. Where a sample has several
        labels, `agreement` is the share of all labels that both give or both do not give.
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
        targets = _logits(answers)
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
        What `measure` finds on the validation data: "copied_..." before, "..._layers" between the stages and the plain names
        at the end; and notes.

    Raises:
        ConversionError: for data that do not fit, or a model whose answers need data of another kind (multiple choice).
    """
    from .data import lesson_data

    if type(student).__name__ == "LionForMultipleChoice":
        raise ConversionError(
            "distillation of LionForMultipleChoice is not offered: its answers need questions with choices"
        )
    form, dropout = student.config.attention_form, student.config.attention_probs_dropout_prob
    if settings.steps and form in ("chunk", "recurrent") and dropout:
        raise ConversionError(
            f"attention_form={form!r} with the source's attention_probs_dropout_prob={dropout}: only 'attention', which 'auto'"
            " picks in training, keeps scores to drop. Leave attention_form out and set it on the model that was made"
        )
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
    arguments = {
        stage: _arguments(stage, settings, folder, seed) for stage in stages
    }  # refused before anything is measured

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
    args._n_gpu = min(
        args.n_gpu, 1
    )  # replicas on several GPUs would share the hooks on the teacher
    return args


def _train(
    lesson: Lesson, stage: str, data: Dataset, collate: Callable, args: "LionTrainingArguments"
) -> None:
    from ..training.trainer import LionTrainer

    lesson.begin(stage)
    trainer = LionTrainer(lesson, args, train_dataset=data, data_collator=collate)
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean
    trainer.train()
