"""Where pictures come from: folders and tables, hidden and broken files, classes."""

import logging
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.images import CLASSES, image_folder, noise, parquet, run

from lion_hf.data.images import (
    UNKNOWN,
    Images,
    check_readable,
    open_image,
    read_images,
    read_unlabelled,
)
from lion_hf.data.samples import SkippedSample
from lion_hf.modeling.image_processing_lion import MAX_BYTES


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An image folder with noise of three colours: train/ and validation/."""
    return image_folder(tmp_path_factory.mktemp("images"))


def test_hidden_files_and_folders_do_not_count(folder, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns("*.parquet"))
    expected = read_images(str(root))
    records = [part.record() for part in expected]
    for part in ("train", "validation"):
        for name in (
            ".ipynb_checkpoints",
            "__MACOSX",
            ".hidden",
            "@eaDir",
            "@Recycle",
            "#recycle",
            "$Recycle.Bin",
            "red/.thumbs",
            "red/__MACOSX",
        ):
            shutil.copytree(root / part / "blue", root / part / name)
        for name in ("._0.png", ".DS_Store", "Thumbs.db", "notes.txt"):
            (root / part / "green" / name).write_bytes(b"no image")
    for found, before, record in zip(read_images(str(root)), expected, records):
        assert found.names == list(CLASSES) and found.images == before.images
        assert found.record() == record  # so that a run continues


def test_links_and_suffixes(folder, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns("*.parquet"))
    (root / "train/red/0.png").rename(root / "train/red/0.PNG")
    shutil.copytree(root / "train/blue", tmp_path / "elsewhere")
    (root / "train/blue/more").symlink_to(tmp_path / "elsewhere")  # a folder of pictures
    (root / "train/blue/circle").symlink_to(root / "train")  # its parent
    (root / "train/green/circle").symlink_to(root / "train/green")
    (root / "train/green/gone.png").symlink_to(tmp_path / "nowhere")  # unreadable, not hidden
    train, _ = read_images(str(root))
    counts = [train.labels.tolist().count(number) for number in range(3)]
    assert counts[1:] == [13, 12] and counts[0] >= 24
    with pytest.raises(SkippedSample, match="gone.png"):
        open_image(str(root / "train/green/gone.png"))


def test_a_class_without_validation_images_is_named(folder, tmp_path, caplog):
    root = tmp_path / "data"
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns("*.parquet"))
    for file in (root / "validation/green").iterdir():
        file.unlink()
    with caplog.at_level(logging.WARNING):
        _, validation = read_images(str(root))
    assert set(validation.labels.tolist()) == {0, 2} and "has no images of green" in caplog.text


def test_unreadable_images_are_an_error_above_a_share(folder, tmp_path):
    files = [str(file) for file in sorted((folder / "train/red").iterdir())]
    (tmp_path / "empty.png").touch()
    part = Images([*files, str(tmp_path / "empty.png")], [0] * 13, ["red"])
    check_readable(part, "training", 0.1, MAX_BYTES)
    with pytest.raises(
        ValueError, match="1 of 13 training images .* max_unreadable=0.05.*empty.png"
    ):
        check_readable(part, "training", 0.05, MAX_BYTES)


def test_null_images_of_tables_are_unreadable(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "train")
    file = parquet(tmp_path, "train", null_first=True)
    train, _ = read_images(train_file=file, validation_file=file)
    for source in (train.images[0], None, b"", {"bytes": None, "path": None}):
        with pytest.raises(SkippedSample, match="an image of the table"):
            open_image(source)
    assert open_image(train.images[1]).mode == "RGB" and train.where(0) == "row 0"


@pytest.mark.parametrize(
    "labels, kind, names",
    [
        ([7, 30_000_000, 7], "int64", ["7", "30000000"]),
        (["007", "7", "1e3"], "string", ["007", "1e3", "7"]),
        ([True, False, True], "bool", ["False", "True"]),
    ],
    ids=["integers", "text", "booleans"],
)
def test_classes_of_tables(tmp_path, labels, kind, names):
    noise(0).save(tmp_path / "image.png")
    image = {"bytes": (tmp_path / "image.png").read_bytes(), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    rows = [{"image": image, "label": label} for label in labels]
    file = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    train, validation = read_images(train_file=file, validation_file=file)
    assert train.names == names
    assert [names[number] for number in validation.labels] == [str(label) for label in labels]


def test_tables_with_other_labels(tmp_path):
    noise(0).save(tmp_path / "image.png")
    image = {"bytes": (tmp_path / "image.png").read_bytes(), "path": None}
    for label, message in ((0.5, "holds floats"), ([1, 2], "several labels"), (None, "no labels")):
        file = str(tmp_path / f"{message[:5]}.parquet")
        datasets.Dataset.from_list([{"image": image, "label": label}] * 2).to_parquet(file)
        with pytest.raises(ValueError, match=message):
            read_images(train_file=file, validation_file=file)


def test_several_columns_of_labels_are_not_guessed(tmp_path):
    noise(0).save(tmp_path / "image.png")
    image = {"bytes": (tmp_path / "image.png").read_bytes(), "path": None}
    rows = [{"image": image, "label": n % 2, "labels": n % 3} for n in range(6)]
    file = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).to_parquet(file)
    with pytest.raises(ValueError, match="rows.parquet has the columns label, labels; name the"):
        read_images(train_file=file, validation_file=file)
    train, _ = read_images(train_file=file, validation_file=file, label_column="labels")
    assert train.names == ["0", "1", "2"]


def test_renumbering():
    part = Images(["a", "b", "c"], [0, 1, UNKNOWN], ["x", "y"])
    assert part.in_order_of(["y", "z", "x"]).labels.tolist() == [2, 0, UNKNOWN]
    assert part.in_order_of(["y", "z", "x"])[0] == ("a", 2)


def test_the_record_changes_with_the_data(folder, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns("*.parquet"))
    before = read_images(str(root))[0].record()
    assert before == read_images(str(root))[0].record() and before["images"] == 36
    os.replace(root / "train/red/1.png", root / "train/red/0.png")
    assert read_images(str(root))[0].record() != before


def test_images_to_predict(folder, tmp_path):
    part = read_unlabelled(folder / "validation", ["red", "green"])
    assert sorted(set(part.labels.tolist())) == [UNKNOWN, 0, 1] and len(part) == 15
    with pytest.raises(ValueError, match="predict_path=.*there is no such folder"):
        read_unlabelled(tmp_path / "none", ["red"])
    with pytest.raises(ValueError, match="predict_path=.*has no images"):
        read_unlabelled(tmp_path, ["red"])


def test_files_with_other_endings_are_left_out_with_a_warning(folder, tmp_path, caplog):
    root = tmp_path / "data"
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns("*.parquet"))
    count = len(read_images(str(root))[0])
    assert "left out" not in caplog.text
    for name in ("red/a.gif", "red/b.heic", "green/c.HEIC", "green/d.PNG"):
        shutil.copyfile(root / "train/red/0.png", root / "train" / name)
    assert len(read_images(str(root))[0]) == count + 1
    assert f"{root / 'train'}: left out by their endings: 1 .HEIC, 1 .gif, 1 .heic" in caplog.text
    caplog.clear()
    assert len(read_unlabelled(root / "train" / "red", ["red"])) == count / 3
    assert f"{root / 'train' / 'red'}: left out by their endings: 1 .gif, 1 .heic" in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda root: shutil.rmtree(root / "validation"),
            "expected one of val, validation, test beside train",
        ),
        (lambda root: shutil.rmtree(root / "validation/red"), r"\['red'\] are only in .*train"),
        (
            lambda root: [shutil.rmtree(root / "train" / name) for name in CLASSES[1:]],
            "1 class folders: expected at least two",
        ),
        (
            lambda root: [file.unlink() for file in (root / "train/red").iterdir()],
            "red has no images",
        ),
        (lambda root: shutil.rmtree(root), "there is no such folder"),
        (lambda root: [shutil.rmtree(file) for file in root.iterdir()], "expected folders train/"),
    ],
    ids=[
        "no validation",
        "classes differ",
        "one class",
        "empty class",
        "no folder",
        "empty folder",
    ],
)
def test_errors_of_folders(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns("*.parquet"))
    change(tmp_path / "data")
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["image_column", "label_column"])
def test_folders_have_no_columns(option, folder, tmp_path):
    words = f"{option}='x': expected none, because folders of images have no columns"
    with pytest.raises(ValueError, match=words):
        read_images(str(folder), **{option: "x"})


def test_errors_of_tables(folder, tmp_path):
    train = shutil.copy(parquet(folder, "train", lambda n: CLASSES[n]), tmp_path / "train.parquet")
    other = shutil.copy(
        parquet(folder, "validation", lambda n: f"dark {CLASSES[n]}"), tmp_path / "other.parquet"
    )
    with pytest.raises(
        ValueError, match="label='dark blue' in row 1 of .*other.parquet .*15 such.*expected one of"
    ):
        read_images(train_file=str(train), validation_file=str(other))
    with pytest.raises(ValueError, match="label_column='class': expected one of the columns"):
        read_images(train_file=str(train), validation_file=str(train), label_column="class")
    with pytest.raises(ValueError, match="validation_file='none.parquet'"):
        read_images(train_file=str(train), validation_file="none.parquet")
    with pytest.raises(ValueError, match="from nowhere"):
        read_images()


def test_a_table_that_cannot_be_read_or_is_too_large_is_named(folder, tmp_path):
    good, bad = parquet(folder, "train"), tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match="bad.parquet cannot be read as images"):
        read_images(train_file=str(bad), validation_file=good)
    row = pyarrow.array([{"bytes": b"", "path": None}])
    many = row.take(pyarrow.array(np.zeros(20_000_000, np.int8)))
    pyarrow.parquet.write_table(pyarrow.table({"image": many, "label": many.field(0)}), bad)
    with pytest.raises(ValueError, match="unpacks to [0-9]+ MB or more"):
        read_images(train_file=str(bad), validation_file=good)
