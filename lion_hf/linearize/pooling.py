"""Embeddings of whole texts or images, pooled as a sentence-transformers folder says."""

from pathlib import Path
from typing import Any

import torch

from .sentence_modules import SentenceModules
from .sources import read_json

# How old folders name the modes, in the order in which several are joined.
OLD_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MEAN = ("mean",)
SPECIAL_MODES = ("cls", "lasttoken")  # vectors of special tokens, which only whole texts have


def pooling_modes(modules: SentenceModules) -> tuple[str, ...]:
    """The modes of a folder's first Pooling module; the mean where there is none."""
    for entry in modules.modules[1:]:
        if entry["type"].rpartition(".")[2] == "Pooling":
            return _modes(modules.folder / entry["path"] / "config.json")
    return MEAN


def _modes(file: Path) -> tuple[str, ...]:
    settings: Any = read_json(file) if file.is_file() else {}
    settings = settings if isinstance(settings, dict) else {}
    found = settings.get("pooling_mode")
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list):
        found = [mode for name, mode in OLD_NAMES.items() if settings.get(name)]
    known = tuple(mode for mode in found if mode in OLD_NAMES.values())
    return known or MEAN


def pool(
    hidden_states: torch.Tensor, tokens: torch.Tensor | None, modes: tuple[str, ...] = MEAN
) -> torch.Tensor:
    """Pooled hidden states in float32, (B, modes * hidden).

    Args:
        hidden_states: (B, L, hidden).
        tokens: (B, L), 0 for padding; None if there is none.
        modes: as sentence-transformers names them.
    """
    states = hidden_states.float()
    if tokens is None:
        tokens = states.new_ones(states.shape[:2])
    real = (tokens != 0).to(states.dtype)[..., None]
    return torch.cat([_pooled(states, real, mode) for mode in modes], dim=-1)


def _pooled(states: torch.Tensor, real: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "cls":
        return states[:, 0]
    if mode == "max":
        return states.masked_fill(real == 0, float("-inf")).amax(1)
    if mode == "lasttoken":
        last = real[..., 0].cumsum(1).argmax(1)  # the first place with the full count
        return states[torch.arange(len(states), device=states.device), last]
    if mode == "weightedmean":
        real = real * torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
    count = real.sum(1).clamp(min=1e-9)
    if mode == "mean_sqrt_len_tokens":
        count = count.sqrt()
    return (states * real).sum(1) / count
