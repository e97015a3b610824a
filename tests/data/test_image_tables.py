"""Parquet files of pictures: whose classes count, and which file is read."""

import io
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from support.images import noise

from lion_hf.data.images import read_images


def png() -> bytes:
    data = io.BytesIO()
    noise(0).save(data, "png")
    return data.getvalue()


def write(file: Path, labels: list, names: list[str] | None = None) -> str:
    """Writes a row per label: a class's number if there are names, else its text."""
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = {"image": [{"bytes": png(), "path": None}] * len(labels), "label": labels}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return str(file)


@pytest.mark.parametrize(
    "labels, names",
    [([0, 1, 1], ["dog", "cat"]), (["dog", "cat", "cat"], None)],
    ids=["numbers in another order", "text"],
)
@pytest.mark.parametrize("text", [False, True])
def test_each_file_has_its_own_numbers_of_classes(tmp_path, labels, names, text):
    train = (["cat", "dog"], None) if text else ([0, 1], ["cat", "dog"])
    write(tmp_path / "train.parquet", *train)
    write(tmp_path / "validation.parquet", labels, names)
    first, second = read_images(str(tmp_path))
    assert first.names == second.names == ["cat", "dog"]
    assert first.labels.tolist() == [0, 1] and second.labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize("other", [([0, 1], ["dog", "cat"]), (["cat", "dog"], None)])
def test_files_of_one_part_agree_on_the_classes(tmp_path, other):
    for part in ("train-0", "val"):
        write(tmp_path / f"{part}.parquet", [0, 1], ["cat", "dog"])
    write(tmp_path / "train-1.parquet", *other)
    with pytest.raises(ValueError, match="'label' of .*train-1.parquet are not those of .*train-0"):
        read_images(str(tmp_path))


def test_files_of_a_folder_as_dataset_agree_on_the_classes(tmp_path):
    for part, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        write(tmp_path / f"{part}.parquet", [0, 1], names)
    with pytest.raises(ValueError, match="'label' of .*train.parquet are not those of .*test.parq"):
        read_images(dataset=str(tmp_path))


def test_other_files_of_a_folder_as_dataset_do_not_count(tmp_path):
    """Those of another configuration, and what macOS leaves beside files."""
    settings = ["configs:"]
    for name, names in (("one", ["cat", "dog"]), ("two", ["dog", "cat"]), ("odd", ["cow"])):
        settings += [f"- config_name: {name}", "  data_files:"]
        for part in ("train", "test"):
            file = tmp_path / name / f"{part}.parquet"
            write(file, [0], names if (name, part) != ("odd", "test") else ["pig"])
            settings += [f"  - split: {part}", f"    path: {name}/{part}.parquet"]
    settings[1] += "\n  default: true"
    (tmp_path / "README.md").write_text("\n".join(["---", *settings, "---", ""]))
    (tmp_path / "one/._train.parquet").write_bytes(b"no table")
    found = [read_images(dataset=str(tmp_path), dataset_config=x)[1].names for x in (None, "two")]
    assert found == [["cat", "dog"], ["dog", "cat"]]
    with pytest.raises(ValueError, match="'label' of .*odd/train.parquet are not those of"):
        read_images(dataset=str(tmp_path), dataset_config="odd")


@pytest.mark.parametrize("part", ["train-1", "val"])
def test_integers_without_names_are_numbers_of_the_named_classes(tmp_path, part):
    """As files are that a program without `datasets` wrote beside those of the Hub."""
    for name in ("train-0", "val"):
        write(tmp_path / f"{name}.parquet", [0, 1], ["dog", "cat"])
    rows = pyarrow.table({"image": [{"bytes": png(), "path": None}] * 2, "label": [1, 0]})
    pyarrow.parquet.write_table(rows, tmp_path / f"{part}.parquet")
    first, second = read_images(str(tmp_path))
    assert first.names == second.names == ["dog", "cat"]
    expected = [[0, 1, 1, 0], [0, 1]] if part == "train-1" else [[0, 1], [1, 0]]
    assert [x.labels.tolist() for x in (first, second)] == expected


def test_names_are_no_patterns(tmp_path):
    for folder, names in (("data[1]", ["cat", "dog"]), ("data1", ["cow", "pig"])):
        for part in ("train", "val"):
            write(tmp_path / folder / f"{part}.parquet", [0, 1], names)
    assert read_images(str(tmp_path / "data[1]"))[0].names == ["cat", "dog"]


def test_a_file_replaced_within_a_tick_of_the_clock_is_read_again(tmp_path):
    file = tmp_path / "rows.parquet"
    for labels in ([0, 1, 1], [1, 0, 0]):
        write(file, labels, ["cat", "dog"])
        os.utime(file, (1e9, 1e9))
        found, _ = read_images(train_file=str(file), validation_file=str(file))
        assert found.labels.tolist() == labels


def test_a_single_class_is_not_trained(tmp_path):
    file = write(tmp_path / "rows.parquet", ["cat"] * 3)
    with pytest.raises(ValueError, match="every row of .*rows.parquet has the class 'cat'"):
        read_images(train_file=file, validation_file=file)


def test_a_file_without_rows_and_one_without_the_column(tmp_path):
    write(tmp_path / "train.parquet", ["cat", "dog"])
    empty = pyarrow.table({"image": [], "label": []})  # of no type
    pyarrow.parquet.write_table(empty, tmp_path / "train-2.parquet")
    write(tmp_path / "val.parquet", ["dog"])
    assert [x.labels.tolist() for x in read_images(str(tmp_path))] == [[0, 1], [1]]
    write(tmp_path / "val.parquet", [])
    with pytest.raises(ValueError, match="val.parquet cannot be read as images: there are no rows"):
        read_images(str(tmp_path))
    other = datasets.Dataset.from_list([{"image": {"bytes": png(), "path": None}, "class": "cat"}])
    other.to_parquet(tmp_path / "val.parquet")
    with pytest.raises(
        ValueError, match=r"'label' is not in .*val.parquet: .*\['image', 'class'\]"
    ):
        read_images(str(tmp_path))
