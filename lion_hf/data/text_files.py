"""Text files, in UTF-8 or with a byte order mark, and one clear line about other files."""

import codecs
import gzip
from collections.abc import Iterator
from io import BufferedReader, TextIOWrapper
from pathlib import Path

_MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GZIP = b"\x1f\x8b"
_PACKED = (  # how packed files begin, and no text does
    (b"BZh91AY&SY", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"PK\3\4", "zip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (_GZIP, "gzip twice"),
)
_PIECE = 1 << 22
# What a gzipped file may become: so many times its size, and some to spare.
MOST_ENLARGEMENT, SPARE_BYTES = 100, 1 << 26


def text_encoding(path: str | Path) -> str:
    """Python's name of a text file's encoding: what its byte order mark says, else UTF-8."""
    with _open(Path(path)) as file:
        start = file.read(4)
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def check_text(path: str | Path, limit: int | None = None) -> None:
    """Checks that a file, gzipped or not, is text.

    Args:
        path: the file.
        limit: characters to look at, about; None for all.

    Raises:
        ValueError: if it cannot be read, is not text in its encoding, or holds NUL characters. It
            names the line and the cure.
    """
    read = 0
    for piece in _pieces(Path(path)):
        read += len(piece)
        if limit is not None and read >= limit:
            break


def check_unpacked(path: str | Path) -> None:
    """Unpacks a gzipped file once, to see that it does not become much larger than it is.

    Raises:
        ValueError: if it does, or cannot be read.
    """
    if not _is_packed(Path(path)):
        return
    most, found = MOST_ENLARGEMENT * Path(path).stat().st_size + SPARE_BYTES, 0
    try:
        with _open(Path(path)) as file:
            while data := file.read(_PIECE):
                found += len(data)
                if found > most:
                    raise ValueError(
                        f"{path} unpacks to more than {most / 1e6:,.0f} MB, over"
                        f" {MOST_ENLARGEMENT} times its size: if that is right, unpack it first"
                    )
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def is_empty_file(path: str | Path) -> bool:
    """Whether a file, gzipped or not, holds nothing."""
    with _open(Path(path)) as file:
        return not file.read(1)


def read_text(path: str | Path) -> str:
    """A text file without its byte order mark, with its line ends as they are.

    Raises:
        ValueError: as in `check_text`, or if it is packed, which may unpack to any size.
    """
    if _is_packed(Path(path)):
        raise ValueError(f"{path} is gzipped: unpack it first")
    return "".join(_pieces(Path(path)))


def open_text(path: str | Path) -> TextIOWrapper:
    """A text file, gzipped or not, without its byte order mark, with its line ends as they are."""
    return TextIOWrapper(_open(Path(path)), encoding=text_encoding(path), newline="")


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if _is_packed(path) else path.open("rb")


def _is_packed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_GZIP)) == _GZIP
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _pieces(path: Path) -> Iterator[str]:
    """A file's text piece by piece."""
    line = 1
    try:
        encoding = text_encoding(path)
        decoder = codecs.getincrementaldecoder(encoding)()
        with _open(path) as file:
            _check_start(path, file)
            while True:
                data = file.read(_PIECE)
                text = _decode(decoder, data, path, line)
                if "\0" in text:
                    raise ValueError(
                        f"{path}, line {line + _line_ends(text[: text.index(chr(0))])}: a NUL"
                        " character. The file is binary, or UTF-16 without a byte order mark; save"
                        " it as UTF-8"
                    )
                yield text
                line += _line_ends(text)
                if not data:
                    return
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check_start(path: Path, file: gzip.GzipFile | BufferedReader) -> None:
    """Raises ValueError if text that is left to read is packed."""
    start = file.peek(16)
    for mark, kind in _PACKED:
        if start.startswith(mark):
            raise ValueError(f"{path} is packed ({kind}): unpack it first")


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, path: Path, line: int) -> str:
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        good = error.object[: error.start].decode(error.encoding, errors="ignore")
        raise ValueError(
            f"{path}, line {line + _line_ends(good)}: byte 0x{error.object[error.start]:02x} is"
            f" not {error.encoding.upper()} ({error.reason}); convert the file, for example with"
            " `iconv -f latin1 -t utf-8`"
        ) from error


def _line_ends(text: str) -> int:
    return text.count("\n") or text.count("\r")
