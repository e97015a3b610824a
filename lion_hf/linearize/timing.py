"""From which length LION is faster than its source, on the machine that this runs on."""

import copy
import time
from typing import Any, NamedTuple

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from ..modeling.configuration_lion import LionConfig
from ..modeling.modeling_lion import LionModel
from ..training.speed import synchronizer

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TOKENS = 4096  # per timed call, in rows of one length
LAYERS = 2  # that are timed: the ratio is that of all layers, and the time is short
MOST_REPEATS = 5


class Times(NamedTuple):
    """Seconds for `TOKENS` tokens in rows of a length.

    Args:
        length: tokens per row.
        source: of the softmax model.
        lion: of the copy.
    """

    length: int
    source: float
    lion: float


@torch.no_grad()
def compare_speeds(
    source: PreTrainedConfig, lion: LionConfig, seconds: float, device: torch.device
) -> list[Times]:
    """Times two of the layers of both models, with random weights, at growing lengths.

    The source's positions end at its longest text; for this comparison it gets more of them. The
    source runs with torch's fused attention (sdpa).

    Args:
        source: configuration of the softmax model.
        lion: configuration of the copy.
        seconds: after which no further length is begun.
        device: of both.

    Returns:
        One entry per length, at least one.
    """
    began, found = time.monotonic(), list[Times]()
    for length in LENGTHS:
        started = time.monotonic()
        text = lion.modality == "text"
        models = [_model(_small(config), length, text, device) for config in (source, lion)]
        inputs = _inputs(models[1], length, device)
        found.append(Times(length, *(_best(model, inputs, seconds) for model in models)))
        now = time.monotonic()
        if now - began + 2 * (now - started) > seconds:  # the next one takes about twice as long
            break
    return found


def faster_from(times: list[Times]) -> int | None:
    """The length from which on LION was faster at all longer ones too; None if it was not."""
    found = None
    for entry in reversed(times):
        if entry.lion >= entry.source:
            break
        found = entry.length
    return found


def _small(config: Any) -> Any:
    """A copy of a configuration with fewer layers, even if it names some (`out_features`)."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = LAYERS
    return config


def _model(config: Any, length: int, text: bool, device: torch.device) -> PreTrainedModel:
    """A random model for rows of a length."""
    if text:
        room = length + 2 + (config.pad_token_id or 0)  # RoBERTa's begin behind the padding's
        config.max_position_embeddings = max(config.max_position_embeddings, room)
    else:
        patch = config.patch_size
        side = patch if isinstance(patch, int) else patch[0]
        config.image_size = side * max(round(length**0.5), 1)
    if isinstance(config, LionConfig):
        return LionModel(config).to(device).eval()
    options = {"attn_implementation": "sdpa", "dtype": torch.float32}
    return AutoModel.from_config(config, **options).to(device).eval()


def _inputs(lion: Any, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    rows, config = max(TOKENS // length, 1), lion.config
    if config.modality == "text":
        ids = torch.randint(0, config.vocab_size, (rows, length), device=device)
        return {"input_ids": ids}
    height, width = config.image_height_width
    pixels = torch.randn(rows, config.num_channels, height, width, device=device)
    return {"pixel_values": pixels}


def _best(model: PreTrainedModel, inputs: dict[str, torch.Tensor], seconds: float) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    device = next(iter(inputs.values())).device
    synchronize = synchronizer(device)
    best, end = float("inf"), time.monotonic() + seconds / (4 * len(LENGTHS))
    for repeat in range(1 + MOST_REPEATS):
        start = time.monotonic()
        model(**inputs)
        synchronize()
        best = min(best, time.monotonic() - start) if repeat else best
        if repeat and time.monotonic() > end:
            break
    return best
