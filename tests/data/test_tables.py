"""Tables from files: read alike from every format, with their types, or refused in one line."""

import csv
import gzip
import json
import re

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from lion_hf.data.tables import read_table


def test_files_are_read_alike(tmp_path):
    """The same rows, with commas, quotes, line breaks and separators of Unicode, everywhere."""
    texts = ['a, "b"', "two\nlines", "None", "null", "a\u2028b\x0b c", "é"]
    expected = Dataset.from_dict({"sentence": texts, "label": list("010101")})
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    (tmp_path / "a.csv").write_text(
        "sentence,label\n" + "".join(f"{t},{i % 2}\n" for i, t in enumerate(quoted))
    )
    expected.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in expected) + "\n\n"
    )
    (tmp_path / "a.json").write_text(json.dumps(list(expected)))
    for suffix in ("csv", "parquet", "jsonl", "json"):
        assert read_table(tmp_path / f"a.{suffix}").to_dict() == expected.to_dict(), suffix


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends(encoding, end, tmp_path):
    (tmp_path / "a.csv").write_bytes(end.join(["text,label", "é,1", "b,0"]).encode(encoding))
    (tmp_path / "a.jsonl").write_bytes(
        end.join(['{"text": "é", "label": "1"}', '{"text": "b", "label": "0"}']).encode(encoding)
    )
    for name in ("a.csv", "a.jsonl"):
        data = read_table(tmp_path / name).to_dict()
        assert data == {"text": ["é", "b"], "label": ["1", "0"]}, name


def test_long_fields_of_csv(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text,label\n{'x' * 200_000},1\n")
    assert len(read_table(tmp_path / "a.csv")["text"][0]) == 200_000
    assert csv.field_size_limit() == limit


def test_parquet_keeps_its_types(tmp_path):
    features = Features(
        {"label": ClassLabel(names=["b", "a"]), "tags": List(Value("string")), "x": Value("int8")}
    )
    data = Dataset.from_dict({"label": [1, 0], "tags": [["u"], []], "x": [1, 2]}, features=features)
    folder = tmp_path / "label=3"  # which pyarrow would take for a column
    folder.mkdir()
    data.to_parquet(folder / "a.parquet")
    found = read_table(folder / "a.parquet")
    assert found.features == features and found.to_dict() == data.to_dict()


def test_parquet_of_pandas(tmp_path):
    frame = pandas.DataFrame({"label": pandas.Categorical(["x", "y", "x"]), "n": [1, 2, 3]})
    frame[frame.n != 2].to_parquet(tmp_path / "a.parquet")  # with a column of the rows' names
    assert read_table(tmp_path / "a.parquet").to_dict() == {"label": ["x", "x"], "n": [1, 3]}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "x", "expected a file that ends in one of ('.csv', '.json', '.jsonl', '.parquet"),
        ("a.csv.gz", "x", "'.parquet'); unpack it first"),
        ("a.csv", "text,label\nx,1\ny,1,2\n", "a.csv, line 3: 3 fields, but the header has 2"),
        ("a.csv", 'text,label\n"x,1\n', "a.csv, line 2: unexpected end of data"),
        ("a.csv", "text,label\n", "a.csv: holds no rows"),
        ("a.csv", "text,text\nx,1\n", "two columns have the same name: ['text', 'text']"),
        ("a.csv", "", "a.csv: holds no rows"),
        (
            "a.csv",
            "text,label\nx,1\ncaf\xe9,1\n".encode("latin1"),
            "a.csv, line 3: byte 0xe9 is not",
        ),
        ("a.csv", "text\nx\n".encode("utf-16-le"), "a.csv, line 1: a NUL character"),
        ("a.csv", b"text\nx\ny\0\n", "a.csv, line 3: a NUL character"),
        ("a.jsonl", "", "a.jsonl: holds no rows"),
        ("a.json", "[]", "a.json: holds no rows"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl, line 2: Expecting value"),
        ("a.json", '[{"text": "x"},\n{"text": ]', "a.json, line 2: Expecting value"),
        ("a.jsonl", "1\n", "a.jsonl, row 1: expected an object"),
        (
            "a.json",
            '{\n "data": []\n}',
            "expected one object per line, or a list of objects",
        ),
        ("a.jsonl", '{"a": "x"}{"a": "y"}', "Extra data; expected one object per line, or a list"),
        ("a.jsonl", '{"a": "x"}\n{"a": 1}\n', "values of one type: it holds int, str ("),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": "x"}\n',
            "a.jsonl: column 'a' cannot be read as values of one",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": true}\n',
            "a.jsonl: column 'a' cannot be read as values of one",
        ),
        ("a.jsonl", '{"a": 12345678901234567890}\n', "column 'a' has an integer of more than 64"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}\n", "a.jsonl, line 1: Exceeds the limit"),
        ("a.json", "[" * 200_000, "a.json, line 1: "),
        ("a.jsonl", '{"a": "\\ud800"}\n', "a.jsonl: column 'a' cannot be read as values of one"),
        ("a.parquet", "x", "a.parquet: cannot be read as parquet"),
        ("a.parquet", "", "a.parquet: cannot be read as parquet"),
        (None, None, "b.csv: there is no such file"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    if name:
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_table(tmp_path / (name or "b.csv"))
    assert "\n" not in str(caught.value)


def test_features_that_cannot_be_read(tmp_path):
    info = json.dumps({"info": {"features": {"a": {"_type": "Nothing"}}}})
    table = pyarrow.table({"a": [1]}).replace_schema_metadata({"huggingface": info})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: cannot be read as parquet: Feature type"):
        read_table(tmp_path / "a.parquet")


def test_a_few_bytes_do_not_become_a_large_table(tmp_path):
    text = pyarrow.table({"text": ["x" * 100_000] * 100})
    with pyarrow.parquet.ParquetWriter(tmp_path / "text.parquet", text.schema) as writer:
        for _ in range(100):
            writer.write_table(text)
    empty = pyarrow.array([0]).take(pyarrow.array(np.zeros(40_000_000, np.int8)))
    packed = gzip.compress(b"text\n" + b"a" * 10**6)
    nested = '[{"a":' + "[" * 900 + "]" * 900 + "}]"
    pyarrow.parquet.write_table(pyarrow.table({"label": empty}), tmp_path / "rows.parquet")
    (tmp_path / "packed.csv").write_bytes(packed)
    (tmp_path / "keys.json").write_text("\n".join(f'{{"{n}": 1}}' for n in range(10_000)))
    (tmp_path / "nested.json").write_text(nested)
    for name, message in (
        ("text.parquet", "unpacks to .* MB or more"),
        ("rows.parquet", "unpacks to 320 MB or more"),
        ("packed.csv", "is gzipped: unpack it first"),
        ("keys.json", "10,000 columns, but only 10,000 values"),
        ("nested.json", "nested too deeply"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read_table(tmp_path / name)
        assert name in str(error.value)
