"""`lion-hf glue` on tiny files: all tasks, own data, skipped and resumed runs, and mistakes."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from support.launches import TORCHRUN, start
from support.models import SPECIAL_TOKENS, image_config, model, text_config
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    pipeline,
)

from lion_hf.tasks import glue
from lion_hf.tasks.glue_tasks import TASKS, read_recipes

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "run_scripts" / "run_glue.py"
WORDS = [
    "good",
    "bad",
    "film",
    "the",
    "was",
    "not",
    "very",
    "dull",
    "fine",
    "lion",
    "reads",
    "text",
    "in",
    "both",
    "ways",
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
]
QUICK = ["--report_to", "none", "--peak_tflops", "1", "--disable_tqdm", "true", "--use_cpu", "true"]
ONCE = [*QUICK, "--eval_strategy", "no", "--save_strategy", "no", "--max_steps", "2"]


@pytest.fixture(scope="module")
def script():
    """The command as a module."""
    return glue


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with tokenizer, GLUE's nine tasks, and a user's own files."""
    folder = tmp_path_factory.mktemp("glue")
    options = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "sparse_prediction": True,
    }  # as from run_mlm.py
    network = model("MaskedLM", text_config("decay", **options))
    network.save_pretrained(folder / "model")
    tokenizer = BertTokenizer(
        vocab={word: number for number, word in enumerate([*SPECIAL_TOKENS, *WORDS])}
    )
    tokenizer.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")

    draw = random.Random(0)
    sentence = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))  # noqa: E731
    for place, (name, task) in enumerate(TASKS.items()):
        for split in ("train", *(split for split, _ in task.splits), *task.test_splits):
            rows = 12 if split == "train" else 5
            labels = [
                number % max(1, len(task.classes)) if task.classes else number % 6 * 0.9
                for number in range(rows)
            ]
            columns = {column: [sentence() for _ in range(rows)] for column in task.sentences}
            data = Dataset.from_dict(
                {
                    **columns,
                    "label": [-1] * rows if "test" in split else labels,
                    "idx": list(range(rows)),
                }
            )
            (folder / "glue" / name).mkdir(parents=True, exist_ok=True)
            kind = ("csv", "json", "parquet")[place % 3]
            getattr(data, f"to_{kind}")(
                folder / "glue" / name / f"{split}.{'jsonl' if kind == 'json' else kind}"
            )
    for split, rows in (("train", 48), ("validation", 16)):
        good = [draw.random() < 0.5 for _ in range(rows)]
        lines = [
            f'"the film, was {["bad", "good"][x]} {sentence()}",{["neg", "pos"][x]}' for x in good
        ]
        (folder / f"{split}.csv").write_text(
            "\n".join(["review,label", *lines, " ,neg", ",pos"]) + "\n"
        )
        targets = [{"first": sentence(), "second": sentence(), "stars": x + 0.5} for x in good]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, targets)))
    return folder


@pytest.fixture(autouse=True)
def _few_curves(request, monkeypatch):
    """Only one test draws curves, which takes longer than the runs."""
    if request.function is not test_own_reviews_twice:
        monkeypatch.setattr("lion_hf.plots.plot_curves", lambda *args, **kwargs: None)


def own(folder, out, *more: str) -> list[str]:
    """A command line for the user's own reviews."""
    files = [
        "--train_file",
        str(folder / "train.csv"),
        "--validation_file",
        str(folder / "validation.csv"),
    ]
    return ["--model_name_or_path", str(folder / "model"), *files, "--output_dir", str(out), *more]


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(path).state_dict()


@pytest.mark.slow
def test_all_tasks_from_files_with_three_started_from_mnli(script, folder, tmp_path, capsys):
    """One run per task. RTE, MRPC and STS-B have MNLI's encoder, the others do not."""
    (tmp_path / "recipes.yaml").write_text("mnli: {learning_rate: 1e-1}")  # of the others 1e-5
    argv = f"--task {','.join(TASKS)} --data_dir {folder}/glue"
    argv += f" --model_name_or_path {folder}/model --output_dir {tmp_path}"
    argv += f" --start_from_mnli --predict --seeds 7 --recipes {tmp_path}/recipes.yaml"
    summary = script.main([*argv.split(), *ONCE])
    assert list(summary["tasks"]) == ["mnli", *[name for name in TASKS if name != "mnli"]]
    for name, task in summary["tasks"].items():
        expected = {prefix + key for _, prefix in TASKS[name].splits for key in TASKS[name].metrics}
        assert set(task["metrics"]) == expected and list(task["seeds"]) == ["7"]
        for file in TASKS[name].submission:
            header, *rows = (tmp_path / name / "7" / file).read_text().splitlines()
            assert header == "index\tprediction" and [row.split("\t")[0] for row in rows] == list(
                "01234"
            )
            values = {row.split("\t")[1] for row in rows}
            if TASKS[name].classes:
                assert values <= ({"0", "1"} if TASKS[name].integers else set(TASKS[name].classes))
    assert json.loads((tmp_path / "results.json").read_text()) == summary
    assert (tmp_path / "results.png").stat().st_size > 5000
    output = capsys.readouterr().out
    assert (
        re.search(r"^overall +-?\d+\.\d\d  +mean of 9 tasks$", output, re.M)
        and "mnli: train 12 rows" in output
    )

    mnli = weights(tmp_path / "mnli" / "7")
    for name in TASKS:
        own = weights(tmp_path / name / "7")
        away = (mnli["lion.pooler.dense.weight"] - own["lion.pooler.dense.weight"]).abs().max()
        assert own["classifier.weight"].shape[0] == max(1, len(TASKS[name].classes))
        assert (away < 1e-3) == (TASKS[name].from_mnli or name == "mnli"), name


@pytest.mark.slow
def test_own_reviews_twice(script, folder, tmp_path, capsys, monkeypatch):
    """Classes are learnt; a second call runs nothing; other settings are refused, or redone."""
    learn = ["--learning_rate", "1e-2", "--num_train_epochs", "6", "--total_batch_size", "8"]
    learn += ["--eval_strategy", "no"]
    argv = own(
        folder,
        tmp_path,
        *QUICK,
        *learn,
        "--seeds",
        "1",
        "2",
        "--task",
        "reviews",
        "--metrics",
        "accuracy",
        "f1",
    )
    summary = script.main([*argv, "--test_file", str(folder / "validation.csv")])
    assert summary["tasks"]["reviews"]["metrics"]["accuracy"]["mean"] > 0.9
    assert "train 48 rows (2 without text left out)" in capsys.readouterr().out
    run = tmp_path / "reviews" / "2"
    for file in (
        "curves.csv",
        "curves.png",
        "settings.yaml",
        "metrics.json",
        "README.md",
        "modeling_lion.py",
    ):
        assert (run / file).is_file(), file
    assert "# model-reviews-2\n" in (run / "README.md").read_text()
    assert not list(run.glob("checkpoint-*")), "finished runs keep no checkpoints"
    predictions = (run / "predictions.tsv").read_text().splitlines()
    assert len(predictions) == 19 and {line.split("\t")[1] for line in predictions[1:]} == {
        "neg",
        "pos",
    }
    assert (
        pipeline("text-classification", str(run))("the film was good good good")[0]["label"]
        == "pos"
    )
    assert yaml.safe_load((run / "settings.yaml").read_text())["seed"] == 2

    with monkeypatch.context() as patch:
        patch.setattr(script, "fine_tune", lambda *_: pytest.fail("a finished run was repeated"))
        (run / "predictions.tsv").unlink()
        assert script.main([*argv, "--test_file", str(folder / "validation.csv")]) == summary
        assert (run / "predictions.tsv").read_text().splitlines() == predictions, (
            "the saved model predicts"
        )
        assert "seed 2: finished before" in capsys.readouterr().out
        for option, value, message in (
            ("--learning_rate", "2e-2", "learning_rate was 0.01 and is 0.02"),
            ("--max_length", "64", "max_length was 128 and is 64"),
            (
                "--model_overrides",
                "classifier_pooling=mean",
                "model_overrides was None and is 'classifier_pooling=mean'",
            ),
        ):
            with pytest.raises(SystemExit, match=re.escape(message)):
                script.main([*argv, option, value])
    again = script.main([*argv, "--learning_rate", "2e-2", "--redo", "--max_steps", "1"])
    assert list(again["tasks"]["reviews"]["seeds"]) == ["1", "2"] and again != summary


@pytest.mark.slow
def test_other_data_and_other_weights_are_other_runs(script, folder, tmp_path):
    argv = own(folder, tmp_path / "out", *ONCE, "--seed", "3")
    script.main(argv)
    (tmp_path / "train.csv").write_text((folder / "train.csv").read_text() + "good good,pos\n")
    with pytest.raises(SystemExit, match="train data was '"):
        script.main([*argv, "--train_file", str(tmp_path / "train.csv")])
    with pytest.raises(
        SystemExit, match="made with other settings .*from_scratch was False and is True"
    ):
        script.main([*argv, "--from_scratch"])
    network = model("MaskedLM", text_config("decay", initializer_range=0.3))
    network.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="model was '"):
        script.main(
            [
                *argv,
                "--model_name_or_path",
                str(tmp_path / "model"),
                "--tokenizer_name",
                str(folder / "tokenizer"),
            ]
        )


@pytest.mark.slow
def test_an_interrupted_run_continues(script, folder, tmp_path, monkeypatch):
    """Killed in step 5 of 6, after a checkpoint at 4, it does two steps, to the same weights."""
    argv = "--max_steps 6 --save_strategy steps --save_steps 2 --seed 5 --learning_rate 1e-2"
    argv = [*QUICK, *argv.split(), "--model_overrides", "hidden_dropout_prob=0.1"]
    whole = script.main(own(folder, tmp_path / "whole", *argv))
    step, steps = script.LionTrainer.training_step, []

    def dying(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(script.LionTrainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            script.main(own(folder, tmp_path / "broken", *argv))
        with pytest.raises(SystemExit, match="learning_rate was 0.01 and is 0.1"):
            script.main(own(folder, tmp_path / "broken", *argv, "--learning_rate", "0.1"))
        with pytest.raises(SystemExit, match="resume='never', but .* holds checkpoint-4"):
            script.main(own(folder, tmp_path / "broken", *argv, "--resume", "never"))
    monkeypatch.setattr(
        script.LionTrainer,
        "training_step",
        lambda *args, **kw: steps.append(1) or step(*args, **kw),
    )
    assert script.main(own(folder, tmp_path / "broken", *argv)) == whole
    assert len(steps) == 2
    expected = weights(tmp_path / "whole" / "own" / "5")
    for name, value in weights(tmp_path / "broken" / "own" / "5").items():
        assert torch.equal(value, expected[name]), name


def test_finished_runs_are_evaluated_without_training(script, folder, tmp_path, monkeypatch):
    """The runs in output_dir; a fine-tuned model; predictions alone. Nothing is trained again."""
    out = tmp_path / "out"
    first = script.main(own(folder, out, *ONCE, "--seeds", "1", "2", "--metrics", "f1"))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    monkeypatch.setattr(script, "fine_tune", lambda *_: pytest.fail("it trains"))
    start = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(out), *QUICK]
    only = ["--do_train", "false", "--metrics", "f1"]
    files = ["--validation_file", str(folder / "validation.csv")]
    again = script.main([*start, *only, *files, "--do_eval", "true"])
    assert again == first and json.loads((out / "eval_results.json").read_text()) == first
    assert (out / "own" / "2" / "eval_metrics.json").is_file()
    assert all(file.read_bytes() == content for file, content in before.items())

    model = ["--model_name_or_path", str(out / "own" / "2"), *QUICK, *only]
    alone = script.main([*model, *files, "--do_eval", "true", "--output_dir", str(tmp_path / "x")])
    seeds = list(alone["tasks"]["own"]["seeds"].values())
    assert seeds == [first["tasks"]["own"]["seeds"]["2"]]
    (tmp_path / "new.csv").write_text("review\ngood film\nbad film\n")
    test = ["--do_predict", "true", "--test_file", str(tmp_path / "new.csv")]
    assert script.main([*model, *test, "--output_dir", str(tmp_path / "y")]) == {}
    assert len((tmp_path / "y" / "own" / "predictions.tsv").read_text().splitlines()) == 3
    assert not (tmp_path / "y" / "eval_results.json").exists()

    untrained = ["--model_name_or_path", str(folder / "model"), *QUICK, *only, *files]
    with pytest.raises(SystemExit, match="is a LionForMaskedLM, which is not fine-tuned"):
        script.main([*untrained, "--do_eval", "true", "--output_dir", str(tmp_path / "z")])
    with pytest.raises(SystemExit, match=re.escape("seeds=[3]: ")):
        script.main([*start, *only, *files, "--do_eval", "true", "--seeds", "3"])


def test_a_fine_tuned_model_is_evaluated_on_the_task_of_its_classes(script, folder, tmp_path):
    argv = f"--data_dir {folder}/glue --seed 1 --model_name_or_path {folder}/model".split()
    first = script.main([*argv, *ONCE, "--task", "rte", "--output_dir", str(tmp_path / "out")])
    only = [*QUICK, "--do_train", "false", "--do_eval", "true", "--data_dir", f"{folder}/glue"]
    only += ["--model_name_or_path", str(tmp_path / "out" / "rte" / "1")]
    only += ["--output_dir", str(tmp_path / "x")]
    again = script.main([*only, "--task", "rte", "--do_predict", "true"])
    assert again["overall"] == first["overall"] and (tmp_path / "x" / "rte" / "RTE.tsv").is_file()
    with pytest.raises(SystemExit, match="has the classes entailment, not_entailment, wnli has"):
        script.main([*only, "--task", "wnli"])  # the same classes in another order


def test_labels_of_files_are_not_numbers(script, folder, tmp_path):
    """Zip codes: "007" and "7" are two classes, with the names that the file has."""
    rows = [("007", "good film"), ("7", "bad film"), ("1e3", "fine text"), ("1000", "dull text")]
    lines = ["label,text", *(f"{label},{text}" for label, text in rows * 3)]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    argv = ["--train_file", str(tmp_path / "train.csv")]
    argv += ["--validation_file", str(tmp_path / "train.csv")]
    script.main(own(folder, tmp_path / "out", *ONCE, "--seed", "1", *argv))
    config = AutoConfig.from_pretrained(tmp_path / "out" / "own" / "1")
    assert set(config.label2id) == {"007", "7", "1e3", "1000"}


def test_redo_deletes_only_results(script, folder, tmp_path):
    """No folder outside of output_dir, no file of the user's, nothing that the run needs."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "thesis.txt").write_text("x")
    argv = own(folder, tmp_path / "out", *ONCE, "--seed", "1")
    for task in ("..", "../..", ".", str(tmp_path)):
        with pytest.raises(SystemExit):
            script.main([*argv, "--redo", "--task", task])
    foreign = tmp_path / "out" / "mine" / "1"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("x")
    script.main([*argv, "--redo", "--task", "mine"])
    (foreign / "run.json").unlink()  # as if it had been killed
    script.main([*argv, "--redo", "--task", "mine"])
    script.main(argv)
    model = tmp_path / "out" / "own" / "1"
    with pytest.raises(SystemExit, match="redo would delete model_name_or_path="):
        script.main([*argv, "--redo", "--model_name_or_path", str(model)])
    linked = tmp_path / "out" / "linked"
    linked.mkdir()
    (linked / "1").symlink_to(model)
    with pytest.raises(SystemExit, match="out/linked/1 is not a folder of its own"):
        script.main([*argv, "--redo", "--task", "linked"])
    assert (tmp_path / "1" / "thesis.txt").is_file() and (foreign / "thesis.txt").is_file()
    assert (model / "model.safetensors").is_file()


def test_own_pairs_with_a_real_valued_target_and_another_model(script, folder, tmp_path):
    """BERT from random weights, JSON lines, columns of the user's own names."""
    config = BertConfig(
        vocab_size=99,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    files = f"--train_file {folder}/train.jsonl --validation_file {folder}/validation.jsonl"
    files += f" --test_file {folder}/train.jsonl"
    columns = (
        "--sentence1_column first --sentence2_column second --label_column stars --max_length 32"
    )
    start = f"--model_name_or_path {tmp_path}/bert --tokenizer_name {folder}/tokenizer"
    start += f" --from_scratch --output_dir {tmp_path}/out"
    summary = script.main([*f"{files} {columns} {start}".split(), *ONCE, "--seed", "1"])
    assert set(summary["tasks"]["own"]["metrics"]) == {"pearson", "spearmanr"}
    config = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out" / "own" / "1"
    ).config
    assert (
        config.model_type == "bert"
        and config.num_labels == 1
        and config.problem_type == "regression"
    )
    assert re.fullmatch(
        r"0\t-?\d+\.\d+(e-\d+)?",
        (tmp_path / "out" / "own" / "1" / "predictions.tsv").read_text().splitlines()[1],
    )
    with pytest.raises(
        SystemExit, match="attention_form='chunk': .* is a bert model, which has no such setting"
    ):
        script.main([*f"{files} {columns} {start}".split(), "--attention_form", "chunk"])


ERRORS = [
    ("--task rt", "task='rt': did you mean 'rte'"),
    (
        "--task rte --data_dir {0}/nowhere",
        "rte lacks train as .csv, .json, .jsonl, .parquet; there is no such folder",
    ),
    (
        "--task rte --data_dir {0}/partial",
        "rte lacks validation as .csv, .json, .jsonl, .parquet; there is ['train.csv']",
    ),
    (
        "--task cola --data_dir {0}/renamed",
        "column 'sentence' is not in {0}/renamed/cola/train.csv: its columns are ['text', 'label",
    ),
    (
        "--task cola --data_dir {0}/range",
        "label='2' in row 2 of {0}/range/cola/train.csv (1 such): expected one of ('unacceptable'",
    ),
    (
        "--task cola --data_dir {0}/one",
        "cola: all training rows have the class 'acceptable'; expected at least two classes",
    ),
    ("--task rte", "nyu-mll/glue, rte, train cannot be read from the Hub"),
    ("--train_file {0}/no.csv --validation_file {0}/no.csv", "no.csv: there is no such file"),
    (
        "--train_file {0}/train.csv --validation_file {0}/unseen.csv",
        "label='mixed' in row 1 of {0}/unseen.csv (1 such): expected",
    ),
    (
        "--train_file {0}/train.csv --validation_file {0}/train.jsonl",
        "column 'review' is not in {0}/train.jsonl",
    ),
    (
        "{own} --sentence1_column text",
        "column 'text' is not in {0}/train.csv: its columns are ['review', 'label']",
    ),
    ("{own} --label_column stars", "column 'stars' is not in {0}/train.csv"),
    (
        "{own} --metrics rouge",
        "metrics='rouge': expected among ['accuracy', 'f1', 'matthews_correlation'] for 2 classes",
    ),
    ("{own} --attention_form chnk", "attention_form='chnk': expected one of"),
    (
        "{own} --attention_form chunk --model_overrides attention_probs_dropout_prob=0.1",
        "attention_probs_dropout_prob=0.1 with attention_form='chunk': this form stores no",
    ),
    (
        "{own} --model_overrides hidden_dropout_prob=2",
        "hidden_dropout_prob=2: expected a probability",
    ),
    (
        "{own} --model_overrides hiden_dropout_prob=0",
        "unknown field hiden_dropout_prob: did you mean hidden_dropout_prob?",
    ),
    ("{own} --seed 1 --seeds 1 2", "seeds=[1, 2] and seed=1: expected one of them"),
    (
        "{own} --model_name_or_path {0}/nowhere",
        "nowhere: expected a folder with config.json, or a name on the Hub",
    ),
    ("{own} --model_name_or_path {0}/untokenized", "untokenized has no tokenizer"),
    ("{own} --tokenizer_name {0}/words", "words has no tokenizer that can be read ("),
    (
        "{own} --model_name_or_path {0}/weightless",
        "weightless holds no weights: from_scratch starts from random ones",
    ),
    ("{own} --model_name_or_path {0}/image", "image is for images: expected a text model"),
    (
        "{own} --model_name_or_path {0}/narrow --tokenizer_name {0}/tokenizer",
        "27 words; expected at most the model's 20",
    ),
    (
        "{own} --model_name_or_path {0}/positions --tokenizer_name {0}/tokenizer",
        "max_length=128: expected at most the 64 pos",
    ),
    ("{own} --resume checkpoint-3 --seeds 1 2", "resume='checkpoint-3' with 2 runs"),
    ("{own} --resume checkpoint-3 --seeds 1", "resume='checkpoint-3': there is no such folder"),
    (
        "--task rte --data_dir {0}/glue --gradient_accumulation_steps 3",
        "rte takes batches of 16 rows, which 3 parts",
    ),
]


@pytest.fixture(scope="module")
def broken(folder):
    """What the messages are about."""
    for name, text in {
        "partial/rte/train.csv": "sentence1,sentence2,label\na,b,0\n",
        "renamed/cola/train.csv": "text,label\na,0\n",
        "range/cola/train.csv": "sentence,label\na,0\nb,2\n",
        "one/cola/train.csv": "sentence,label\na,1\nb,acceptable\n",
        "one/cola/validation.csv": "sentence,label\na,1\n",
        "unseen.csv": "review,label\ngood,mixed\n",
        "words/tokenizer.json": '{"added_tokens": [], "model": {"type": "none"}}',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    model("MaskedLM", text_config()).save_pretrained(folder / "untokenized")
    model("MaskedLM", text_config(vocab_size=20)).save_pretrained(folder / "narrow")
    model("MaskedLM", text_config("lit")).save_pretrained(folder / "positions")
    text_config().save_pretrained(folder / "weightless")
    image_config().save_pretrained(folder / "image")
    return folder


@pytest.mark.parametrize("arguments, message", ERRORS, ids=[message for _, message in ERRORS])
def test_errors_before_any_work(arguments, message, script, broken, tmp_path, monkeypatch):
    """One line with argument, value and what is expected, before anything is written."""
    monkeypatch.setattr(script, "fine_tune", lambda *_: pytest.fail("training began"))
    own_files = f"--train_file {broken}/train.csv --validation_file {broken}/validation.csv"
    argv = [
        "--model_name_or_path",
        str(broken / "model"),
        "--output_dir",
        str(tmp_path / "out"),
        *QUICK,
    ]
    with pytest.raises(SystemExit, match=re.escape(message.format(broken))) as error:
        script.main([*argv, *arguments.format(broken, own=own_files).split()])
    assert str(error.value).startswith("lion-hf glue: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "task is missing: expected names among ('cola',"),
        ("--train_file a.csv", "validation_file is missing: training on your own data needs it"),
        ("--validation_file a.csv", "train_file is missing: training on your own data needs it"),
        ("--task rte --do_train false --eval_strategy no", "there is nothing to do"),
        ("--task rte --do_train false --do_eval true --redo", "redo with do_train=False"),
        (
            "--do_train false --do_eval true --test_file a.csv",
            "do_eval without validation_file: expected data to evaluate on",
        ),
        (
            "--train_file a.csv --validation_file b.csv --do_predict true",
            "do_predict without test_file: expected data to predict",
        ),
        ("--train_file a --validation_file b --task ..", "task='..': expected a name"),
        ("--train_file a --validation_file b --task .x", "task='.x': expected a name"),
        ("--train_file a --validation_file b --task a\\b", "': expected a name for your own data"),
        ("--task rte --seeds -1", "seeds=-1: expected integers from 0 to 4294967295"),
        ("--task rte --seed 4294967296", "seed=4294967296: expected integers from 0"),
        (
            "--train_file a.csv --validation_file b.csv --task rte",
            "task='rte' with train_file: that is one of GLUE's",
        ),
        ("--train_file a.csv --validation_file b.csv --task a/b", "task='a/b': expected a name"),
        (
            "--train_file a.csv --validation_file b.csv --predict",
            "predict=True with train_file: it is for GLUE's tasks",
        ),
        ("--task rte --metrics f1", "metrics=['f1'] without train_file"),
        ("--task rte --label_column y", "label_column='y' without train_file"),
        ("--task rte --max_length 2", "max_length=2: expected at least 3"),
        (
            "--task rte --learning_rat 1",
            "unknown option --learning_rat: did you mean --learning_rate?",
        ),
    ],
)
def test_errors_of_the_command_line(arguments, message, script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(
            ["--model_name_or_path", "m", "--output_dir", str(tmp_path), *arguments.split()]
        )
    assert message in f"{capsys.readouterr().err}{stop.value}"


def test_weights_of_another_shape_are_refused(script, folder, tmp_path):
    """Only the classifier may have another number of classes than the checkpoint."""
    argv = own(folder, tmp_path, *ONCE, "--seed", "1", "--model_overrides", "intermediate_size=44")
    with pytest.raises(
        ValueError, match=re.escape("bias has shape (40,), the configuration asks for (44,)")
    ):
        script.main(argv)


def test_recipes_and_options_change_the_table(script, folder, tmp_path):
    """The file changes single tasks, an option all; the rest stays the table's."""
    (tmp_path / "recipes.yaml").write_text("rte: {epochs: 7, learning_rate: 3e-5, seeds: 2}\n")
    argv = f"--task rte,cola --data_dir {folder}/glue --model_name_or_path {folder}/model"
    argv += f" --output_dir {tmp_path}/out"
    argv = [*argv.split(), "--recipes", str(tmp_path / "recipes.yaml"), "--weight_decay", "0.5"]
    options, args = script.parse_settings(
        "", script.GlueArguments, script.GlueTrainingArguments, argv=argv
    )
    tokenizer, tasks = script.load_model_parts(options), script.load_tasks(options)
    pairs = script.plan(
        {n: (t, script.load_data(n, t, options)) for n, t in tasks.items()},
        options,
        args,
        tokenizer,
    )
    assert [(pair.name, pair.seed) for pair in pairs] == [
        *[("rte", seed) for seed in (19, 8364)],
        *[("cola", seed) for seed in (19, 8364, 717, 10536)],
    ]
    found = {
        (
            p.name,
            p.args.num_train_epochs,
            p.args.learning_rate,
            p.args.per_device_train_batch_size,
            p.args.weight_decay,
        )
        for p in pairs
    }
    assert found == {("rte", 7, 3e-5, 16, 0.5), ("cola", 10, 1e-5, 32, 0.5)}
    assert args.adam_beta2 == 0.98 and args.adam_epsilon == 1e-6 and args.warmup_steps == 0.06


@pytest.mark.parametrize(
    "text, message",
    [
        ("rt: {epochs: 3}", "did you mean 'rte'"),
        (
            "rte: {epoch: 3}",
            "'epoch' of rte: expected among ('epochs', 'batch_size', 'learning_rate', "
            "'weight_decay', 'seeds')",
        ),
        ("rte: {epochs: many}", "epochs='many' of rte: expected float > 0"),
        ("rte: {seeds: 6}", "seeds=6 of rte: expected at most 5"),
        ("rte: {batch_size: 0}", "batch_size=0 of rte: expected int > 0"),
        ("rte: {batch_size: 2.5}", "batch_size=2.5 of rte: expected int > 0"),
        ("rte: {seeds: true}", "seeds=True of rte: expected int > 0"),
        ("rte: {epochs: yes}", "epochs='yes' of rte: expected float > 0"),
        ("no: {epochs: 3}", "task='no': "),
        ("rte: 3", "expected lines such as"),
        ("rte: [", "cannot be read"),
    ],
)
def test_recipes_that_cannot_be_meant(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipes(tmp_path / "r.yaml")


def test_settings_file_of_the_paper(script, tmp_path):
    argv = [
        "--config",
        str(ROOT / "configs" / "glue.yaml"),
        "--model_name_or_path",
        "m",
        "--output_dir",
        str(tmp_path),
    ]
    options, args = script.parse_settings(
        "", script.GlueArguments, script.GlueTrainingArguments, argv=argv
    )
    assert (
        options.task == "all" and options.start_from_mnli and args.given == {"learning_rate": 1e-5}
    )


@pytest.mark.parametrize(("task", "tasks"), [("sst2", ["sst2"]), ("rte", ["mnli", "rte"])])
def test_only_tasks_that_start_from_mnli_need_it(script, task, tasks):
    options = script.GlueArguments(model_name_or_path="m", task=task, start_from_mnli=True)
    assert list(script.load_tasks(options)) == tasks


def test_help_explains_every_option(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"], prog="lion-hf glue")
    text = capsys.readouterr().out
    assert "--start_from_mnli" in text and "Starting RTE" not in text and "lion-hf glue" in text
    fields = script.GlueArguments.__dataclass_fields__
    assert all(f.metadata["help"].endswith(".") for f in fields.values())


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(script, folder, tmp_path):
    """They share the task's batch; losses, metrics and predictions are those of one process."""
    argv = [
        *QUICK,
        "--seed",
        "1",
        "--learning_rate",
        "1e-3",
        "--num_train_epochs",
        "2",
        "--save_strategy",
        "no",
    ]
    # what was not logged is in train_loss for the first process alone
    argv += ["--logging_steps", "1"]
    argv += ["--test_file", str(folder / "validation.csv")]
    one = script.main(own(folder, tmp_path / "one", *argv))
    (printed,) = start([TORCHRUN], str(SCRIPT), *own(folder, tmp_path / "two", *argv))
    assert len(re.findall(r"^own +1 ", printed, re.M)) == 1, "only process 0 prints"
    assert json.loads((tmp_path / "two" / "results.json").read_text()) == one
    runs = [tmp_path / name / "own" / "1" for name in ("one", "two")]
    first, second = (json.loads((run / "metrics.json").read_text()) for run in runs)
    for name in ("train_loss", "eval_loss"):
        assert second[name] == pytest.approx(first[name], abs=1e-5)
    assert (runs[0] / "predictions.tsv").read_text() == (runs[1] / "predictions.tsv").read_text()
