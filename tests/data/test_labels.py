"""What labels mean: text is text; only a column's type makes numbers, booleans or targets of it."""

import re

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from lion_hf.data.labels import LabelColumn


def column(values: list, feature=None) -> LabelColumn:
    features = None if feature is None else Features({"label": feature})
    return LabelColumn.of(Dataset.from_dict({"label": values}, features=features), "label", "t.csv")


@pytest.mark.parametrize(
    "first, second",
    [
        ("007", "7"),
        ("1_1", "11"),
        ("1e3", "1000"),
        ("12345678901234567890", "12345678901234567891"),
        ("nan", "inf"),
        (" 1", "1"),
        ("1.0", "1"),
        ("-0", "0"),
        ("+1", "1"),
        ("٣", "3"),
        ("True", "1"),
    ],
)
def test_different_texts_are_different_classes_with_their_own_names(first, second):
    labels = column([second, first, second])
    classes = labels.classes()
    assert set(classes) == {first, second} and len(classes) == 2
    assert [classes[number] for number in labels.numbers(classes)] == [second, first, second]


def test_classes_that_differ_in_spaces_only_are_named(caplog):
    assert column(["pos", "neg", "pos ", "neg"]).classes() == ["neg", "pos", "pos "]
    (line,) = caplog.messages
    assert "label of t.csv holds 'pos' and 'pos ', which differ in the spaces" in line
    with pytest.raises(
        ValueError, match="label is missing in 1 of 2 rows of t.csv, first in row 2"
    ):
        column(["pos", "  "]).classes()


@pytest.mark.parametrize(
    "values, feature, classes, numbers",
    [
        (["pos", "neg", "pos"], None, ["neg", "pos"], [1, 0, 1]),
        (["10", "2", "9"], None, ["2", "9", "10"], [2, 0, 1]),
        (["10", "2", "x"], None, ["10", "2", "x"], [0, 1, 2]),
        ([30_000_000, 4, 4], None, ["4", "30000000"], [1, 0, 0]),
        ([-1, 1, -1], None, ["-1", "1"], [0, 1, 0]),
        ([True, False], None, ["False", "True"], [1, 0]),
        ([1.0, 3.0, 1.0], None, ["1", "3"], [0, 1, 0]),
        (
            [0, 1, 0],
            ClassLabel(names=["good", "bad", "unused"]),
            ["good", "bad", "unused"],
            [0, 1, 0],
        ),
        (["a", "b"], Value("large_string"), ["a", "b"], [0, 1]),
    ],
)
def test_classes_follow_the_type(values, feature, classes, numbers):
    labels = column(values, feature)
    assert labels.classes() == classes and labels.numbers(classes) == numbers


def test_the_largest_integers_are_classes():
    labels = LabelColumn([2**64 - 1, 1], Value("uint64"), "label", "t.parquet")
    assert labels.classes() == ["1", "18446744073709551615"]


def test_large_integers_are_in_the_order_of_their_values():
    values = [2**60, 30, -1, -(2**62)]
    expected = [str(value) for value in sorted(values)]
    assert column(values, Value("int64")).classes() == expected
    assert column([str(value) for value in values]).classes() == expected


def test_a_float_column_is_a_target_and_text_is_one_only_on_request():
    assert column([0.5, 1.0]).is_real_valued and column([0.5], Value("float32")).is_real_valued
    for values in (["0.5", "1"], [1, 2], [True, False]):
        assert not column(values).is_real_valued
    assert column(["0.5", " 1 ", "-2e-1", "+.5"]).targets() == [0.5, 1.0, -0.2, 0.5]
    assert column([1, 2]).targets() == [1.0, 2.0]


def test_a_number_of_a_class_is_a_label_only_on_request():
    assert column(["1", "no", "0"]).numbers(["no", "yes"], by_number=True) == [1, 0, 0]
    with pytest.raises(ValueError, match=re.escape("label='1' in row 1 of t.csv (1 such)")):
        column(["1"]).numbers(["no", "yes"])
    with pytest.raises(ValueError, match=re.escape("label='0' in row 1 of t.csv (1 such)")):
        column(["0"]).numbers(["2", "10"], by_number=True)  # it would be the class "2"


def test_numbers_of_a_class_label_count_for_classes_without_names():
    labels = column([1, 0], ClassLabel(names=["bad", "good"]))
    assert labels.numbers(["LABEL_0", "LABEL_1"], by_number=True) == [1, 0]
    with pytest.raises(ValueError, match="label='good' in row 1"):
        labels.numbers(["no", "yes"], by_number=True)


def test_names_of_one_file_are_found_in_another_with_another_order():
    there = column([0, 1], ClassLabel(names=["bad", "good"]))
    assert there.numbers(["good", "bad"]) == [1, 0]
    assert column(["bad", "good"]).numbers(["good", "bad"]) == [1, 0]


@pytest.mark.parametrize(
    "values, feature, message",
    [
        ([["a"], ["a", "b"]], List(Value("string")), "problem_type='multi_label_classification'"),
        (
            [{"x": 1}],
            {"x": Value("int64")},
            "label of t.csv holds {'x': Value('int64')}: expected one label",
        ),
        ([None, None], None, "label of t.csv holds no labels"),
        ([b"a"], Value("binary"), "label of t.csv holds binary: expected one label per row"),
    ],
)
def test_types_that_hold_no_labels(values, feature, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        column(values, feature)


@pytest.mark.parametrize(
    "values, feature, message",
    [
        (["a", None], None, "label is missing in 1 of 2 rows of t.csv, first in row 2"),
        (["", "a"], None, "label is missing in 1 of 2 rows of t.csv, first in row 1"),
        ([1, None], None, "label is missing in 1 of 2 rows"),
        ([1.0, float("nan")], None, "label is missing in 1 of 2 rows"),
        ([0, -1], ClassLabel(names=["a", "b"]), "label is missing in 1 of 2 rows"),
        ([0.5, 1.0], None, "label=0.5 in row 1 of t.csv is a float, which is no class"),
        (["z"], None, "label='z' in row 1 of t.csv (1 such): expected one of ('a', 'b')"),
    ],
)
def test_labels_that_are_no_class(values, feature, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        column(values, feature).numbers(["a", "b"])


@pytest.mark.parametrize(
    "text", ["1_1", "nan", "inf", "1e999", "-1e39", "٣", "high", "0x10", "1,5"]
)
def test_texts_that_are_no_target(text):
    with pytest.raises(ValueError, match=re.escape(f"label={text!r} in row 2 of t.csv (1 such)")):
        column(["4.5", text]).targets()


def test_an_error_does_not_list_a_thousand_classes():
    classes = [f"class {number}" for number in range(1000)]
    with pytest.raises(ValueError, match=re.escape("... (1000 classes)")) as caught:
        column(["other"]).numbers(classes)
    assert len(str(caught.value)) < 600
