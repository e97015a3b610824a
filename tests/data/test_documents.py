"""Documents from files of every kind and encoding, or one line about what is wrong with them."""

import bz2
import gzip
import lzma
import os
import re
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from lion_hf.data.documents import find_files, read_files
from lion_hf.data.text_files import MOST_ENLARGEMENT
from lion_hf.data.text_stream import TextStream


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(*files: str, column: str = "text", streaming: bool = False) -> list:
    return [row[column] for row in read_files(files, column, streaming)]


@pytest.mark.parametrize("name", ["a[1].txt", "b*.txt", "c?.txt", ".hidden/d.txt", "[e]/f.txt"])
def test_names_are_taken_as_they_are(name, tmp_path):
    file = write(tmp_path / name, "one\ntwo\n")
    write(tmp_path / "a1.txt", "another\n")
    assert find_files([file]) == [file] and read(file) == ["one", "two"]


def test_patterns(tmp_path):
    files = [write(tmp_path / name, "x\n") for name in ("a.txt", "b/c.txt")]
    assert find_files([f"{tmp_path}/**/*.txt"]) == files
    for pattern, message in (("*.csv", "there is no such file"), ("b", "is a folder: expected")):
        with pytest.raises(ValueError, match=message):
            find_files([f"{tmp_path}/{pattern}"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", "é\nb"),
        ("a.txt", "é\r\nb\r\n"),
        ("a.txt", "é\rb\r"),
        ("a.txt", "é\nb".encode("utf-8-sig")),
        ("a.txt", "é\nb".encode("utf-16")),
        ("a.txt.gz", gzip.compress("é\nb".encode(), mtime=0)),
        ("a.TXT", "é\nb"),
        ("a.jsonl", '{"text": "é", "n": 1}\n{"text": "b", "n": "x"}'),
        ("a.jsonl", '{"text": "é"}\n{"text": "b"}'.encode("utf-8-sig")),
        ("a.json", '[{"text": "é"}, {"text": "b"}]'),
        ("a.jsonl.gz", gzip.compress('{"text": "é"}\n{"text": "b"}'.encode(), mtime=0)),
        ("a.csv", "text,n\né,1\nb,x\n"),
        ("a.csv", "text,n\né,1\nb,x\n".encode("utf-8-sig")),
        ("a.csv", "text,n\né,1\nb,x\n".encode("utf-16")),
        ("a.csv.gz", gzip.compress("n,text\n1,é\n2,b\n".encode(), mtime=0)),
    ],
)
def test_kinds_and_encodings(name, content, streaming, tmp_path):
    assert read(write(tmp_path / name, content), streaming=streaming) == ["é", "b"]


def test_fields_of_csv_are_text(tmp_path):
    """Numbers, missing values and long fields are what the file says."""
    fields = ["007", "1e3", "NA", "null", "", "x" * 200_000]
    file = write(tmp_path / "a.csv", "\n".join(["text,n", *(f"{field},1" for field in fields)]))
    assert read(file) == fields


def test_a_replaced_file_is_read_anew(tmp_path):
    """Although it has the time and the size of the one before."""
    file = write(tmp_path / "a.txt", "one")
    before = os.stat(file)
    assert read(file) == ["one"]
    write(tmp_path / "a.txt", "two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(file) == ["two"]


def test_an_empty_file_among_others_is_left_out(tmp_path):
    assert read(write(tmp_path / "a.txt", ""), write(tmp_path / "b.txt", "x")) == ["x"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "x\ncaf\xe9".encode("latin1"), "a.txt, line 2: byte 0xe9 is not UTF-8"),
        ("a.txt", "x\ny".encode("utf-16-le"), "a.txt, line 1: a NUL character. The file is binary"),
        ("a.txt", "", "all files are empty: expected text"),
        (
            "a.gz",
            gzip.compress(b"x", mtime=0),
            "a.gz: expected files of one kind among .txt, .json",
        ),
        ("a.docx", "x", "a.docx: expected files of one kind"),
        (
            "a.txt.gz",
            gzip.compress(bytes(range(65, 90)) * 999, mtime=0)[:50],
            "a.txt.gz cannot be read: Comp",
        ),
        ("a.csv", "a,b\n1,2\n", "a.csv has no column 'text': it has a, b"),
        ("a.csv", 'text\n"x\n', "a.csv cannot be read as csv: "),
        ("a.json", '{"text": "x"}\n{"text":\n', "a.json cannot be read as json: JSON parse error"),
        ("a.json", '{"text": "x"}'.encode("utf-16"), "a.json is in UTF-16: JSON is in UTF-8, so"),
        ("a.jsonl", '{"txt": "x"}\n', "there is no column 'text': the data has txt"),
        ("a.parquet", "x", "a.parquet cannot be read as parquet: "),
        ("a.txt", bz2.compress(b"x"), "a.txt is packed (bzip2): unpack it first"),
        ("a.txt", lzma.compress(b"x"), "a.txt is packed (xz): unpack it first"),
        ("a.txt", b"PK\3\4\24\0", "a.txt is packed (zip): unpack it first"),
        (
            "a.txt.gz",
            gzip.compress(gzip.compress(b"x", mtime=0), mtime=0),
            "a.txt.gz is packed (gzip twice): unpack it first",
        ),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "all files are empty: expected text"),
        ("a.csv", "text\n", "a.csv: a header without rows: expected text"),
        ("a.csv", "text\n\n", "a.csv: a header without rows: expected text"),
        (
            "a.csv",
            'text\nplain\n\n"a, b"\nonce upon, a time\n',  # the loader would read "once upon"
            "a.csv, line 5: 2 fields, but the header has 1",
        ),
        ("a.csv.gz", gzip.compress(b"n,text\n1,x\n2\n", mtime=0), "a.csv.gz, line 3: 1 fields"),
        ("a.csv", "text,text\nx,y\n", "a.csv has 2 columns 'text': rename the others"),
        ("a::b.txt", "x", "a::b.txt: file names must not contain '::'; rename it"),
        (
            "a[1].txt.gz",
            gzip.compress(b"x", mtime=0),
            "and in those of packed files '[' and ']'; rename it",
        ),
    ],
)
def test_files_that_cannot_be_read(name, content, message, streaming, tmp_path):
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(file, streaming=streaming)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_unpacks_to_much_more_is_refused(tmp_path):
    """2.3 MB of gzipped JSON took 3.8 GB and two minutes; one text may stand for all rows."""
    packed = tmp_path / "a.txt.gz"
    with gzip.open(packed, "wb", compresslevel=1) as file:
        for _ in range(2 * MOST_ENLARGEMENT):  # MB
            file.write(b"a" * (1 << 20) + b"\n")
    with pytest.raises(ValueError, match=r"a.txt.gz unpacks to more than \d+ MB, over 100 times"):
        read(str(packed))
    rows = {"text": ["x" * 100_000] * 4000}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet cannot be read as parquet: it unpacks to 4"):
        read(str(tmp_path / "a.parquet"))
    honest = write(tmp_path / "b.txt.gz", gzip.compress(b"some text\n" * 100_000))
    assert len(read(honest)) == 100_000


def test_another_encoding_deep_in_a_file(tmp_path):
    """The table is refused by line; the stream, which gets there later, stops with a reason."""
    file = write(tmp_path / "a.txt", (b"x" * 99 + b"\n") * 150_000 + "caf\xe9\n".encode("latin1"))
    with pytest.raises(ValueError, match="a.txt, line 150001: byte 0xe9 is not UTF-8"):
        read(file)
    stream = TextStream(
        read_files([file], "text", streaming=True),
        lambda documents: [{"documents": len(documents)}],
        lambda row: row,
        buffer_size=10_000,
    )
    with pytest.raises(ValueError, match="shard 0 of the stream cannot be read on: 'utf-8' codec"):
        for _ in zip(range(99), stream):
            pass


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [{"a": 1}]])
def test_a_streamed_column_without_text(values):
    source = datasets.Dataset.from_dict({"text": values}).to_iterable_dataset()
    stream = TextStream(source, lambda documents: [], lambda row: row)
    with pytest.raises(ValueError, match="column 'text' holds (int|list|dict): expected text"):
        next(iter(stream))


def test_files_of_several_encodings(tmp_path):
    files = [write(tmp_path / f"{kind}.txt", "é".encode(kind)) for kind in ("utf-8", "utf-8-sig")]
    assert read(*files) == ["é", "é"]
    files.append(write(tmp_path / "c.txt", "é".encode("utf-16")))
    with pytest.raises(ValueError, match="some files are in utf-16, others in utf-8; convert all"):
        read(*files)
