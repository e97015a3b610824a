"""What "auto" stands for: the form of a call and the size of its chunks, and `explain`."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_lion import FORMS_WITHOUT_SCORES, WIDER_FEATURE_MAPS


class Choice(NamedTuple):
    """What "auto" stands for, and why."""

    form: str
    reason: str


BELOW_HEAD_DIM = "head_dim - 1"


class FormRow(NamedTuple):
    """A row of `AUTO_FORMS`: for which calls a form is chosen, and why."""

    decays: bool
    gradients: bool | None  # None: with or without
    device: str  # "": any
    longest: int | str | None  # tokens per row, or BELOW_HEAD_DIM; None for any length
    form: str
    reason: str


class ChunkRow(NamedTuple):
    """A row of `CHUNK_SIZES`: for which rows a chunk size is chosen, and why."""

    device: str  # "": any
    longest: int | None  # tokens per row; None for any length
    size: int
    reason: str


# The first row that fits is taken.
# Source: benchmarks/results/chunks-cpu.md and chunks-cpu-bfloat16.md (12 heads of 64, 1 and 16
# rows); for training, short-rows-cpu.md.
AUTO_FORMS = (
    FormRow(False, None, "", BELOW_HEAD_DIM, "attention",
            "without decay a row below head_dim costs least as scores"),
    FormRow(False, None, "", None, "chunk",
            "without decay one state of size head_dim x head_dim serves the whole row"),
    FormRow(True, False, "cpu", 16, "attention",
            "up to 16 tokens it takes 0.8 to 1.1 times one chunk's time"),
    FormRow(True, True, "cpu", 32, "chunk",
            "batches of short rows train in 0.7 to 0.9 times the time of the attention form"),
    FormRow(True, None, "", None, "chunk", "it is the fastest of all but short rows"),
)  # fmt: skip
# Tokens per chunk, likewise. A row of one chunk needs no states. Forward passes and training agree.
CHUNK_SIZES = (
    ChunkRow("cpu", 256, 256,
             "one chunk needs no states: 0.7 to 0.9 times the time of chunks of 128 (measured at"
             " 197 and 256 tokens)"),
    ChunkRow("cpu", None, 128,
             "measured: 64 takes up to 1.1 times as long and stores twice the states, 256 up to 1.3"
             " times"),
    ChunkRow("cuda", 512, 512,
             "one chunk needs no states, which take more launches and memory than they spare (not"
             " measured)"),
    ChunkRow("", None, 256, "larger products and fewer launches than on a CPU (not measured)"),
)  # fmt: skip


def choose_form(
    length: int,
    head_dim: int,
    decays: bool = True,
    scores: bool = False,
    device_type: str = "cpu",
    gradients: bool = False,
) -> Choice:
    """The form that "auto" stands for; `CHUNK_SIZES` in lion_choice.py says how large chunks are.

    The data type does not enter: the measured crossovers of float32 and bfloat16 are nearly equal.

    Args:
        length: tokens per row.
        head_dim: size of a head.
        decays: whether there are gates, or documents, which gates of 0 keep apart.
        scores: whether the scores themselves are needed, for attention maps or dropout.
        device_type: as in `torch.device.type`.
        gradients: whether a backward pass will follow.
    """
    if scores:
        return Choice(
            "attention",
            "maps and score dropout (attention_probs_dropout_prob in training) need the scores",
        )
    for row in AUTO_FORMS:
        fits = row.decays == decays and row.gradients in (None, gradients)
        fits = fits and row.device in ("", device_type)
        longest = head_dim - 1 if isinstance(row.longest, str) else row.longest
        # A traced length may stand for any length.
        if fits and (longest is None or (not torch.compiler.is_compiling() and length <= longest)):
            return Choice(row.form, row.reason)
    raise AssertionError("the last row of AUTO_FORMS fits everything")


def default_chunk_size(length: int, device_type: str) -> tuple[int, str]:
    """Tokens per chunk for rows of a length on a device, and why."""
    for row in CHUNK_SIZES:
        if row.device in ("", device_type) and (row.longest is None or length <= row.longest):
            return row.size, row.reason
    raise AssertionError("the last row of CHUNK_SIZES fits everything")


def check_score_dropout(config: PreTrainedConfig) -> None:
    """Checks that a model can be trained with the form and the score dropout of its configuration.

    Args:
        config: the configuration of any model; one without the fields of `LionConfig` passes.

    Raises:
        ValueError: if scores are to be dropped in a form that does not store them.
    """
    form = getattr(config, "attention_form", "auto")
    dropout = getattr(config, "attention_probs_dropout_prob", 0)
    if dropout and form in FORMS_WITHOUT_SCORES:
        raise ValueError(
            score_dropout_error(attention_probs_dropout_prob=dropout, attention_form=form)
        )


def score_dropout_error(**values: float | str) -> str:
    """Says that a form cannot drop scores, given the dropout and the form by their names."""
    got = " with ".join(f"{name}={value!r}" for name, value in values.items())
    return (
        f"{got}: this form stores no scores to drop; expected the form 'attention', which 'auto'"
        " then picks, or a dropout of 0 (attention_probs_dropout_prob in the config)"
    )


def why_quadratic(config: Any) -> str | None:
    """Says which setting makes training quadratic in the length, and what it costs.

    Args:
        config: the configuration of any model.

    Returns:
        A sentence, or None for a LION that trains in linear time, and for other models.
    """
    if getattr(config, "model_type", None) != "lion":
        return None
    dropout = config.attention_probs_dropout_prob
    if config.attention_form == "auto" and dropout:
        setting = (
            f"attention_probs_dropout_prob={dropout} drops scores out, so attention_form='auto'"
        )
        cure = "attention_probs_dropout_prob=0"
    elif config.attention_form == "attention":
        setting = "attention_form='attention'"
        cure = "attention_form='auto', without score dropout,"
    else:
        return None
    return (
        f"{setting} trains in the attention form: its time grows with the square of the length;"
        f" {cure} trains in linear time"
    )


def explain(
    config: PreTrainedConfig | PreTrainedModel,
    length: int,
    device: str = "cpu",
    training: bool = False,
    output_attentions: bool = False,
) -> str:
    """Says in which form a model computes rows of a length, and why.

    Args:
        config: a `LionConfig` or a model.
        length: tokens per row, the class token of an image included.
        device: the device, such as "cpu" or "cuda:0".
        training: whether the model is in training mode.
        output_attentions: whether attention maps are asked for.

    Raises:
        ValueError: for anything but a configuration or model of LION, a length below 1, or a device
            that torch does not know.

    Example:
        >>> print(lion_hf.explain(model, 4096))
        4096 tokens on cpu: chunk form, because it is the fastest of all but short rows; 32 ...
    """
    fields: Any = getattr(config, "config", config)
    if getattr(fields, "model_type", None) != "lion":
        got = type(fields).__name__
        raise ValueError(f"config is a {got}: expected a LionConfig or one of its models")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"length={length!r}: expected an integer of at least 1")
    try:
        device_type = torch.device(device).type
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"device={device!r}: expected a device of torch, such as 'cpu' or 'cuda'"
        ) from error
    scores = output_attentions or (training and fields.attention_probs_dropout_prob > 0)
    decays = fields.mask_type != "lit"
    features = fields.head_dim * (1 + (fields.feature_map in WIDER_FEATURE_MAPS))
    form, reason = choose_form(length, features, decays, scores, device_type, training)
    if fields.attention_form != "auto" and not output_attentions:
        form, reason = fields.attention_form, f"attention_form={fields.attention_form!r} is set"
    answer = f"{length} tokens on {device_type}: {form} form, because {reason}"
    if form == "chunk" and decays:
        answer += f"; {_explain_chunks(length, device_type, fields.chunk_size)}"
    return answer


def _explain_chunks(length: int, device_type: str, chunk_size: int | None) -> str:
    size, reason = default_chunk_size(length, device_type)
    if chunk_size is not None:
        size, reason = chunk_size, f"chunk_size={chunk_size} is set"
    count = -(-length // size)
    plural = "s" * (count > 1)
    return f"{count} chunk{plural} of {min(size, length)} tokens, because {reason}"
