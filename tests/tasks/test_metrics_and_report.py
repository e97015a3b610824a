"""GLUE's metrics against scikit-learn and scipy, tasks, averages, and labelled text."""

import csv
import json
import re
import warnings
from dataclasses import replace

import evaluate
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from scipy import stats
from sklearn import metrics as sk

from lion_hf.data.labelled_text import examples
from lion_hf.tasks.glue_data import own_task
from lion_hf.tasks.glue_tasks import ALL, SEEDS, TASKS, task_names
from lion_hf.tasks.metrics import (
    F1,
    METRICS,
    Accuracy,
    MatthewsCorrelation,
    Pearson,
    Spearman,
    ranks,
)
from lion_hf.tasks.report import save_summary, summarize, table, write_predictions

random = np.random.default_rng(0)


def both(metric, predictions, references) -> float:
    (value,) = metric().compute(predictions=predictions, references=references).values()
    assert isinstance(value, float)
    return value


CLASSES = {
    "two": random.integers(0, 2, (2, 500)),
    "five": random.integers(0, 5, (2, 500)),
    "many rows": random.integers(0, 3, (2, 400_000)),
    "agreeing": np.array([[0, 1, 1, 0], [0, 1, 1, 0]]),
    "opposite": np.array([[0, 1, 1, 0], [1, 0, 0, 1]]),
    "constant predictions": np.array([[1, 1, 1, 1], [1, 0, 0, 1]]),
    "constant references": np.array([[1, 0, 0, 1], [1, 1, 1, 1]]),
    "only zeros": np.zeros((2, 4), dtype=int),
    "only ones": np.ones((2, 4), dtype=int),
    "one row": np.array([[1], [0]]),
}


@pytest.mark.parametrize("case", CLASSES)
def test_metrics_of_classes_are_scikit_learns(case):
    predictions, references = CLASSES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            Accuracy: sk.accuracy_score(references, predictions),
            MatthewsCorrelation: sk.matthews_corrcoef(references, predictions),
        }
        if max(predictions.max(), references.max()) < 2:
            expected[F1] = sk.f1_score(references, predictions)
    for metric, value in expected.items():
        assert both(metric, predictions, references) == pytest.approx(value, abs=1e-12), metric.key


TARGETS = {
    "normal": random.normal(size=(2, 300)),
    "ties": random.integers(0, 6, (2, 300)) / 5.0,
    "correlated": np.stack([random.normal(size=50), np.arange(50)]) + np.arange(50),
    "tiny": random.normal(size=(2, 30)) * 1e-200,
    "huge": random.normal(size=(2, 30)) * 1e200,
    "far from zero": random.normal(size=(2, 30)) + 1e6,
    "two rows": np.array([[1.0, 2.0], [5.0, 3.0]]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_correlations_are_scipys(case):
    predictions, references = TARGETS[case]
    scale = (
        np.abs(predictions).max() if case in ("tiny", "huge") else 1.0
    )  # scipy's squares would not be finite
    expected = stats.pearsonr(predictions / scale, references / scale).statistic
    assert both(Pearson, predictions, references) == pytest.approx(expected, abs=1e-10)
    assert both(Spearman, predictions, references) == pytest.approx(
        stats.spearmanr(predictions, references).statistic, abs=1e-12
    )
    np.testing.assert_array_equal(ranks(predictions), stats.rankdata(predictions))


@pytest.mark.parametrize("metric", (Pearson, Spearman))
def test_constant_predictions_correlate_with_nothing(metric):
    """0, where scipy has nan, which would make every mean nan; also if sums do not cancel."""
    varied = random.normal(size=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(stats.pearsonr(np.full(7, 0.1), varied).statistic)
    assert both(metric, np.full(7, 0.1), varied) == both(metric, varied, np.full(7, 0.1)) == 0.0
    assert both(metric, [2.5], [1.0]) == 0.0


def test_metrics_refuse_what_they_cannot_mean():
    for metric in METRICS.values():
        with pytest.raises(ValueError, match=f"{metric.key} of no predictions"):
            metric().compute(predictions=[], references=[])
    for metric in (Pearson, Spearman):
        with pytest.raises(ValueError, match=f"{metric.key}: 1 of 3 predictions are not finite"):
            metric().compute(predictions=[1.0, np.nan, 2.0], references=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=re.escape("f1 of classes [0, 1, 2]: expected 0 and 1")):
        F1().compute(predictions=[0, 1], references=[2, 1])


def test_metrics_work_as_evaluates_do():
    """In batches, and combined."""
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add(prediction=1, reference=1)
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}
    combined = evaluate.combine([Accuracy(), F1()])
    assert combined.compute(predictions=[0, 1], references=[0, 1]) == {"accuracy": 1.0, "f1": 1.0}


def test_tasks_are_the_papers():
    """Epochs, batch, seeds and weight decay of each task, as the design lists them."""
    listed = """mnli 3 48 1 5e-6, qqp 5 16 1 3e-6, qnli 10 16 1 1e-6, sst2 3 16 3 3e-6,
    cola 10 32 4 1e-6, mrpc 10 32 5 8e-6, rte 2 16 5 1e-6, stsb 8 32 5 3e-6"""
    rows = {row.split()[0]: [float(x) for x in row.split()[1:]] for row in listed.split(",")}
    assert {
        n: [t.epochs, t.batch_size, t.seeds, t.weight_decay]
        for n, t in TASKS.items()
        if n != "wnli"
    } == rows
    assert {t.learning_rate for t in TASKS.values()} == {1e-5} and SEEDS == (
        19,
        8364,
        717,
        10536,
        90166,
    )
    assert {n for n, t in TASKS.items() if t.from_mnli} == {"rte", "mrpc", "stsb"}
    for task in TASKS.values():
        assert len(task.submission) == len(task.splits) and task.seeds <= len(SEEDS)
        assert all((METRICS[key].dtype == "float64") == (not task.classes) for key in task.metrics)


def test_task_names():
    assert task_names("all") == [*["mnli"], *[n for n in ALL if n != "mnli"]] and len(ALL) == 8
    assert task_names("RTE, mnli,rte") == ["mnli", "rte"] and task_names("wnli") == ["wnli"]
    with pytest.raises(ValueError, match="task='sst': did you mean 'sst2'"):
        task_names("cola,sst")
    with pytest.raises(ValueError, match=re.escape("task='': expected names among ('cola',")):
        task_names("")


RESULTS = {
    "mnli": {19: {"matched_accuracy": 0.8, "mismatched_accuracy": 0.9}},
    "mrpc": {19: {"accuracy": 0.7, "f1": 0.8}, 8364: {"accuracy": 0.8, "f1": 0.9}},
    "cola": {19: {"matthews_correlation": -0.1}},
}


def test_averages():
    """MNLI averages its two halves, MRPC its two metrics, then seeds; the overall score, tasks."""
    summary = summarize(RESULTS)
    scores = {name: task["score"] for name, task in summary["tasks"].items()}
    assert scores["mnli"] == {"mean": pytest.approx(0.85), "deviation": None}
    assert scores["mrpc"] == {
        "mean": pytest.approx(0.8),
        "deviation": pytest.approx(np.std([0.75, 0.85], ddof=1)),
    }
    assert summary["tasks"]["mrpc"]["metrics"]["f1"]["mean"] == pytest.approx(0.85)
    assert summary["overall"] == pytest.approx((0.85 + 0.8 - 0.1) / 3)


def test_table_in_text_markdown_json_and_picture(tmp_path):
    summary = summarize(RESULTS)
    lines = table(summary).splitlines()
    assert " ".join(lines[2].split()) == "mrpc 2 80.00 7.07 accuracy 75.00 ± 7.07, f1 85.00 ± 7.07"
    assert lines[1].split()[:4] == ["mnli", "1", "85.00", "-"]
    assert lines[-1].split()[:2] == ["overall", "51.67"]
    assert len(table(summarize({"mrpc": RESULTS["mrpc"]})).splitlines()) == 2, (
        "no overall score of one task"
    )
    save_summary(summary, tmp_path, "GLUE")
    assert json.loads((tmp_path / "results.json").read_text()) == summary
    assert (
        "| mrpc | 2 | 80.00 | 7.07 | accuracy 75.00 ± 7.07, f1 85.00 ± 7.07 |"
        in (tmp_path / "results.md").read_text()
    )
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "task, values, expected",
    [
        ("cola", [1, 0], "index\tprediction\n0\t1\n1\t0\n"),
        ("rte", [1, 0], "index\tprediction\n0\tnot_entailment\n1\tentailment\n"),
        ("stsb", [5.2, 1.23456], "index\tprediction\n0\t5.000\n1\t1.235\n"),
    ],
)
def test_submission_files(task, values, expected, tmp_path):
    write_predictions(tmp_path / "x.tsv", values, TASKS[task])
    assert (tmp_path / "x.tsv").read_text() == expected


def test_own_targets_are_not_rounded(tmp_path):
    values = np.float32([1.5e-5, -2e7 / 3, 5.2]).astype(np.float64)
    write_predictions(tmp_path / "x.tsv", values, replace(TASKS["stsb"], submission=("own.tsv",)))
    lines = (tmp_path / "x.tsv").read_text().splitlines()[1:]
    assert [np.float32(line.split("\t")[1]) for line in lines] == values.tolist()


def test_names_of_classes_with_tabs_and_lines_stay_one_field(tmp_path):
    task = replace(TASKS["rte"], classes=("a\tb", "c\nd"))
    write_predictions(tmp_path / "x.tsv", [1, 0], task)
    with (tmp_path / "x.tsv").open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows == [["index", "prediction"], ["0", "c\nd"], ["1", "a\tb"]]


def test_broken_logits_are_no_predictions():
    with pytest.raises(ValueError, match="not finite for 1 of 2 rows"):
        TASKS["cola"].predictions(np.array([[0.0, 1.0], [np.nan, 1.0]]))


@pytest.mark.parametrize(
    "labels, classes",
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        (["10", "2", "2"], ("2", "10")),
        (["007", "7", "07"], ("007", "07", "7")),
        ([2, 30_000_000, 2], ("2", "30000000")),
        ([True, False, True], ("False", "True")),
        (["0.5", "1", "2"], ("0.5", "1", "2")),
        ([0.5, 1.0, 2.0], ()),
        ([1.0, 3.0, 1.0], ()),
    ],
)
def test_own_labels(labels, classes):
    data = Dataset.from_dict({"text": ["a", "b", "c"], "id": [7, 8, 9], "label": labels})
    task = own_task(data, "train.csv")
    assert task.sentences == ("text",) and task.classes == classes
    numbers = examples(data, "train.csv", task).data["labels"]
    assert list(numbers) == ([classes.index(str(x)) for x in labels] if classes else labels)


def test_names_of_class_labels_are_kept():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    task = own_task(data, "train.parquet")
    assert task.classes == ("good", "bad"), "not in alphabetic order"
    other = Dataset.from_dict({"text": ["c", "d"], "label": ["bad", "good"]})
    assert list(examples(other, "validation.csv", task).data["labels"]) == [1, 0]


def test_a_column_of_sentences_holds_text():
    data = Dataset.from_dict({"text": [["a"], ["b"]], "label": ["x", "y"]})
    with pytest.raises(ValueError, match="column 'text' of t.csv holds List.*: expected text"):
        own_task(data, "t.csv")


def test_a_renamed_class_is_other_data():
    digests = set()
    for names in (["x", "y"], ["x", "z"]):
        data = Dataset.from_dict({"text": ["a", "b"], "label": names})
        digests.add(examples(data, "t.csv", own_task(data, "t.csv")).digest)
    assert len(digests) == 2


def test_own_integers_may_be_a_real_valued_target():
    data = Dataset.from_dict({"review": ["a", "b", "c"], "label": ["1", "2", "3"]})
    task = own_task(data, "train.csv", regression=True)
    assert (
        task.classes == ()
        and task.metrics == ("pearson", "spearmanr")
        and task.sentences == ("review",)
    )
    assert list(examples(data, "train.csv", task).data["labels"]) == [1.0, 2.0, 3.0]


PAIRS = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": ["x", "y"]}


@pytest.mark.parametrize(
    "columns, options, message",
    [
        (
            PAIRS,
            {"sentences": ["premise"]},
            "column 'premise' is not in t.csv: its columns are ['sentence1', 'sent",
        ),
        (PAIRS, {"label": "stars"}, "column 'stars' is not in t.csv"),
        (
            {"a": ["x"], "b": ["y"]},
            {},
            "label_column: none of ('label', 'labels', 'target', 'class', 'score') is in t.csv",
        ),
        (
            {"text": ["x"], "label": ["y"], "labels": ["z"]},
            {},
            "label_column: t.csv has the columns label, labels; name the one that is meant",
        ),
        (
            {"a": ["x"], "b": ["y"], "label": ["z"]},
            {},
            "sentence1_column: it is not clear which of the columns ['a', 'b', 'label']",
        ),
        (
            {"text": ["x", "y"], "label": ["z", "z"]},
            {},
            "label: every row of t.csv has the class 'z'",
        ),
        (
            {"text": ["x", "y"], "label": ["z", None]},
            {},
            "label is missing in 1 of 2 rows of t.csv, first in row 2",
        ),
        (
            {"text": ["x"] * 30, "label": list(map(str, range(30)))},
            {},
            "label: 30 classes in the 30 rows of t.csv",
        ),
        (
            PAIRS,
            {"metrics": ["pearson"]},
            "metrics='pearson': expected among ['accuracy', 'f1', 'matthews_correlation'] for 2",
        ),
        (
            {"text": list("xyz"), "label": list("abc")},
            {"metrics": ["f1"]},
            "metrics='f1': expected among ['accuracy', 'matt",
        ),
    ],
)
def test_own_data_that_cannot_be_meant(columns, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        own_task(Dataset.from_dict(columns), "t.csv", **options)


@pytest.mark.parametrize(
    "task, labels, message",
    [
        (
            "rte",
            [0, 2],
            "label='2' in row 2 of t.csv (1 such): expected one of ('entailment', 'not_entailment',"
            " '0', '1')",
        ),
        ("rte", [-1, -1], "label='-1' in row 1 of t.csv (2 such)"),
        ("rte", ["entailment", "neutral"], "label='neutral' in row 2"),
        (
            "stsb",
            ["4.5", "high"],
            "label='high' in row 2 of t.csv (1 such): expected a finite number",
        ),
        ("stsb", ["4.5", "inf"], "label='inf' in row 2"),
        ("stsb", [4.5, None], "label is missing in 1 of 2 rows"),
        ("stsb", [4.5, float("nan")], "label is missing in 1 of 2 rows"),
    ],
)
def test_labels_outside_of_the_task(task, labels, message):
    data = Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": labels})
    with pytest.raises(ValueError, match=re.escape(message)):
        examples(data, "t.csv", TASKS[task])


def test_unseen_class_and_numbers_of_own_classes_are_refused():
    """A user's classes are known by name only: 0 is not the first of them."""
    task = own_task(Dataset.from_dict(PAIRS), "train.csv")
    for label in ("z", 0):
        data = Dataset.from_dict({**PAIRS, "label": [label, label]})
        with pytest.raises(
            ValueError,
            match=re.escape(
                f"label='{label}' in row 1 of validation.csv (2 such): expected one of ('x', 'y')"
            ),
        ):
            examples(data, "validation.csv", task)


def test_rows_without_text_are_left_out_and_counted():
    columns = {
        "sentence1": ["a", "", "c", " "],
        "sentence2": ["e", "f", None, "h"],
        "label": [0, 1, 0, 1],
    }
    found = examples(Dataset.from_dict(columns), "t.csv", TASKS["rte"])
    assert found.skipped == 3 and found.data.to_dict() == {
        "sentence1": ["a"],
        "sentence2": ["e"],
        "labels": [0],
    }
    assert found.counts == {"entailment": 1}
    whole = examples(Dataset.from_dict(columns), "t.csv", TASKS["rte"], labelled=False)
    assert (
        whole.skipped == 0
        and whole.data.column_names == ["sentence1", "sentence2"]
        and len(whole.data) == 4
    )
    with pytest.raises(
        ValueError, match=re.escape("every row of ['sentence1', 'sentence2'] is empty")
    ):
        examples(Dataset.from_dict({**columns, "sentence1": [""] * 4}), "t.csv", TASKS["rte"])


def test_digest_follows_texts_and_labels():
    digests = {
        examples(
            Dataset.from_dict({"sentence": [text], "label": [label]}), "t.csv", TASKS["cola"]
        ).digest
        for text, label in (("a", 0), ("a", 1), ("b", 0), ("a", "unacceptable"))
    }
    assert len(digests) == 3, "a name and its number are the same label"
