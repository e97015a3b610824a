"""A LION copy beside the softmax model that teaches it: the loss of each stage, and how near they
are."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..modeling.lion_convolution import Grid, convolution_layout
from ..modeling.modeling_lion import LionPreTrainedModel
from .copying import source_positions
from .families import FAMILIES, without_distillation_token
from .losses import (
    answer_loss,
    class_logits,
    hidden_state_loss,
    problem_type,
    relative_error,
    state_scales,
)
from .pooling import MEAN, SPECIAL_MODES, pool
from .softmax_models import source_name, theirs_in

ATTENTION, EMBEDDINGS = ".attention.", ".embeddings."  # in the names of parameters
REST_RATE = 0.3  # of the attention's learning rate, for what was copied as it is
# Weight of what comes out, beside the hidden states: with 1, encoders and classifiers came less
# near to their source in the same time (benchmarks/results/linearize.md).
ANSWERS = 0.1
MOST_COMPARED = 1000  # samples whose pairs are compared


class Lesson(nn.Module):
    """A student beside its frozen teacher; calling it with a batch gives the loss of a stage.

    Args:
        student: copy of the teacher by `linearize_model`.
        teacher: the softmax model.
        alpha: weight of the teacher's answers; the rest is that of the student's own loss, where
            there are labels.
        tau: temperature of the answers.
        pooling: how embeddings of whole texts are made, as sentence-transformers names it.
        window: tokens that the teacher reads at once, special ones included; by default as many as
            it takes.
    """

    def __init__(
        self,
        student: LionPreTrainedModel,
        teacher: PreTrainedModel,
        alpha: float = 1.0,
        tau: float = 1.0,
        pooling: tuple[str, ...] = MEAN,
        window: int | None = None,
    ):
        super().__init__()
        self.pooling = pooling
        config = student.config
        self.scales = torch.ones(config.num_hidden_layers, config.hidden_size)
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.alpha, self.tau, self.stage = alpha, tau, "layers"
        self._seen: dict[str, list[torch.Tensor]] = {"input": [], "output": []}
        self.family = FAMILIES[teacher.config.model_type]
        longest = self.longest_text
        self.window = longest if window is None or longest is None else min(window, longest)
        for n in range(student.config.num_hidden_layers):
            first = source_name(f"lion.layers.{n}.attention.q_proj", teacher)
            last = _attention_output(n, teacher)
            teacher.get_submodule(first).register_forward_pre_hook(
                lambda _m, args: self._seen["input"].append(args[0])
            )
            teacher.get_submodule(last).register_forward_hook(
                lambda _m, _a, output: self._seen["output"].append(output)
            )

    @property
    def longest_text(self) -> int | None:
        """Tokens that the teacher takes; None for images. The student may take more."""
        return source_positions(self.teacher.config)

    def begin(self, stage: str) -> None:
        """Makes a stage's parameters trainable.

        These are the attention's for "layers", and for the others all but the embeddings, which
        fit as they are.
        """
        self.stage = stage
        for name, parameter in self.student.named_parameters():
            trained = ATTENTION in name if stage == "layers" else EMBEDDINGS not in f".{name}"
            parameter.requires_grad_(trained)

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The parameters that a stage trains, with the factors of their learning rates.

        The attention is new and learns fastest.
        """
        named = [x for x in self.student.named_parameters() if x[1].requires_grad]
        attention = [parameter for name, parameter in named if ATTENTION in name]
        rest = [parameter for name, parameter in named if ATTENTION not in name]
        return [(attention, 1.0)] + [(rest, REST_RATE)] * bool(rest)

    def train(self, mode: bool = True) -> "Lesson":
        """Dropout would hide from the student what the teacher says: both are in evaluation."""
        super().train(mode)
        self.teacher.eval()
        self.student.eval()
        return self

    def scale(self, batch: dict[str, torch.Tensor]) -> None:
        """Measures how much the teacher's hidden states vary, on a batch, for the second stage."""
        given = {name: x for name, x in batch.items() if name != "labels"}
        answers = self.ask(given)[0]
        self.scales = state_scales(answers.hidden_states[1:], given.get("attention_mask"))

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if "passages" in batch:
            return {"loss": self.read_document(**batch).loss(self.scales)}
        labels = batch.pop("labels", None)
        answers, hidden_states, targets = self.ask(batch)
        if self.stage == "layers":
            return {"loss": self.layer_errors(batch, hidden_states, targets).mean()}
        outputs = self.look(batch, labels)
        return {"loss": self.answers_loss(batch, labels, answers, outputs)}

    def read_document(self, input_ids: torch.Tensor, passages: torch.Tensor) -> "DocumentStates":
        """Reads a document in one pass of the student, its passages one by one by the teacher.

        Args:
            input_ids: (1, 1 + N P + 1), between the two special tokens N passages of P tokens.
            passages: N, (1,).
        """
        inner, count = input_ids[:, 1:-1], int(passages[0])
        first, last = (x.expand(count, 1) for x in (input_ids[:, :1], input_ids[:, -1:]))
        answers = self.ask({"input_ids": torch.cat([first, inner.view(count, -1), last], 1)})[0]
        outputs = self.student(input_ids=input_ids, output_hidden_states=True)
        return DocumentStates(outputs, answers, count, self.pooling)

    def look(self, batch: dict[str, torch.Tensor], labels: torch.Tensor | None) -> Any:
        """The student's outputs with hidden states, and with its own loss where that counts."""
        own = {"labels": labels} if labels is not None and self.alpha < 1 else {}
        return self.student(**batch, **own, output_hidden_states=True)

    def answers_loss(
        self,
        batch: dict[str, torch.Tensor],
        labels: torch.Tensor | None,
        answers: Any,
        outputs: Any,
    ) -> torch.Tensor:
        """The loss of the second stage: distances of hidden states, and of what comes out.

        For encoders that is the cosine of the pooled embeddings. It counts little: see `ANSWERS`.

        Args:
            batch: what both models were given.
            labels: of the batch, if it has any.
            answers: the teacher's outputs.
            outputs: the student's.
        """
        given = batch if labels is None else batch | {"labels": labels}
        tokens = batch.get("attention_mask")
        states = (outputs.hidden_states[1:], answers.hidden_states[1:])
        hidden = hidden_state_loss(*states, self.scales, tokens).mean()
        if type(self.student).__name__ == "LionModel":
            mine, theirs = (
                pool(x.last_hidden_state, tokens, self.pooling) for x in (outputs, answers)
            )
            answered = (1 - nn.functional.cosine_similarity(mine, theirs)).mean()
        else:
            answered = answer_loss(self.student, outputs, answers, given, tau=self.tau)
        loss = hidden + ANSWERS * answered
        if labels is None or self.alpha == 1:
            return loss
        return self.alpha * loss + (1 - self.alpha) * outputs.loss

    @torch.no_grad()
    def ask(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
        """The teacher's outputs, and inputs and outputs of its attentions, (B, L, hidden).

        All are without the tokens that the student does not have.
        """
        for seen in self._seen.values():
            seen.clear()
        outputs = self.teacher(**batch, output_hidden_states=True)
        cut = without_distillation_token if self.family.second_token else lambda x: x
        if "last_hidden_state" in outputs:
            outputs["last_hidden_state"] = cut(outputs.last_hidden_state)
        outputs["hidden_states"] = tuple(map(cut, outputs.hidden_states))
        hidden_states, targets = (
            [cut(x) for x in self._seen[name]] for name in ("input", "output")
        )
        return outputs, hidden_states, targets

    def layer_errors(
        self, batch: dict, hidden_states: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> torch.Tensor:
        """`relative_error` of each layer's attention, (layers,), given the teacher's inputs."""
        encoder, tokens = self.student.base_model, batch.get("attention_mask")
        options: dict[str, Any] = {"attention_mask": tokens}
        if "pixel_values" in batch:
            options["order"] = encoder.embeddings.reading_orders(batch["pixel_values"])
            options["conv_layout"] = Grid(*encoder.embeddings.patch_grid(batch["pixel_values"]))
        elif (width := encoder.config.conv_kernel_size) is not None and hidden_states:
            rows = hidden_states[0].shape[0], hidden_states[0].shape[1]
            options["conv_layout"] = convolution_layout(width, rows, tokens, None)
        errors = []
        for layer, x, target in zip(encoder.layers, hidden_states, targets):
            output, _ = layer.attention(x, **options)
            errors.append(relative_error(output, target, tokens))
        return torch.stack(errors)


class DocumentStates(NamedTuple):
    """What student and teacher made of a document: see `Lesson.read_document`.

    Args:
        outputs: the student's, of the document.
        answers: the teacher's, of its passages.
        passages: their number.
        pooling: as sentence-transformers names it.
    """

    outputs: Any
    answers: Any
    passages: int
    pooling: tuple[str, ...]

    def loss(self, scales: torch.Tensor) -> torch.Tensor:
        """Distances of the tokens' states, of the passages' vectors and of the document's."""
        mine = [x[:, 1:-1] for x in self.outputs.hidden_states[1:]]
        theirs = [x[:, 1:-1].reshape(1, -1, x.shape[-1]) for x in self.answers.hidden_states[1:]]
        states = hidden_state_loss(mine, theirs, scales, None).mean()
        return states + ANSWERS * sum(1 - x for x in self.cosines().values())

    def cosines(self) -> dict[str, torch.Tensor]:
        """The mean cosines of the passages' vectors and of the document's with the teacher's.

        The teacher's vector of a document is the mean of its passages', each of length one. Where
        vectors are those of special tokens, passages of a single pass have none.
        """
        states, targets = (x.last_hidden_state for x in (self.outputs, self.answers))
        found = {}
        modes = tuple(x for x in self.pooling if x not in SPECIAL_MODES)
        if modes:
            mine = states[0, 1:-1].view(self.passages, -1, states.shape[-1])
            pair = pool(mine, None, modes), pool(targets, None, modes)
            found["passage_cosine"] = nn.functional.cosine_similarity(*pair).mean()
        units = nn.functional.normalize(pool(targets, None, self.pooling), dim=-1)
        mine = pool(states, None, self.pooling)
        found["document_cosine"] = nn.functional.cosine_similarity(mine[0], units.mean(0), dim=0)
        return found


def _attention_output(layer: int, teacher: PreTrainedModel) -> str:
    """The teacher's module whose output is an attention's."""
    row = FAMILIES[teacher.config.model_type].attention_output
    if row.startswith("lion."):
        return source_name(row.format(n=layer), teacher)
    return theirs_in(row, layer, teacher)


class Measurement(NamedTuple):
    """How near a student is to its teacher on some data.

    Args:
        figures: as `measure` returns them, and the stage's `loss`.
        layer_errors: the error of each layer's attention.
        embeddings: pooled, of the student and of the teacher, (samples, hidden); empty for models
            with a head.
    """

    figures: dict[str, float]
    layer_errors: list[float]
    embeddings: tuple[torch.Tensor, ...] = ()


@torch.no_grad()
def examine_documents(lesson: Lesson, documents: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean cosines of `DocumentStates`, and in the stage "documents" its `loss`.

    Args:
        lesson: student and teacher.
        documents: batches of one.
    """
    device, sums = next(lesson.student.parameters()).device, defaultdict[str, float](float)
    for batch in documents:
        found = lesson.read_document(**{name: x.to(device) for name, x in batch.items()})
        figures = found.cosines()
        if lesson.stage == "documents":
            figures["loss"] = found.loss(lesson.scales)
        for name, value in figures.items():
            sums[name] += value.item() / len(documents)
    return dict(sums)


def measure(lesson: Lesson, data: Dataset, collate: Callable, batch_size: int) -> dict[str, float]:
    """How near the student is to its teacher.

    Returns:
        `layer_error`, the mean relative squared error of the attentions. For encoders also
        `cosine`, between the pooled embeddings of student and teacher. For classes `agreement`,
        the share of samples (or masked tokens) with the teacher's class, and with labels
        `accuracy` and `teacher_accuracy`. Where a sample has several labels, `agreement` is the
        share of all labels that both give or both do not give.
    """
    figures = examine(lesson, data, collate, batch_size).figures
    return {name: value for name, value in figures.items() if name != "loss"}


@torch.no_grad()
def examine(lesson: Lesson, data: Dataset, collate: Callable, batch_size: int) -> Measurement:
    """As `measure`, with the loss of the lesson's stage, errors by layer and embeddings."""
    training = lesson.training
    lesson.eval()
    device = next(lesson.student.parameters()).device
    sums: defaultdict[str, float] = defaultdict(float)
    errors = torch.zeros(lesson.student.config.num_hidden_layers, device=device)
    embeddings: list[tuple[torch.Tensor, ...]] = []
    for batch in DataLoader(data, batch_size, collate_fn=collate):
        batch = {name: x.to(device) for name, x in batch.items()}
        labels = batch.pop("labels", None)
        answers, *layers = lesson.ask(batch)
        rows = len(layers[0][0])
        sums["rows"] += rows
        found = lesson.layer_errors(batch, *layers)
        errors += found * rows
        outputs = lesson.look(batch, labels)
        loss = (
            found.mean()
            if lesson.stage == "layers"
            else lesson.answers_loss(batch, labels, answers, outputs)
        )
        sums["loss"] += loss.item() * rows
        if type(lesson.student).__name__ == "LionModel":
            both = (outputs.last_hidden_state, answers.last_hidden_state)
            tokens = batch.get("attention_mask")
            mine, theirs = (pool(x, tokens, lesson.pooling) for x in both)
            sums["cosine"] += nn.functional.cosine_similarity(mine, theirs).sum().item()
            embeddings.append((mine.cpu(), theirs.cpu()))
        _compare_classes(lesson.student, batch, labels, (outputs, answers), sums)
    lesson.train(training)
    errors = errors / sums["rows"]
    result = {name: sums[name] / sums["rows"] for name in ("loss", "cosine") if name in sums}
    result["layer_error"] = errors.mean().item()
    names = [name for name in ("agreement", "accuracy", "teacher_accuracy") if name in sums]
    result |= {name: sums[name] / sums["samples"] for name in names if sums["samples"]}
    return Measurement(result, errors.tolist(), tuple(map(torch.cat, zip(*embeddings))))


def _compare_classes(
    student: LionPreTrainedModel,
    batch: dict[str, torch.Tensor],
    labels: torch.Tensor | None,
    models: tuple[Any, Any],
    sums: dict[str, float],
) -> None:
    """Adds a batch's equal classes to the sums; `models` are student's and teacher's outputs."""
    outputs, answers = models
    targets, kind = class_logits(answers), problem_type(student)
    if targets is None or kind == "regression":
        return
    if kind == "multi_label_classification":
        same = (outputs.logits > 0) == (targets > 0)
        sums["samples"] += same.numel()
        sums["agreement"] += same.sum().item()
        return
    chosen = torch.ones(targets.shape[:-1], dtype=torch.bool, device=targets.device)
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


def retrieval(embeddings: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """What the distances between texts keep of the teacher's.

    Args:
        embeddings: of student and teacher, (samples, hidden).

    Returns:
        `retrieval`, the share of samples whose own embedding by the teacher is the nearest of all
        the teacher's; `similarity`, Spearman's correlation of the similarities of all pairs.
        Nothing for fewer than three samples.
    """
    if not embeddings or len(embeddings[0]) < 3:
        return {}
    mine, theirs = (nn.functional.normalize(x[:MOST_COMPARED], dim=-1) for x in embeddings)
    scores = mine @ theirs.T
    found = (scores.diagonal() >= scores.amax(1) - 1e-6).float().mean().item()
    return {"retrieval": found, "similarity": rank_correlation(mine, theirs)}


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's correlation of the cosines of all pairs, between embeddings of (N, D) each."""
    above = torch.triu_indices(len(first), len(first), offset=1)
    units = [nn.functional.normalize(x, dim=-1) for x in (first, second)]
    ranks = [(x @ x.T)[above[0], above[1]].argsort().argsort().double() for x in units]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()
