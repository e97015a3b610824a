"""Presets and recipes: found by name from any folder, and models of the size that the name says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.pages import ROOT
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

import lion_hf
from lion_hf import LionConfig, cli
from lion_hf.presets import find_preset, find_recipe, preset_names, recipe_names, shipped
from lion_hf.tasks import image_model, mlm, text_classifier

CONFIGS = ROOT / "configs"
# family in a preset's name -> mask_type, patch_order
FAMILIES = {
    "lit": ("lit", "raster"),
    "d": ("decay", "raster"),
    "s": ("selective", "raster"),
    "d-snake": ("decay", "snake"),
    "s-snake": ("selective", "snake"),
}
TEXT_FAMILIES = ("lit", "d", "s")
# (start of the name, size) -> layers, width, heads, millions of parameters of the decay family
SIZES = {
    ("image", "tiny"): (12, 192, 3, 5.7),
    ("image", "small"): (12, 384, 6, 22),
    ("image", "base"): (12, 768, 12, 86),
    ("text", "base"): (12, 768, 12, 110),
    ("text", "large"): (24, 1024, 16, 335),
    ("modern", "tiny"): (4, 128, 4, 4.8),
    ("modern", "small"): (8, 512, 8, 41.2),
    ("modern", "base"): (12, 768, 12, 109.3),
    ("modern", "large"): (24, 1024, 16, 335),
}


def parts(name: str) -> tuple[str, str, str]:
    """Kind, family and size of a preset, by its name."""
    family, size = name.removesuffix("-patch16-224").rsplit("-", 1)
    if name.startswith("modern-"):
        return "modern", family.removeprefix("modern-lion-"), size
    return "image" if "patch16" in name else "text", family.removeprefix("lion-"), size


def parameters(build) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def softmax_peer(config: LionConfig):
    """A BERT or ViT of the same width and depth, with MLPs four times as wide."""
    sizes = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": 4 * config.hidden_size,
    }
    if config.modality == "image":
        return ViTForImageClassification(ViTConfig(num_labels=1000, **sizes))
    return BertForMaskedLM(BertConfig(**sizes))


def test_all_presets_are_there():
    expected = set()
    for kind, size in SIZES:
        for family in FAMILIES if kind == "image" else TEXT_FAMILIES:
            start = "modern-lion" if kind == "modern" else "lion"
            end = "-patch16-224" if kind == "image" else ""
            expected.add(f"{start}-{family}-{size}{end}")
    assert set(preset_names()) == expected


@pytest.mark.parametrize("name", preset_names())
def test_preset(name):
    config = LionConfig.from_pretrained(CONFIGS / name)
    kind, family, size = parts(name)
    layers, width, heads, millions = SIZES[kind, size]
    assert (config.mask_type, config.patch_order) == FAMILIES[family]
    assert type(AutoConfig.from_pretrained(CONFIGS / name)) is LionConfig
    assert (config.num_hidden_layers, config.hidden_size) == (layers, width)
    assert config.num_attention_heads == heads
    assert (config.modality == "image") == (kind == "image")
    (architecture,) = config.architectures
    found = parameters(lambda: getattr(lion_hf, architecture)(config))
    if kind == "image":
        assert config.num_labels == 1000
    assert found == pytest.approx(parameters(lambda: softmax_peer(config)), rel=0.02)
    # Position embeddings weigh most in the smallest models.
    assert found / 1e6 == pytest.approx(millions, rel=0.03)


class TestNames:
    def test_a_preset_is_found_from_any_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("lion-s-base", "configs/lion-s-base", "configs/lion-s-base/"):
            assert Path(find_preset(name)) == shipped("configs") / "lion-s-base"

    def test_a_folder_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "lion-s-base").mkdir()
        assert find_preset("lion-s-base") == "lion-s-base"

    @pytest.mark.parametrize(
        "name", ["bert-base-uncased", "owner/lion-s-base", "outputs/lion", "lion_base_patch16_224"]
    )
    def test_names_of_others_stay(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_preset(name) == name

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [
            ("lion-s-bsae", "lion-s-base"),
            ("modern-lion-s-bas", "modern-lion-s-base"),
            ("configs/lion-d-snake-tiny", "lion-d-snake-tiny-patch16-224"),
        ],
    )
    def test_a_misspelt_preset_names_the_nearest(self, name, nearest, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=f"'{name}' is neither .*expected .*{nearest}"):
            find_preset(name)

    def test_a_recipe_is_found_from_any_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("glue", "configs/glue.yaml", "configs/glue", "glue.yaml"):
            assert Path(find_recipe(name)) == shipped("configs") / "glue.yaml"
        assert {"glue", "mlm/lion-s-base", "images/imagenet"} <= set(recipe_names())
        assert not any("accelerate" in name for name in recipe_names())

    def test_a_file_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "glue").touch()
        assert find_recipe("glue") == "glue"

    @pytest.mark.parametrize(
        ("name", "nearest"), [("glu", "glue"), ("images/imagnet.yaml", "images/imagenet")]
    )
    def test_a_misspelt_recipe_names_the_nearest(self, name, nearest):
        with pytest.raises(ValueError, match=f"neither a file nor a recipe: expected .*{nearest}"):
            find_recipe(name)

    def test_if_nothing_is_near_all_are_named(self):
        with pytest.raises(ValueError, match="expected glue, images/fashion-mnist, .*mlm/"):
            find_recipe("0")


class TestInCommands:
    """Every command that takes a model or a recipe takes it by name."""

    @pytest.mark.parametrize("command", ["mlm", "glue", "images", "linearize source output"])
    def test_a_misspelt_recipe_is_an_error_of_the_command(self, command, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command.split(), "--config", "glu"])
        last = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2
        assert last.startswith(f"lion-hf {command.split()[0]}: error: --config glu ")
        assert last.endswith("expected glue")

    def test_models_of_text(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        overrides = "num_hidden_layers=1,hidden_size=8,num_attention_heads=1,intermediate_size=8"
        config = text_classifier.load_config("lion-d-base", overrides, {}, 16)
        assert config.mask_type == "decay"
        settings = mlm.ModelSettings(model="lion-s-bsae")
        with pytest.raises(ValueError, match="lion-s-base"):
            mlm.build_model(settings, None)
        with pytest.raises(ValueError, match="lion-d-base"):
            text_classifier.load_config("lion-d-bas", None, {}, 16)

    def test_models_of_images(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        settings = image_model.ModelSettings(model="lion-d-tiny-patch16-224")
        assert image_model.find_model(settings)
        settings = image_model.ModelSettings(model="lion-d-tiny-patch16-22")
        with pytest.raises(ValueError, match="lion-d-tiny-patch16-224"):
            image_model.find_model(settings)

    @pytest.mark.slow
    def test_the_command_runs_in_another_folder(self, tmp_path):
        """A recipe's name, far from the clone: its first complaint is about the data."""
        code = "import sys; from lion_hf.cli import main; sys.exit(main(sys.argv[1:]))"
        words = ["images", "--config", "images/fashion-mnist", "--data_path", "nowhere"]
        result = subprocess.run(
            [sys.executable, "-c", code, *words, "--output_dir", "out"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode != 0 and "nowhere" in result.stderr.splitlines()[-1]
        assert not list(tmp_path.iterdir())
