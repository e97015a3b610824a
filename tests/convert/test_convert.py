"""Conversion of original checkpoints: what a file tells, options, names, shapes, the command."""

import collections
import datetime
import pathlib
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import (
    CLASSIFIER,
    IMAGE,
    LIT_IMAGE,
    LIT_TEXT,
    TEXT,
    content_of,
    file_of,
    refused,
    saved,
    weights_of,
)
from transformers import AutoImageProcessor, AutoTokenizer, BertTokenizer

import lion_hf
from lion_hf.cli import main

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lion")


@pytest.fixture
def output(tmp_path) -> Path:
    """A folder to write to, which is not there yet, alone in its parent."""
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "model"


class TestWhatTheFileTells:
    @pytest.mark.parametrize(
        ("case", "architecture", "fields"),
        [
            (
                IMAGE,
                "LionForImageClassification",
                {
                    "modality": "image",
                    "mask_type": "selective",
                    "patch_order": "snake",
                    "hidden_size": 48,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 3,
                    "intermediate_size": 192,
                    "image_size": 64,
                    "patch_size": 16,
                    "num_channels": 3,
                    "use_position_embeddings": True,
                    "classifier_pooling": "mean",
                    "num_labels": 10,
                },
            ),
            (
                "vision-decay-normal-cls",
                "LionForImageClassification",
                {
                    "mask_type": "decay",
                    "patch_order": "raster",
                    "use_position_embeddings": False,
                    "classifier_pooling": "cls",
                    "image_size": 64,
                },
            ),
            (
                TEXT,
                "LionForMaskedLM",
                {
                    "modality": "text",
                    "mask_type": "selective",
                    "vocab_size": 97,
                    "hidden_size": 64,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 4,
                    "intermediate_size": 128,
                    "type_vocab_size": 2,
                    "use_position_embeddings": False,
                    "attention_norm": False,
                    "tie_word_embeddings": True,
                    "layer_norm_eps": 1e-12,
                },
            ),
            (
                LIT_TEXT,
                "LionForMaskedLM",
                {
                    "mask_type": "lit",
                    "max_position_embeddings": 64,
                    "use_position_embeddings": True,
                    "attention_norm": True,
                    "num_attention_heads": 4,
                },
            ),
            (CLASSIFIER, "LionForSequenceClassification", {"mask_type": "decay", "num_labels": 3}),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_sizes_and_options(self, output, case, architecture, fields):
        conversion = lion_hf.convert_checkpoint(file_of(case), output)
        assert (conversion.folder, conversion.architecture) == (output, architecture)
        config = lion_hf.LionConfig.from_pretrained(output)
        assert {name: getattr(config, name) for name in fields} == fields
        assert config.architectures == [architecture]

    def test_stored_settings_of_text(self, output, tmp_path):
        content = content_of(CLASSIFIER)
        stored = content["state"]["integrations"]["huggingface"]["model"]["config"]["content"]
        stored |= {"hidden_dropout_prob": 0.25, "layer_norm_eps": 1e-7, "arch_type": "nova"}
        stored["id2label"] = {"0": "no", "1": "maybe", "2": "yes"}
        config = lion_hf.convert_checkpoint(saved(content, tmp_path / "file.pt"), output).config
        assert (config.hidden_dropout_prob, config.layer_norm_eps) == (0.25, 1e-7)
        assert config.id2label == {0: "no", 1: "maybe", 2: "yes"} and config.label2id["yes"] == 2

    def test_settings_of_a_wrong_type_are_not_taken(self, output, tmp_path):
        content = content_of(CLASSIFIER)
        content["state"]["integrations"]["huggingface"]["model"]["config"]["content"] = {
            "hidden_dropout_prob": "many",
            "pad_token_id": True,
            "id2label": ["a", "b", "c"],
        }
        config = lion_hf.convert_checkpoint(saved(content, tmp_path / "file.pt"), output).config
        assert (config.hidden_dropout_prob, config.pad_token_id, config.num_labels) == (0.1, 0, 3)

    @pytest.mark.parametrize(("case", "head"), [(IMAGE, "head."), (CLASSIFIER, "classifier.")])
    def test_encoder_without_head(self, output, tmp_path, case, head):
        content = content_of(case)
        weights = weights_of(content)
        for name in [name for name in weights if head in name]:
            del weights[name]
        assert (
            lion_hf.convert_checkpoint(saved(content, tmp_path / "file.pt"), output).architecture
            == "LionModel"
        )
        assert not any(
            lion_hf.LionModel.from_pretrained(output, output_loading_info=True)[1].values()
        )

    @pytest.mark.parametrize("case", [IMAGE, TEXT])
    def test_prefix_of_distributed_training(self, output, tmp_path, case):
        content = content_of(case)
        weights = weights_of(content)
        renamed = {f"module.{name}": tensor for name, tensor in weights.items()}
        weights.clear()
        weights.update(renamed)
        lion_hf.convert_checkpoint(saved(content, tmp_path / "file.pt"), output)
        lion_hf.convert_checkpoint(file_of(case), output.parent / "plain")
        ours, plain = (
            load_file(folder / "model.safetensors") for folder in (output, output.parent / "plain")
        )
        assert ours.keys() == plain.keys() and all(
            torch.equal(ours[name], plain[name]) for name in ours
        )

    def test_untied_decoder_stays_untied(self, output, tmp_path):
        content = content_of(TEXT)
        decoder = weights_of(content)["model.cls.predictions.decoder.weight"] = torch.clone(
            weights_of(content)["model.bert.embeddings.word_embeddings.weight"]
        )
        decoder[3] += 1
        assert not lion_hf.convert_checkpoint(
            saved(content, tmp_path / "file.pt"), output
        ).config.tie_word_embeddings
        model = lion_hf.LionForMaskedLM.from_pretrained(output)
        assert torch.equal(model.decoder.weight, decoder)
        assert not torch.equal(model.lion.embeddings.word_embeddings.weight, decoder)

    def test_half_precision_becomes_float32(self, output, tmp_path):
        content = content_of(IMAGE)
        content["model"] = {name: tensor.half() for name, tensor in content["model"].items()}
        lion_hf.convert_checkpoint(saved(content, tmp_path / "file.pt"), output)
        weights = load_file(output / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert torch.equal(weights["lion.norm.weight"], content["model"]["norm.weight"].float())

    def test_harmless_objects_beside_the_weights(self, output, tmp_path):
        content = content_of(IMAGE)
        content["args"].output_dir, content["args"].time = (
            pathlib.Path("somewhere"),
            datetime.timedelta(hours=3),
        )
        content["max_accuracy"] = np.float64(81.2)
        content["log"] = collections.defaultdict(list, {"loss": [0.3]})
        content["when"], content["args"].type = datetime.datetime(2025, 2, 22), int
        content["shard"] = torch.empty(0)  # as in the optimizer of a process without a share
        content["rng"] = [{"python": random.getstate(), "numpy": np.random.get_state()}]
        assert (
            lion_hf.convert_checkpoint(
                saved(content, tmp_path / "file.pt"), output
            ).config.image_size
            == 64
        )


class TestOptions:
    def test_heads_of_lit_images_are_asked_for(self, output):
        refused(file_of(LIT_IMAGE), output, "--num-attention-heads N .*divisor of the width, 48")
        config = lion_hf.convert_checkpoint(
            file_of(LIT_IMAGE), output, num_attention_heads=3
        ).config
        assert (config.num_attention_heads, config.patch_order) == (3, "snake")

    def test_stored_heads_need_no_option(self, output, tmp_path):
        content = content_of(LIT_IMAGE)
        content["args"].num_heads = 6
        assert (
            lion_hf.convert_checkpoint(
                saved(content, tmp_path / "file.pt"), output
            ).config.num_attention_heads
            == 6
        )

    def test_heads_of_lit_text_without_settings_are_asked_for(self, output, tmp_path):
        content = content_of(LIT_TEXT)
        del content["state"]["integrations"]
        path = saved(content, tmp_path / "file.pt")
        refused(
            path, output, "--num-attention-heads"
        )  # 64 is the width of one head, but of no model
        assert (
            lion_hf.convert_checkpoint(
                path, output, num_attention_heads=4
            ).config.num_attention_heads
            == 4
        )

    def test_heads_of_published_width(self, output, tmp_path):
        size = 192
        config = lion_hf.LionConfig(
            modality="image",
            mask_type="lit",
            hidden_size=size,
            num_attention_heads=3,
            num_hidden_layers=1,
        )
        ours = lion_hf.LionForImageClassification(config).state_dict()
        norm = {
            f"blocks.0.{norm}.{part}": torch.ones(size)
            for norm in ("norm1", "norm2")
            for part in ("weight", "bias")
        }
        layer = "lion.layers.0."
        weights = norm | {
            "cls_token": ours["lion.embeddings.cls_token"],
            "pos_embed": ours["lion.embeddings.position_embeddings"],
            "blocks.0.attn.qkv.weight": torch.randn(3 * size, size),
            "blocks.0.attn.qkv.bias": torch.randn(3 * size),
        }
        rows = {
            "patch_embed.proj": "lion.embeddings.patch_embeddings",
            "blocks.0.attn.proj": f"{layer}attention.o_proj",
            "blocks.0.mlp.fc1": f"{layer}mlp.fc1",
            "blocks.0.mlp.fc2": f"{layer}mlp.fc2",
            "norm": "lion.norm",
            "head": "classifier",
        }
        weights |= {
            f"{a}.{part}": ours[f"{b}.{part}"]
            for a, b in rows.items()
            for part in ("weight", "bias")
        }
        conversion = lion_hf.convert_checkpoint(
            saved({"model": weights}, tmp_path / "file.pth"), output, classifier_pooling="mean"
        )
        assert conversion.config.num_attention_heads == 3 and conversion.config.image_size == 224
        assert any("3 heads were assumed" in note for note in conversion.notes)

    def test_gates_tell_the_heads(self, output):
        refused(file_of(IMAGE), output, "6: the gates are those of 3 heads", num_attention_heads=6)

    @pytest.mark.parametrize("heads", [5, 0, -1])
    def test_heads_that_do_not_fit(self, output, heads):
        refused(
            file_of(LIT_IMAGE), output, f"num_attention_heads={heads}", num_attention_heads=heads
        )

    def test_pooling_is_asked_for_without_arguments(self, output, tmp_path):
        content = content_of(IMAGE)
        del content["args"]
        path = saved(content, tmp_path / "file.pth")
        refused(path, output, "--classifier-pooling cls .* or mean")
        assert (
            lion_hf.convert_checkpoint(
                path, output, classifier_pooling="cls"
            ).config.classifier_pooling
            == "cls"
        )

    def test_unknown_pooling(self, output):
        refused(
            file_of(IMAGE),
            output,
            r"'max': expected one of \('cls', 'mean'\)",
            classifier_pooling="max",
        )

    @pytest.mark.parametrize(("use_ema", "value"), [(False, 0.0), (True, 1.0)])
    def test_moving_average(self, output, tmp_path, use_ema, value):
        content = content_of(IMAGE)
        for name, fill in (("model", 0.0), ("model_ema", 1.0)):
            content[name] = {
                name: torch.full_like(tensor, fill) for name, tensor in content["model"].items()
            }
        conversion = lion_hf.convert_checkpoint(
            saved(content, tmp_path / "file.pth"), output, use_ema=use_ema
        )
        assert all(
            bool((tensor == value).all())
            for tensor in load_file(output / "model.safetensors").values()
        )
        assert any("--use-ema" in note for note in conversion.notes) != use_ema

    @pytest.mark.parametrize("use_ema", [False, True])
    def test_only_a_moving_average(self, output, tmp_path, use_ema):
        content = content_of(IMAGE)
        content["model_ema"] = content.pop("model")
        conversion = lion_hf.convert_checkpoint(
            saved(content, tmp_path / "file.pth"), output, use_ema=use_ema
        )
        assert conversion.architecture == "LionForImageClassification"

    @pytest.mark.parametrize(
        ("case", "options", "match"),
        [
            (IMAGE, {"use_ema": True}, "holds no 'model_ema'"),
            (TEXT, {"use_ema": True}, "is for image checkpoints"),
            (TEXT, {"classifier_pooling": "mean"}, "is for image checkpoints"),
            (IMAGE, {"tokenizer": "somewhere"}, "is for text checkpoints"),
        ],
    )
    def test_options_of_the_other_kind(self, output, case, options, match):
        refused(file_of(case), output, match, **options)

    def test_image_processor(self, output):
        lion_hf.convert_checkpoint(file_of(IMAGE), output)
        processor = AutoImageProcessor.from_pretrained(output)
        assert (processor.crop_size["height"], processor.crop_size["width"]) == (64, 64)
        assert processor.size["shortest_edge"] == round(64 / 0.875)

    def test_a_tokenizer_too_large_for_the_model(self, output, tmp_path):
        BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)}).save_pretrained(
            tmp_path / "tokenizer"
        )
        (tmp_path / "tokenizer" / "vocab.txt").write_text("word\n" * 500_000)
        refused(
            file_of(TEXT), output, "vocab.txt has 2500000 bytes", tokenizer=tmp_path / "tokenizer"
        )

    @pytest.mark.parametrize("by_name", [False, True])
    def test_tokenizer(self, output, tmp_path, by_name):
        tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
        if by_name:
            tokenizer.save_pretrained(tmp_path / "tokenizer")
            tokenizer = tmp_path / "tokenizer"
        conversion = lion_hf.convert_checkpoint(file_of(TEXT), output, tokenizer=tokenizer)
        assert AutoTokenizer.from_pretrained(output)("lion").input_ids == [2, 5, 3]
        assert not any("tokenizer" in note for note in conversion.notes)

    @pytest.mark.parametrize(
        "files",
        [
            {"tokenizer.json": '{"added_tokens": [], "model": {"type": "none"}}'},
            {"tokenizer.json": "{}"},
            {"tokenizer_config.json": "[]"},
            {"config.json": '{"model_type": "bert"}'},
            {},
        ],
        ids=["unknown", "empty", "settings", "made up", "none"],
    )
    def test_a_folder_without_a_tokenizer_that_can_be_read(self, output, tmp_path, files):
        """transformers makes up one of five words for a folder of BERT's that has none."""
        folder = tmp_path / "tokenizer"
        if any(name.startswith("tokenizer") for name in files):
            vocabulary = {word: number for number, word in enumerate(WORDS)}
            BertTokenizer(vocab=vocabulary).save_pretrained(folder)
        for name, text in files.items():
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        refused(file_of(TEXT), output, "--tokenizer .* has no tokenizer", tokenizer=folder)

    def test_missing_tokenizer_is_told(self, output):
        assert any(
            "30,522" in note for note in lion_hf.convert_checkpoint(file_of(TEXT), output).notes
        )

    @pytest.mark.parametrize(("words", "step"), [(106, 1), (20, 7)], ids=["words", "gaps"])
    def test_tokenizer_larger_than_the_model(self, output, words, step):
        """By its number of words, or by its largest id."""
        words = (*WORDS, *map(str, range(words - len(WORDS))))
        tokenizer = BertTokenizer(vocab={word: step * n for n, word in enumerate(words)})
        refused(file_of(TEXT), output, "more than the model's 97", tokenizer=tokenizer)


class TestNamesAndShapes:
    @pytest.mark.parametrize(
        "case", [IMAGE, "vision-decay-s-pos", TEXT, "text-lion-d-mlm", CLASSIFIER]
    )
    def test_every_tensor_is_needed(self, output, tmp_path, case):
        unused = re.compile(r"position_ids|cls\.predictions\.bias|position_embeddings")
        # Without them the file is a complete one of another kind.
        optional = re.compile(r"pos_embed|qkv\.bias")
        for name in weights_of(content_of(case)):
            if unused.search(name) or optional.search(name):
                continue
            content = content_of(case)
            del weights_of(content)[name]
            refused(saved(content, tmp_path / "file.pt"), output, "lacks|unknown|but the stored")

    @pytest.mark.parametrize(
        ("case", "name"),
        [
            (IMAGE, "blocks.1.mlp.fc2.bias"),
            (IMAGE, "patch_embed.proj.weight"),
            (LIT_TEXT, "model.bert.pooler.dense.bias"),
        ],
    )
    def test_missing_name_and_unknown_name(self, output, tmp_path, case, name):
        content = content_of(case)
        if name in weights_of(content):
            del weights_of(content)[name]
            refused(saved(content, tmp_path / "a.pt"), output, f"lacks .*{re.escape(name)}")
        content = content_of(case)
        weights_of(content)[f"{name}.other"] = torch.ones(1)
        match = f"has unknown .*{re.escape(name.removeprefix('model.'))}.other"
        refused(saved(content, tmp_path / "b.pt"), output, match)

    @pytest.mark.parametrize(
        ("case", "name"),
        [
            (IMAGE, "norm.weight"),
            (IMAGE, "blocks.2.attn.qkv.weight"),
            (IMAGE, "blocks.2.attn.a2_i.weight"),
            (IMAGE, "patch_embed.proj.weight"),
            (IMAGE, "head.weight"),
            (TEXT, "model.bert.encoder.layer.1.attention.self.Wa_i.bias"),
            (TEXT, "model.bert.embeddings.word_embeddings.weight"),
            (TEXT, "model.cls.predictions.decoder.weight"),
        ],
    )
    @pytest.mark.parametrize("change", ["longer", "flat"])
    def test_wrong_shape(self, output, tmp_path, case, name, change):
        content = content_of(case)
        tensor = weights_of(content)[name]
        weights_of(content)[name] = (
            torch.cat([tensor, tensor]) if change == "longer" else tensor.flatten()[:-1].clone()
        )
        refused(
            saved(content, tmp_path / "file.pt"),
            output,
            r"has shape \(.*expected|do not fit together",
        )

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite(self, output, tmp_path, number):
        content = content_of(TEXT)
        name = "model.bert.embeddings.word_embeddings.weight"
        weights_of(content)[name][3, 1] = number
        refused(
            saved(content, tmp_path / "file.pt"),
            output,
            "NaN or infinity in bert.embeddings.word_embeddings.weight",
        )

    def test_family_and_tensors_disagree(self, output, tmp_path):
        content = content_of(IMAGE)
        content["args"].mask_type = "Decay"
        refused(
            saved(content, tmp_path / "file.pt"),
            output,
            "mask_type='selective', but the stored mask_type is 'Decay'",
        )

    def test_layers_that_are_not_numbered_in_a_row(self, output, tmp_path):
        content = content_of(IMAGE)
        content["model"] = {
            name.replace("blocks.2.", "blocks.999999999999."): x
            for name, x in content["model"].items()
        }
        refused(saved(content, tmp_path / "file.pt"), output, "lacks tensors: blocks.2.")


class TestOutput:
    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_existing_output(self, output, kind):
        if kind == "folder":
            output.mkdir()
        mine = output / "mine.txt" if kind == "folder" else output
        mine.write_text("mine")
        refused(file_of(IMAGE), output, "exists and is not an empty folder")
        assert mine.read_text() == "mine"

    def test_empty_output_folder_is_used(self, output):
        output.mkdir()
        lion_hf.convert_checkpoint(file_of(IMAGE), output)
        assert sorted(file.name for file in output.iterdir()) == [
            "config.json",
            "image_processing_lion.py",
            "model.safetensors",
            "preprocessor_config.json",
        ]
        assert list(output.parent.iterdir()) == [output]

    def test_failure_while_writing_leaves_nothing(self, output, monkeypatch):
        def full(*args, **kwargs):
            raise OSError("No space left on device")

        monkeypatch.setattr(
            "transformers.image_processing_base.ImageProcessingMixin.save_pretrained", full
        )
        with pytest.raises(OSError, match="No space left"):
            lion_hf.convert_checkpoint(file_of(IMAGE), output)
        assert list(output.parent.iterdir()) == []


class TestCommandLine:
    def test_converts(self, output, capsys):
        assert (
            main(["convert", str(file_of(LIT_IMAGE)), str(output), "--num-attention-heads", "3"])
            == 0
        )
        assert (
            "LionForImageClassification, mask_type=lit, 3 layers of width 48 with 3 heads"
            in capsys.readouterr().out
        )
        assert (output / "model.safetensors").exists()

    def test_every_option_reaches_the_conversion(self, monkeypatch, output):
        seen = {}
        monkeypatch.setattr(
            "lion_hf.convert.conversion.convert_checkpoint",
            lambda *args, **options: seen.update(options) or 1 / 0,
        )
        command = [
            "convert",
            "a",
            "b",
            "--num-attention-heads",
            "3",
            "--classifier-pooling",
            "cls",
            "--use-ema",
            "--tokenizer",
            "t",
        ]
        with pytest.raises(ZeroDivisionError):
            main(command)
        assert seen == {
            "num_attention_heads": 3,
            "classifier_pooling": "cls",
            "use_ema": True,
            "tokenizer": "t",
        }

    def test_tells_what_is_left_to_do(self, output, capsys):
        assert main(["convert", str(file_of(TEXT)), str(output)]) == 0
        assert "note: no tokenizer was written" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments",
        [["absent"], ["convert"], ["convert", "a"], ["convert", "a", "b", "--other"]],
    )
    def test_wrong_usage(self, arguments, capsys):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2 and "usage: lion-hf" in capsys.readouterr().err

    def test_unwritable_place(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert main(["convert", str(file_of(IMAGE)), str(tmp_path / "file" / "output")]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "command", [["-m", "lion_hf.convert"], ["-m", "lion_hf.cli", "convert"]], ids=" ".join
    )
    def test_as_a_process(self, output, command):
        run = subprocess.run(
            [sys.executable, *command, str(file_of(LIT_IMAGE)), str(output)],
            cwd=output.parent,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 2
        assert re.fullmatch(
            r"error: .*--num-attention-heads N.*", run.stderr.splitlines()[-1]
        )  # libraries may warn before
        assert "Traceback" not in run.stderr and run.stdout == ""
        assert list(output.parent.iterdir()) == []

    @pytest.mark.slow
    def test_installed_command(self):
        command = shutil.which("lion-hf", path=Path(sys.executable).parent)
        if command is None:
            pytest.skip("lion_hf is not installed here")
        printed = subprocess.run(
            [command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert "convert" in printed and "publish" in printed
