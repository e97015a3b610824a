"""The report of `lion-hf linearize`: figures, model card, pictures, pooling, speeds."""

import json
import re

import pytest
import torch
from support.softmax_models import ONE_OF_EACH, inputs_of, softmax_model
from transformers import BertTokenizer

from lion_hf.hub import files_to_publish
from lion_hf.linearize.checkpoint import linearize_checkpoint
from lion_hf.linearize.copying import linearize_model
from lion_hf.linearize.distillation import Lesson, examine, measure, retrieval
from lion_hf.linearize.pooling import OLD_NAMES, pool, pooling_modes
from lion_hf.linearize.sentence_modules import find_sentence_modules
from lion_hf.linearize.settings import Distillation
from lion_hf.linearize.timing import Times, compare_speeds, faster_from

pytest_plugins = ["support.softmax_models"]  # its fixtures


@pytest.fixture
def encoder(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    softmax_model("BertModel", vocab_size=len(words)).save_pretrained(tmp_path / "source")
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "train.txt").write_text("a b c d e f\nb c d e\nc h a\nd d a b\n" * 10)
    return tmp_path / "source"


def sections(card: str) -> dict[str, str]:
    parts = re.split(r"^#{2,3} (.*)$", card, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_the_card_of_an_encoder(encoder, tmp_path):
    pytest.importorskip("matplotlib")
    file = str(tmp_path / "train.txt")
    lessons = Distillation(train_file=file, layer_steps=4, steps=4, batch_size=4)
    made = linearize_checkpoint(encoder, tmp_path / "lion", distillation=lessons)
    card = (made.folder / "README.md").read_text()
    found = sections(card)
    assert [*found][-3:] == ["How it was made", "Speed", "Citation"]
    report = found["How it was made"]
    assert "made from source, a BertModel" in report and "`train.txt`" in report
    assert "4 steps on the layers with learning rate 0.001," in report
    assert "4 steps end to end with learning rate 0.001." in report
    assert (
        f"| {made.metrics['copied_cosine']:.4f} | {made.metrics['layers_cosine']:.4f} |" in report
    )
    assert "| | source | copied weights | after the layers | at the end |" in report
    assert len(re.findall(r"^\| [12] \|(?: 0\.\d{4} \|){3}$", report, re.MULTILINE)) == 2
    assert re.search(r"^\| 128 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", found["Speed"], re.MULTILINE)
    for picture in ("quality.png", "layer_errors.png"):
        assert f"]({picture})" in report
        assert (made.folder / picture).read_bytes()[:4] == b"\x89PNG"
    figures = json.loads((made.folder / "linearize.json").read_text())
    assert figures["metrics"] == made.metrics and figures["steps"] == {"layers": 4, "answers": 4}
    assert [entry["stage"] for entry in figures["history"]][:: len(figures["history"]) - 1] == [
        "layers",
        "answers",
    ]
    assert str(tmp_path) not in card + json.dumps(figures)
    assert {"quality.png", "linearize.json"} <= {*files_to_publish(made.folder, "me/lion")}


def test_the_card_of_a_classifier_has_its_accuracy(text_source, tmp_path):
    files = {
        x: str(tmp_path / f"{x.partition('_')[0]}.csv") for x in ("train_file", "validation_file")
    }
    lessons = Distillation(**files, layer_steps=0, steps=2, batch_size=4, max_length=9)
    made = linearize_checkpoint(text_source, tmp_path / "lion", distillation=lessons)
    report = sections((made.folder / "README.md").read_text())["How it was made"]
    teacher = f"{made.metrics['teacher_accuracy']:.4g}"
    assert f"| accuracy | {teacher} | " in report and "| same class as the source | 1 |" in report
    assert "on the layers" not in report and "after the layers" not in report


def test_a_copy_that_learnt_nothing_has_the_usual_card(encoder, tmp_path):
    made = linearize_checkpoint(encoder, tmp_path / "lion")
    assert "How it was made" not in (made.folder / "README.md").read_text()
    assert made.metrics == {} and not (made.folder / "linearize.json").exists()


class TestFigures:
    def test_an_encoder_that_is_its_source(self, softmax):
        teacher, inputs = softmax_model("BertModel"), inputs_of("BertModel")
        student = linearize_model(
            teacher, sharpness=1.0, feature_map="identity", conv_kernel_size=0
        )[0]
        rows = [{name: x[n] for name, x in inputs.items()} for n in range(2)]
        found = measure(Lesson(student, teacher), rows, torch.utils.data.default_collate, 2)
        assert found["cosine"] == pytest.approx(1.0, abs=1e-5) and found["layer_error"] < 1e-5
        assert "loss" not in found
        own = examine(Lesson(student, teacher), rows, torch.utils.data.default_collate, 1)
        assert len(own.layer_errors) == 2 and own.embeddings[0].shape == (2, 24)

    def test_retrieval(self):
        theirs = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
        assert retrieval((theirs, theirs)) == {"retrieval": 1.0, "similarity": pytest.approx(1.0)}
        mixed = retrieval((theirs.roll(1, 0), theirs))
        assert mixed["retrieval"] < 0.1 and abs(mixed["similarity"]) < 0.3
        assert retrieval(()) == {} and retrieval((theirs[:2], theirs[:2])) == {}


class TestPooling:
    @pytest.mark.parametrize("mode", OLD_NAMES.values())
    def test_as_sentence_transformers(self, mode):
        modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
        states, tokens = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.long)
        tokens[1, 3:], tokens[2, 1:] = 0, 0
        theirs = modules.Pooling(8, pooling_mode=mode)
        expected = theirs({"token_embeddings": states, "attention_mask": tokens})
        torch.testing.assert_close(pool(states, tokens, (mode,)), expected["sentence_embedding"])
        whole = theirs({"token_embeddings": states, "attention_mask": torch.ones_like(tokens)})
        torch.testing.assert_close(pool(states, None, (mode,)), whole["sentence_embedding"])

    @pytest.mark.parametrize(
        ("settings", "modes"),
        [
            ({"pooling_mode": "cls"}, ("cls",)),
            ({"pooling_mode": ["cls", "mean"]}, ("cls", "mean")),
            ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
            ({}, ("mean",)),
        ],
    )
    def test_modes_of_a_folder(self, settings, modes, tmp_path):
        kind = "sentence_transformers.models."
        entries = [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}Pooling"},
        ]
        (tmp_path / "modules.json").write_text(json.dumps(entries))
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
        assert pooling_modes(find_sentence_modules(tmp_path)) == modes
        (tmp_path / "modules.json").unlink()
        assert pooling_modes(find_sentence_modules(tmp_path)) == ("mean",)


class TestSpeeds:
    @pytest.mark.parametrize("architecture", [*ONE_OF_EACH, "DistilBertModel", "Dinov2Model"])
    def test_every_family_is_timed_beyond_its_own_length(self, architecture):
        teacher = softmax_model(architecture, num_hidden_layers=3)  # more than are timed
        student, _ = linearize_model(teacher)
        before = teacher.config.to_dict()
        times = compare_speeds(teacher.config, student.config, 0.1, torch.device("cpu"))
        assert times[0].length == 128 and min(times[0][1:]) > 0
        assert teacher.config.to_dict() == before

    def test_the_length_from_which_lion_is_faster(self):
        times = [Times(128, 1.0, 2.0), Times(256, 2.0, 1.0), Times(512, 2.0, 2.5)]
        assert faster_from(times) is None
        assert faster_from([*times, Times(1024, 4.0, 1.0), Times(2048, 8.0, 1.0)]) == 1024
