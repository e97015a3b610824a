"""Reads pickles as data.

Nothing that they name is imported or called. A few names stand for plain values; all others are
refused.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .errors import ConversionError

MOST_BYTES = 32 * 2**20
MOST_OPERATIONS = 2_000_000
MOST_DIMENSIONS = 8

STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}


class Broken(Exception):
    """A pickle that no writer would write."""


class Opaque:
    """Stands for a harmless object beside the weights, such as a path or a random state."""


@dataclass
class Namespace:
    """An `argparse.Namespace`: a holder of settings."""

    settings: Any = field(default_factory=dict)


class Storage(NamedTuple):
    """Numbers behind tensors: their key in the file, their type and how many there are."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet. All of its numbers lie inside its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        return _product(self.shape) * self.dtype.itemsize


OPAQUE = Opaque()
OPAQUE_NAMES = {
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    ),
    *(
        f"{module}.multiarray.{name}"
        for module in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar")
    ),
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in (
            *("set", "frozenset", "dict", "list", "tuple", "int", "long", "float", "bool"),
            *("str", "unicode"),
        )
    ),
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    "numpy.ndarray",
    "numpy.dtype",
    "datetime.datetime",
    "datetime.timedelta",
    "_codecs.encode",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch.storage.UntypedStorage",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_qtensor",
}


class Unpickler:
    """Reads one pickle after another from some bytes.

    Every operation costs time and memory that do not depend on the rest of the pickle, and there
    are at most `MOST_OPERATIONS`. Only keys that are text, whole numbers below 2^63 or None are
    kept: others are of no use here, and how long they take to hash is the file's choice.

    Args:
        data: the bytes.
        name: what error messages call the file.
    """

    def __init__(self, data: bytes | bytearray, name: str):
        self.data, self.name, self.at, self.operations = data, name, 0, 0
        self.storages: dict[str, Storage] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The next object; where it stops is the place that the next call begins at.

        Raises:
            Broken: for bytes that are no pickle of protocol 2 as torch.save writes it, or too many
                of them.
            ConversionError: for one that holds an object which is neither a tensor nor a plain
                setting.
        """
        self.stack, self.marks, self.memo = [], [], {}
        try:
            while (code := self.data[self.at]) != STOP:
                self.at += 1
                self._charge(1)
                OPERATIONS[code](self)
            self.at += 1
            return self.stack.pop()
        except (LookupError, TypeError, ValueError, OverflowError, struct.error) as error:
            if isinstance(error, ConversionError):
                raise
            raise Broken(f"{type(error).__name__} at byte {self.at}") from error

    def _charge(self, operations: int) -> None:
        self.operations += operations
        if self.operations > MOST_OPERATIONS:
            raise Broken(f"more than {MOST_OPERATIONS} operations")

    def _take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if size < 0 or self.at > len(self.data):
            raise Broken("it claims more bytes than there are")
        return bytes(self.data[start : self.at])

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _long(self) -> None:
        digits = self._take(self._number("B"))
        small = len(digits) <= 16
        self.stack.append(int.from_bytes(digits, "little", signed=True) if small else OPAQUE)

    def _bytes_as_text(self, layout: str) -> None:
        self.stack.append(self._take(self._number(layout)).decode("latin-1"))

    def _text(self) -> None:
        self.stack.append(self._take(self._number("<I")).decode("utf-8", "surrogatepass"))

    def _tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise Broken("a tuple of more items than there are")
        items = tuple(self.stack[len(self.stack) - size :])
        del self.stack[len(self.stack) - size :]
        self.stack.append(items)

    def _marked_tuple(self) -> None:
        items = self._since_mark()
        self.stack.append(tuple(items))

    def _append(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            _put(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + 1000)
        line = self._take(end - self.at).decode("utf-8")
        self.at += 1
        return line

    def _global(self) -> None:
        name = f"{self._line()}.{self._line()}"
        storage = name.removeprefix("torch.").removesuffix("Storage")
        if name in CALLS:
            self.stack.append(CALLS[name])
        elif name == f"torch.{storage}Storage" and storage in STORAGES:
            self.stack.append(STORAGES[storage])
        elif name in OPAQUE_NAMES:
            self.stack.append(OPAQUE)
        else:
            raise ConversionError(
                f"{self.name} holds {name[:80]}, which is neither a tensor nor a plain setting, so"
                " it was not loaded. If you"
                " trust the file, load it yourself and save it again with its weights and"
                " arguments only"
            )

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is OPAQUE:
            self.stack.append(OPAQUE)
            return
        if not callable(function) or not isinstance(arguments, tuple):
            raise Broken("a call of something that is not a function")
        if function is _dict and arguments and isinstance(arguments[0], list):
            self._charge(len(arguments[0]))
        self.stack.append(function(*arguments))

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Namespace):
            self.stack[-1].settings = state

    def _persistent(self) -> None:
        kind, dtype, key, _, numel, *views = self.stack.pop()
        whole = not any(view is not None for view in views[:2])
        if kind != "storage" or not whole or not isinstance(key, str) or not _is_size(numel):
            raise Broken("a storage of an unknown kind")
        storage = Storage(key, dtype if isinstance(dtype, torch.dtype) else torch.uint8, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise Broken("a storage of two sizes")
        self.stack.append(storage)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _put(target: dict, items: Any) -> None:
    for key, value in items:
        if (
            isinstance(key, str)
            or key is None
            or (isinstance(key, int) and -(2**63) <= key < 2**63)
        ):
            target[key] = value


def _dict(*arguments: Any) -> dict:
    found: dict = {}
    if arguments and isinstance(arguments[0], list):
        pairs = (pair for pair in arguments[0] if isinstance(pair, list | tuple) and len(pair) == 2)
        _put(found, pairs)
    return found


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    if (
        not isinstance(storage, Storage)
        or not isinstance(shape, tuple)
        or not isinstance(stride, tuple)
    ):
        raise Broken("a tensor without storage or sizes")
    if len(shape) > MOST_DIMENSIONS or len(shape) != len(stride):
        raise Broken(f"a tensor of {len(shape)} dimensions")
    if not all(_is_size(value) for value in (offset, *shape, *stride)):
        raise Broken("a tensor whose size is not a whole number")
    count = _product(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride)) if count else 0
    if count and (count > storage.numel or last >= storage.numel):
        raise Broken(f"a tensor claims shape {shape}, but its storage has {storage.numel} numbers")
    return StoredTensor(storage, offset, shape, stride)


def _first(tensor: Any, *_: Any) -> Any:
    return tensor


CALLS: dict[str, Callable] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _dict,
    "argparse.Namespace": lambda *_: Namespace(),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
}

STOP = ord(".")
# Code of an operation -> what it does; names and meanings are those of the standard library's
# pickletools.
OPERATIONS: dict[int, Callable[[Unpickler], Any]] = {
    0x80: lambda self: self._take(1),  # PROTO
    ord("("): lambda self: self.marks.append(len(self.stack)),  # MARK
    ord(")"): lambda self: self.stack.append(()),
    ord("]"): lambda self: self.stack.append([]),
    ord("}"): lambda self: self.stack.append({}),
    ord("N"): lambda self: self.stack.append(None),
    0x88: lambda self: self.stack.append(True),
    0x89: lambda self: self.stack.append(False),
    ord("J"): lambda self: self.stack.append(self._number("<i")),  # BININT
    ord("K"): lambda self: self.stack.append(self._number("B")),  # BININT1
    ord("M"): lambda self: self.stack.append(self._number("<H")),  # BININT2
    0x8A: Unpickler._long,  # LONG1
    ord("G"): lambda self: self.stack.append(self._number(">d")),  # BINFLOAT
    ord("X"): Unpickler._text,  # BINUNICODE
    ord("T"): lambda self: self._bytes_as_text("<I"),  # BINSTRING
    ord("U"): lambda self: self._bytes_as_text("B"),  # SHORT_BINSTRING
    ord("B"): lambda self: self._bytes_as_text("<I"),  # BINBYTES
    ord("C"): lambda self: self._bytes_as_text("B"),  # SHORT_BINBYTES
    0x85: lambda self: self._tuple(1),
    0x86: lambda self: self._tuple(2),
    0x87: lambda self: self._tuple(3),
    ord("t"): Unpickler._marked_tuple,
    ord("a"): lambda self: self._append([self.stack.pop()]),
    ord("e"): lambda self: self._append(self._since_mark()),
    ord("s"): Unpickler._set_item,
    ord("u"): lambda self: self._set_items(self._since_mark()),
    ord("q"): lambda self: self.memo.__setitem__(self._number("B"), self.stack[-1]),  # BINPUT
    ord("r"): lambda self: self.memo.__setitem__(self._number("<I"), self.stack[-1]),
    ord("h"): lambda self: self.stack.append(self.memo[self._number("B")]),  # BINGET
    ord("j"): lambda self: self.stack.append(self.memo[self._number("<I")]),
    ord("c"): Unpickler._global,
    ord("R"): Unpickler._call,  # REDUCE
    0x81: Unpickler._call,  # NEWOBJ
    ord("b"): Unpickler._build,
    ord("Q"): Unpickler._persistent,  # BINPERSID
}
