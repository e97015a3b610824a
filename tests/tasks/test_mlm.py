"""`lion-hf mlm` on the words of this repository's README and license."""

import csv
import functools
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from support.models import SPECIAL_TOKENS
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertJapaneseTokenizer,
    BertTokenizer,
    pipeline,
)

from lion_hf.data.masking import MaskTokens, pad_rows
from lion_hf.data.rows import documents_together, make_rows_of, prepare_rows
from lion_hf.presets import find_preset, recipe_names
from lion_hf.tasks import mlm
from lion_hf.training.settings import parse_settings
from lion_hf.training.trainer import LionTrainingArguments

ROOT = Path(__file__).parents[2]

MASK_MOST = ("--validation_mask_probability", "0.9")  # for texts of which few words are known
FEW_WORDS = (*SPECIAL_TOKENS, "the", "of", "model", *"abcdef")
SMALL = (
    "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,"
    "initializer_range=0.2"
)
SHORT = [
    "--max_length",
    "32",
    "--per_device_train_batch_size",
    "4",
    "--learning_rate",
    "3e-3",
    "--report_to",
    "none",
]
SHORT += ["--use_cpu", "--disable_tqdm", "true", "--validation_rows", "20", "--logging_steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text files, four JSON shards, and a tokenizer with an untrained model."""
    folder = tmp_path_factory.mktemp("text")
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "LICENSE")]
    lines = "\n".join(texts).splitlines()
    (folder / "train.txt").write_text("\n".join(lines[:200]), encoding="utf-8")
    (folder / "validation.txt").write_text("\n".join(lines[200:300]), encoding="utf-8")
    (folder / "shards").mkdir()
    for shard in range(4):
        rows = [json.dumps({"text": line, "url": "x"}) for line in lines[shard:200:4]]
        (folder / "shards" / f"c4-train.{shard:05d}.json").write_text(
            "\n".join(rows), encoding="utf-8"
        )
    run(folder, "model", "--train_tokenizer", "--vocab_size", "300", "--max_steps", "1")
    return folder


def run(folder: Path, output: str, *argv: str, data: str = "text") -> dict[str, float]:
    files = [
        "--train_file",
        str(folder / "train.txt"),
        "--validation_file",
        str(folder / "validation.txt"),
    ]
    if data == "stream":
        files[1] = str(folder / "shards" / "*.json")
        files += ["--streaming", "--shuffle_buffer", "16"]
        # validation stays text
    model = ["--model", str(ROOT / "configs/lion-s-base"), "--model_overrides", SMALL]
    if output != "model":
        model += ["--tokenizer", str(folder / "model")]
    return mlm.main([*files, *model, *SHORT, "--output_dir", str(folder / output), *argv])


def losses(folder: Path) -> dict[str, tuple[str, str]]:
    """Step -> losses of training and evaluation, as they stand in the table."""
    with open(folder / "curves.csv", encoding="utf-8", newline="") as file:
        return {
            row["step"]: (row["loss"], row.get("eval_loss", "")) for row in csv.DictReader(file)
        }


@pytest.mark.parametrize("rows", ["padded", "blocks", "packed"])
def test_training_from_scratch(folder, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = {path.name for path in folder.iterdir()}
    metrics = run(
        folder,
        rows,
        "--rows",
        rows,
        "--model",  # the paper's model learns too slowly to be seen after 40 steps
        "modern-lion-s-tiny",
        "--model_overrides",
        SMALL.replace("0.2", "0.1"),
        "--learning_rate",
        "1e-2",
        "--max_steps",
        "40",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "10",
    )
    output = folder / rows
    assert {path.name for path in folder.iterdir()} - others == {rows} and not list(
        tmp_path.iterdir()
    )  # where it is told
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert metrics["eval_perplexity"] == pytest.approx(
        torch.tensor(metrics["eval_loss"]).exp().item(), rel=1e-5
    )
    values = [float(loss) for loss, _ in losses(output).values() if loss]
    assert len(values) == 20 and sum(values[-5:]) < sum(values[:5]) - 1.0  # it learns
    for name in ("curves.png", "settings.yaml", "README.md", "modeling_lion.py"):
        assert (output / name).stat().st_size > 500
    fill = pipeline("fill-mask", model=str(output))
    assert len(fill("the [MASK] of the model")) == 5
    model = AutoModelForMaskedLM.from_pretrained(output)
    assert not model.config.sparse_prediction
    assert "masked_accuracy" in (output / "README.md").read_text()


def test_evaluation_and_prediction_without_training(folder):
    """Of a finished run, which stays as it is, and of a model on its own."""
    validation = ["--validation_file", str(folder / "validation.txt")]
    run(folder, "only", "--max_steps", "2")
    trained = json.loads((folder / "only" / "metrics.json").read_text())
    before = {file: file.read_bytes() for file in (folder / "only").iterdir() if file.is_file()}
    metrics = run(folder, "only", "--do_train", "false", "--do_eval", "true")
    assert metrics["eval_masked_accuracy"] == trained["eval_masked_accuracy"]
    assert json.loads((folder / "only" / "eval_metrics.json").read_text()) == metrics
    assert all(file.read_bytes() == content for file, content in before.items())

    argv = ["--model", str(folder / "only"), *SHORT, "--output_dir", str(folder / "alone")]
    only = ["--do_train", "false", "--do_predict", "true"]
    found = mlm.main([*argv, *validation, *only])
    for name in ("loss", "masked_accuracy", "perplexity"):
        assert found[f"test_{name}"] == pytest.approx(metrics[f"eval_{name}"], rel=1e-5), name
    lines = (folder / "alone" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    masked = [place for row in rows for place in row["masked"]]
    right = [place["guesses"][0]["token"] == place["token"] for place in masked]
    assert len(rows) == 20 and "[MASK]" in "".join(lines) and len(masked) > 20
    assert sum(right) / len(right) == pytest.approx(metrics["eval_masked_accuracy"])
    scores = [[guess["score"] for guess in place["guesses"]] for place in masked]
    assert all(len(x) == 5 and x == sorted(x, reverse=True) and sum(x) <= 1 for x in scores)
    assert not (folder / "alone" / "model.safetensors").exists()
    preset = ["--model", "lion-s-base", "--model_overrides", SMALL]
    preset += ["--tokenizer", str(folder / "model"), "--output_dir", str(folder / "nothing")]
    with pytest.raises(SystemExit, match="holds weights of a trained model"):
        mlm.main([*SHORT, *preset, *validation, "--do_train", "false", "--do_eval", "true"])
    argv += ["--from_scratch", "--output_dir", str(folder / "nothing")]
    with pytest.raises(SystemExit, match="is not trained for this"):
        mlm.main([*argv, *validation, *only])


def interrupted(folder: Path, output: str, *argv: str) -> list[str]:
    """A run that ended at its second of four steps; returns its options."""
    argv = [*argv, "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "9"]
    run(folder, output, *argv)
    shutil.rmtree(folder / output / "checkpoint-4")
    return argv


def test_a_run_does_not_continue_with_other_data(folder, tmp_path):
    files = {name: tmp_path / name for name in ("train.txt", "validation.txt")}
    for name, file in files.items():
        shutil.copy(folder / name, file)
    given = ["--train_file", str(files["train.txt"])]
    given += ["--validation_file", str(files["validation.txt"])]
    argv = interrupted(folder, "replaced", *given)
    for name, file in files.items():
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("e", "a"), encoding="utf-8")
        with pytest.raises(SystemExit, match=f"{name}.*was '[0-9a-f]+' and is '[0-9a-f]+'"):
            run(folder, "replaced", *argv)
        file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="max_length was 32 and is 16"):
        run(folder, "replaced", *argv, "--max_length", "16")
    run(folder, "replaced", *argv)
    assert (folder / "replaced" / "checkpoint-4").is_dir()


def test_a_trained_tokenizer_is_that_of_its_text_and_size(folder, tmp_path):
    shutil.copy(folder / "train.txt", tmp_path)
    argv = ["--train_file", str(tmp_path / "train.txt"), "--max_steps", "1", *SHORT]
    argv += ["--model", "lion-s-base", "--model_overrides", SMALL]
    argv += ["--train_tokenizer", "--output_dir", str(tmp_path / "out")]
    mlm.main([*argv, "--vocab_size", "200"])
    with pytest.raises(SystemExit, match="vocab_size was 200 and is 300.*choose another --output"):
        mlm.main([*argv, "--vocab_size", "300"])
    files = ["--validation_file", str(folder / "validation.txt")]
    mlm.main([*argv, *files, "--vocab_size", "200", "--do_train", "false", "--do_eval", "true"])
    with (tmp_path / "train.txt").open("a") as file:
        file.write("one more line\n")
    with pytest.raises(SystemExit, match="train.txt was {'size': [0-9]+.* and is {'size': [0-9]+"):
        mlm.main([*argv, "--vocab_size", "200"])
    (tmp_path / "out" / "trained_tokenizer.json").unlink()
    with pytest.raises(SystemExit, match="pass --tokenizer .*out to use it, or choose another"):
        mlm.main([*argv, "--vocab_size", "200"])


def test_a_tokenizer_written_in_python(folder, tmp_path):
    """It knows no words, so whole words cannot be masked; everything else works."""
    (tmp_path / "vocab.txt").write_text("\n".join(FEW_WORDS))
    tokenizer = BertJapaneseTokenizer(
        str(tmp_path / "vocab.txt"), word_tokenizer_type="basic", subword_tokenizer_type="wordpiece"
    )
    assert not tokenizer.is_fast
    tokenizer.save_pretrained(tmp_path / "python")
    argv = ["--tokenizer", str(tmp_path / "python"), "--max_steps", "2", *MASK_MOST]
    for rows in ("padded", "blocks", "packed"):
        run(folder, f"python-{rows}", *argv, "--rows", rows)
    with pytest.raises(SystemExit, match="--whole_words needs a tokenizer that knows words"):
        run(folder, "python-words", *argv, "--whole_words")


def test_a_vocabulary_with_gaps(folder, tmp_path):
    vocabulary = {word: 7 * number for number, word in enumerate(FEW_WORDS)}
    tokenizer = BertTokenizer(vocab=vocabulary)
    assert max(tokenizer.get_vocab().values()) > len(tokenizer)
    tokenizer.save_pretrained(tmp_path / "gaps")
    run(folder, "gaps", "--tokenizer", str(tmp_path / "gaps"), "--max_steps", "2", *MASK_MOST)
    config = AutoModelForMaskedLM.from_pretrained(folder / "gaps").config
    assert config.vocab_size == 7 * (len(FEW_WORDS) - 1) + 1
    with pytest.raises(SystemExit, match="the tokenizer has 92 words, .* only 20"):
        run(
            folder,
            "small",
            *("--tokenizer", str(tmp_path / "gaps")),
            *("--model_overrides", f"{SMALL},vocab_size=20"),
        )


def test_models_and_tokenizers_that_cannot_be_had(folder, tmp_path):
    """No network, or an empty folder: one line."""
    (tmp_path / "empty").mkdir()
    text = ["--train_file", str(folder / "train.txt"), "--output_dir", str(tmp_path / "out")]
    for argv, message in (
        (["--model", "nobody/nothing"], "nobody/nothing has no tokenizer that can be read"),
        (["--tokenizer", "nobody/nothing"], "nobody/nothing has no tokenizer that can be read"),
        (["--tokenizer", str(tmp_path / "empty")], "empty has no tokenizer"),
        (
            ["--tokenizer", str(folder / "model"), "--model", "nobody/nothing"],
            "model nobody/nothing: expected a folder with config.json, or a name on the Hub",
        ),
        (
            ["--tokenizer", str(folder / "model"), "--model", str(tmp_path / "empty")],
            "empty: expected a folder with config.json",
        ),
    ):
        with pytest.raises(SystemExit, match=message) as stop:
            mlm.main([*text, *SHORT, *argv])
        assert "\n" not in str(stop.value), argv
    shutil.copytree(folder / "model", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x" * 99)
    for model in (["--model", str(tmp_path / "broken")], ["--model", str(folder / "model")]):
        with pytest.raises(SystemExit, match="its weights cannot be loaded: ") as stop:
            mlm.main([*text, *SHORT, *model, "--model_overrides", "intermediate_size=44"])
        assert "\n" not in str(stop.value) and len(str(stop.value)) < 700
    with pytest.raises(SystemExit, match="data set nobody/nothing .* cannot be read: ") as stop:
        mlm.main([*SHORT, "--dataset", "nobody/nothing", "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()


def test_training_from_half_precision_goes_on_in_single(folder):
    half = AutoModelForMaskedLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    torch.save(
        half.state_dict(), folder / "pytorch_model.bin"
    )  # of the older kind, which is found too
    half.config.save_pretrained(folder / "half")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "half")
    (folder / "pytorch_model.bin").rename(folder / "half" / "pytorch_model.bin")
    settings = mlm.ModelSettings(model=str(folder / "half"))
    found = mlm.build_model(settings, AutoTokenizer.from_pretrained(folder / "half"))
    for name, weight in found.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(
            weight, half.state_dict()[name].float()
        ), name


def test_a_larger_vocabulary_than_the_tokenizer_s_is_kept(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    settings = mlm.ModelSettings(
        model=str(ROOT / "configs/lion-s-base"), model_overrides=f"{SMALL},vocab_size=320"
    )
    assert mlm.build_model(settings, tokenizer).config.vocab_size == 320
    settings = mlm.ModelSettings(model=str(ROOT / "configs/lion-s-base"), model_overrides=SMALL)
    assert mlm.build_model(settings, tokenizer).config.vocab_size == len(tokenizer)


def test_compiled_weights_have_their_own_names(folder):
    run(folder, "compiled", "--max_steps", "1", "--torch_compile_backend", "eager")
    _, info = AutoModelForMaskedLM.from_pretrained(folder / "compiled", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_checkpoint_of_the_model_only_is_not_continued_from(folder):
    run(folder, "model_only", "--max_steps", "2", "--save_only_model", "true")
    with pytest.raises(SystemExit, match="checkpoint-2 holds a model only"):
        run(folder, "model_only", "--max_steps", "4")


def test_training_from_a_checkpoint(folder):
    start = AutoModelForMaskedLM.from_pretrained(folder / "model").state_dict()

    def first_weights(output: str, *argv: str) -> dict[str, torch.Tensor]:
        run(folder, output, "--max_steps", "1", "--learning_rate", "0", *argv)
        return AutoModelForMaskedLM.from_pretrained(folder / output).state_dict()

    model = [
        "--model",
        str(folder / "model"),
        "--model_overrides",
        "attention_form=chunk,attention_probs_dropout_prob=0",
    ]
    continued, anew = (
        first_weights("continued", *model),
        first_weights("anew", *model, "--from_scratch"),
    )
    assert all(torch.equal(start[name], continued[name]) for name in start)
    assert not torch.equal(start["dense.weight"], anew["dense.weight"])
    assert (
        AutoModelForMaskedLM.from_pretrained(folder / "continued").config.attention_form == "chunk"
    )


@pytest.mark.parametrize("data", ["text", "stream"])
def test_a_continued_run_has_the_losses_of_an_unbroken_one(folder, data):
    argv = [
        "--max_steps",
        "12",
        "--save_steps",
        "4",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "4",
        "--rows",
        "blocks",
    ]
    argv += ["--dataloader_num_workers", "2"] if data == "stream" else []
    output = folder / f"continued-{data}"
    run(folder, output.name, *argv, data=data)
    whole, weights = losses(output), (output / "model.safetensors").read_bytes()
    for name in ("checkpoint-12", "metrics.json", "model.safetensors", "curves.csv"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(folder, output.name, *argv, data=data)
    assert losses(output) == whole
    assert (output / "model.safetensors").read_bytes() == weights


def test_streams_say_what_they_need(folder):
    with pytest.raises(SystemExit, match="--max_steps -1: a stream has no end"):
        run(folder, "endless", data="stream")
    with pytest.raises(SystemExit, match="auto_find_batch_size=True with a stream"):
        run(folder, "endless", "--max_steps", "2", "--auto_find_batch_size", "true", data="stream")
    with pytest.raises(SystemExit, match="save_strategy='epoch': a stream has no end"):
        run(folder, "endless", "--max_steps", "2", "--save_strategy", "epoch", data="stream")
    argv = ["--max_steps", "4", "--save_steps", "2"]
    run(folder, "workers", *argv, data="stream")
    shutil.rmtree(folder / "workers" / "checkpoint-4")
    with pytest.raises(SystemExit, match="as it began, with 1 of 1"):
        run(folder, "workers", *argv, "--dataloader_num_workers", "3", data="stream")


def test_a_folder_like_c4(folder):
    metrics = mlm.main(
        [
            "--dataset",
            str(folder / "shards"),
            "--streaming",
            "--validation_split",
            "train",
            "--model",
            str(folder / "model"),
        ]
        + [*SHORT, "--output_dir", str(folder / "c4"), "--max_steps", "3"]
    )
    assert metrics["eval_loss"] > 0


# Rows and masks

DOCUMENTS = [
    "the model is linear",
    "lion",
    "attention in the recurrent form, and the chunk form " * 5,
    "two documents",
]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


def test_long_rows_of_short_documents_are_full(tokenizer):
    """Whatever number of documents is handled at a time."""
    lines = [text for text in DOCUMENTS if text.strip()]
    documents = datasets.Dataset.from_dict({"text": lines * (4000 // len(lines))})
    make = functools.partial(make_rows_of, tokenizer=tokenizer, kind="blocks", max_length=4096)
    together = documents_together(documents, "text", tokenizer, 4096)
    lengths = [
        len(row) for row in prepare_rows(documents, "text", make, None, together)["input_ids"]
    ]
    assert len(lengths) > 2 and lengths[:-1] == [4096] * (len(lengths) - 1)
    empty = datasets.Dataset.from_dict({"text": [" "] * 10})
    assert documents_together(empty, "text", tokenizer, 4096) == 1000
    assert documents_together(documents, "text", tokenizer, 16) == 1000
    numbers = datasets.Dataset.from_dict({"text": [1, 2]})
    together = documents_together(numbers, "text", tokenizer, 4096)
    with pytest.raises(ValueError, match="column 'text' holds int64: expected text"):
        prepare_rows(numbers, "text", make, None, together)


@pytest.mark.parametrize("kind", ["padded", "blocks", "packed"])
def test_rows_hold_all_tokens_in_order(tokenizer, kind):
    rows = make_rows_of(DOCUMENTS, tokenizer, kind, 16)
    special = set(tokenizer.all_special_ids)
    ids = [[token for token in row["input_ids"] if token not in special] for row in rows]
    expected = tokenizer(DOCUMENTS, add_special_tokens=False)["input_ids"]
    assert max(len(row["input_ids"]) for row in rows) == 16
    for row in rows:
        assert row["input_ids"][0] == tokenizer.cls_token_id and len(row["word_ids"]) == len(
            row["input_ids"]
        )
        assert row["word_ids"][0] == 0 and set(row["word_ids"]) == set(
            range(max(row["word_ids"]) + 1)
        )
    if kind == "packed":
        assert sorted(sum(ids, [])) == sorted(sum(expected, []))
        for row in rows:
            starts = [
                n for n, token in enumerate(row["input_ids"]) if token == tokenizer.cls_token_id
            ]
            changes = [
                n
                for n in range(len(row["seq_idx"]))
                if n == 0 or row["seq_idx"][n] != row["seq_idx"][n - 1]
            ]
            assert starts == changes
    else:
        assert sum(ids, []) == sum(expected, [])
    if kind == "blocks":
        assert all(len(row["input_ids"]) == 16 for row in rows[:-1])
    assert make_rows_of([], tokenizer, kind, 16) == []


def test_word_numbers_are_those_of_the_tokenizer(tokenizer):
    text = "linear bidirectional attention"
    (row,) = make_rows_of([text], tokenizer, "padded", 64)
    words = tokenizer(text).word_ids()
    assert len(set(words[1:-1])) == 3 < len(words) - 2  # some word has several tokens
    assert row["word_ids"] == [0, *(word + 1 for word in words[1:-1]), 4]


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks(tokenizer, whole_words):
    row = make_rows_of(
        ["bidirectional linear attention in the recurrent form " * 40], tokenizer, "padded", 600
    )[0]
    mask = MaskTokens(tokenizer, 0.3, whole_words)
    shares, masked, kept = [], 0, 0
    ids, words = torch.tensor(row["input_ids"]), torch.tensor(row["word_ids"])
    for _ in range(40):
        sample = mask(row)
        chosen = sample["labels"] != -100
        assert torch.equal(sample["labels"][chosen], ids[chosen]) and torch.equal(
            sample["input_ids"][~chosen], ids[~chosen]
        )
        assert not chosen[0] and not chosen[-1]
        if whole_words:
            assert all(len(set(chosen[words == word].tolist())) == 1 for word in words.unique())
        shares.append(chosen.float().mean().item())
        masked += (
            sample["input_ids"][chosen] == tokenizer.mask_token_id
        ).float().mean().item() / 40
        kept += (sample["input_ids"][chosen] == ids[chosen]).float().mean().item() / 40
    assert sum(shares) / 40 == pytest.approx(0.3, abs=0.02)
    assert masked == pytest.approx(0.8, abs=0.03) and kept == pytest.approx(0.1, abs=0.03)


def test_padding():
    rows = [
        {
            "input_ids": torch.tensor([5, 6, 7]),
            "labels": torch.tensor([-100, 6, -100]),
            "seq_idx": torch.tensor([0, 0, 1]),
            "seed": 3,
        },
        {
            "input_ids": torch.tensor([8]),
            "labels": torch.tensor([8]),
            "seq_idx": torch.tensor([0]),
            "seed": 4,
        },
    ]
    rows = [{name: torch.as_tensor(x) for name, x in row.items()} for row in rows]
    batch = pad_rows(rows, pad_token_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [8, -100, -100]]
    assert batch["seq_idx"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert set(pad_rows(rows[:1], 1)) == {"input_ids", "labels", "seq_idx"}


@pytest.mark.parametrize("sparse", [False, True])
def test_counts_are_the_loss_and_accuracy_of_all_masked_tokens(sparse):
    logits, labels = torch.randn(4, 7, 11), torch.randint(11, (4, 7))
    labels[torch.rand(4, 7) < 0.5] = -100
    counts = mlm.count_right(logits[labels != -100] if sparse else logits, labels)
    metrics = mlm.masked_metrics(type("Prediction", (), {"predictions": counts.numpy()}))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert metrics["exact_loss"] == pytest.approx(expected.item(), rel=1e-5)
    right = (logits.argmax(-1) == labels)[labels != -100]
    assert metrics["masked_accuracy"] == pytest.approx(right.float().mean().item())


# Mistakes, settings, help


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_file", "nowhere.txt"], "--train_file: nowhere.txt: there is no such file"),
        (["--train_file", "model/config.yaml"], "there is no such file"),
        (
            ["--validation_file", "empty.txt"],
            "validation text: column 'text': all of the 3 documents are empty",
        ),
        (["--text_column", "txt"], "--train_file: there is no column 'txt': the data has text"),
        (
            ["--train_file", "x.jsonl", "--validation_file", "x.jsonl", "--text_column", "n"],
            "train text: column 'n' holds int64: expected text",
        ),
        (["--train_file", "train.txt", "x.jsonl"], "expected files of one kind"),
        (["--train_file", "train.docx"], "expected files of one kind among .txt, .json"),
        (
            ["--model_overrides", "hiden_size=3"],
            "--model_overrides: unknown field hiden_size: did you mean hidden_size",
        ),
        (
            ["--max_length", "600", "--model_overrides", "mask_type=lit"],
            "the model has 512 positions",
        ),
        (
            ["--streaming", "--train_tokenizer", "--max_steps", "3"],
            "--train_tokenizer needs all of the text",
        ),
        (["--model", "MODEL", "--tokenizer", "WIDE"], "the tokenizer has 4[0-9]+ words, .* 300"),
    ],
)
def test_mistakes(folder, tmp_path, monkeypatch, argv, message):
    for name in ("train.txt", "validation.txt"):
        shutil.copy(folder / name, tmp_path)
    shutil.copy(folder / "train.txt", tmp_path / "train.docx")
    (tmp_path / "empty.txt").write_text("\n \n\n")
    (tmp_path / "x.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    wide = AutoTokenizer.from_pretrained(folder / "model")
    wide.add_tokens([f"word{n}" for n in range(3800)])
    wide.save_pretrained(tmp_path / "wide")
    names = {"MODEL": str(folder / "model"), "WIDE": "wide"}
    monkeypatch.chdir(tmp_path)
    files = [
        "--train_file",
        "train.txt",
        "--validation_file",
        "validation.txt",
        "--tokenizer",
        str(folder / "model"),
    ]
    with pytest.raises(SystemExit, match=message):
        mlm.main(
            [*files, "--model", str(ROOT / "configs/lion-s-base"), *SHORT, "--output_dir", "out"]
            + [names.get(x, x) for x in argv]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected either --train_file or --dataset"),
        (["--train_file", "x", "--dataset", "y"], "expected either --train_file or --dataset, not"),
        (["--do_train", "false"], "expected --validation_file, --test_file or --dataset"),
        (["--train_file", "x", "--do_predict"], "--do_predict without --test_file"),
        (
            ["--do_train", "false", "--do_eval", "true", "--test_file", "x"],
            "--do_eval without --validation_file: expected text to evaluate on",
        ),
        (
            ["--train_file", "x", "--max_length", "4"],
            "max_length=4: expected an integer of at least 8",
        ),
        (
            ["--train_file", "x", "--mask_probability", "1.5"],
            "mask_probability=1.5: expected a number between 0 and 1",
        ),
        (["--train_file", "x", "--validation_rows", "0"], "validation_rows=0"),
        (["--train_file", "x", "--rows", "block"], "invalid choice: 'block'"),
    ],
)
def test_mistakes_of_the_command_line(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        mlm.main([*argv, "--output_dir", "out"])
    assert message in f"{capsys.readouterr().err}{stop.value}"


def test_empty_documents_are_counted(folder, caplog):
    caplog.set_level("WARNING")
    run(folder, "counted", "--max_steps", "1")
    lines = (folder / "train.txt").read_text(encoding="utf-8").splitlines()
    empty = sum(not line.strip() for line in lines)
    assert empty > 10 and f"{empty} of {len(lines)} documents are empty and left out" in caplog.text


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs/mlm").glob("lion-*.yaml")), ids=lambda file: file.stem
)
def test_recipes_of_the_paper(file, tmp_path, capsys):
    settings = yaml.safe_load(file.read_text()) | {
        "bf16": False
    }  # which asks for a device that has it
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    types = mlm.ModelSettings, mlm.DataSettings, LionTrainingArguments
    argv = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path), "--use_cpu"]
    model, data, args = parse_settings("", *types, argv=argv)
    assert (ROOT / model.model / "config.json").is_file() and model.model == f"configs/{file.stem}"
    rows = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert rows == pytest.approx(286.72e6) and (data.max_length, data.mask_probability) == (
        128,
        0.3,
    )
    peak = 8e-4 if "base" in file.stem else 2e-4
    assert args.learning_rate == peak and args.lr_scheduler_kwargs["lr_end"] == pytest.approx(
        0.02 * peak
    )
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay) == (
        0.9,
        0.98,
        1e-6,
        1e-5,
    )
    assert args.warmup_steps == 0.06 and settings["dataset"] == "allenai/c4"


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("mlm/")])
def test_recipes_name_settings_that_there_are(name, tmp_path):
    types = mlm.ModelSettings, mlm.DataSettings, LionTrainingArguments
    argv = ["--config", name, "--bf16", "false", "--output_dir", str(tmp_path), "--use_cpu"]
    model, _, _ = parse_settings("", *types, argv=argv)
    assert model.model.startswith("outputs/") or Path(find_preset(model.model)).is_dir()


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as stop:
        mlm.main(["--help_all"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "accelerate launch" in text and "(default: packed)" not in text
    for cls in (mlm.ModelSettings, mlm.DataSettings, LionTrainingArguments):
        for field in fields(cls):
            assert f"--{field.name}" in text or not field.init, field.name
            if cls is not LionTrainingArguments:
                assert re.search(r"[A-Za-z]", field.metadata["help"])
