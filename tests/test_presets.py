"""Every folder under configs/ is a model of the size that its name says."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

import lion_hf
from lion_hf import LionConfig

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = sorted(path.parent.name for path in CONFIGS.glob("*/config.json"))
FAMILIES = {"lit": ("lit", "raster"), "d": ("decay", "raster"), "s": ("selective", "raster")} | {
    "d-snake": ("decay", "snake"),
    "s-snake": ("selective", "snake"),
}
WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
MILLIONS = {
    "text-base": 110,
    "text-large": 335,
    "image-tiny": 5.7,
    "image-small": 22,
    "image-base": 86,
}


def parameters(build) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def test_all_presets_are_there():
    images = {f"lion-{family}-{size}-patch16-224" for family in FAMILIES for size in WIDTHS}
    assert set(PRESETS) == images | {
        f"lion-{family}-{size}" for family in ("lit", "d", "s") for size in ("base", "large")
    }


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    config = LionConfig.from_pretrained(CONFIGS / name)
    family, size = name.removeprefix("lion-").removesuffix("-patch16-224").rsplit("-", 1)
    assert (config.mask_type, config.patch_order) == FAMILIES[family]
    assert type(AutoConfig.from_pretrained(CONFIGS / name)) is LionConfig
    (architecture,) = config.architectures
    found = parameters(lambda: getattr(lion_hf, architecture)(config))
    if config.modality == "image":
        assert (config.hidden_size, config.num_attention_heads) == WIDTHS[
            size
        ] and config.num_labels == 1000
        peer = ViTForImageClassification
        peer_config = ViTConfig(
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_labels=1000,
        )
    else:
        layers = {"base": 12, "large": 24}[size]
        peer = BertForMaskedLM
        peer_config = BertConfig(
            hidden_size=config.hidden_size, num_hidden_layers=layers, num_attention_heads=16
        )
        peer_config.intermediate_size = 4 * config.hidden_size
    assert found == pytest.approx(parameters(lambda: peer(peer_config)), rel=0.01)
    assert found / 1e6 == pytest.approx(MILLIONS[f"{config.modality}-{size}"], rel=0.015)
