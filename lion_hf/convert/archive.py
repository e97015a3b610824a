"""Reads the zip archives that torch.save writes.

The directory is read once, and nothing unpacks to more than the file holds.
"""

import struct
import zlib
from io import BufferedReader
from typing import NamedTuple

from .errors import ConversionError

MAGIC = b"PK\x03\x04"
MOST_ENTRIES = 100_000
MOST_DIRECTORY_BYTES = 32 * 2**20

# Layouts of the zip format (PKWARE's APPNOTE, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16), each after
# its signature.
LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
LOCATOR = struct.Struct("<4sIQI")
END_64 = struct.Struct("<4sQ2H2I4Q")
UNSET = 0xFFFFFFFF  # the true value is in the zip64 part


class Entry(NamedTuple):
    """A file in the archive: start of its header, size in bytes, checksum, and latest end."""

    start: int
    size: int
    checksum: int
    limit: int = 0


class Archive:
    """A zip archive without compression, whose directory is read once.

    Args:
        file: the open file. It must stay open while entries are read.
        name: what error messages call it.

    Raises:
        ConversionError: for a file that is truncated or no zip archive, has compressed, encrypted,
            repeated or overlapping entries, or more of them than `MOST_ENTRIES`.
    """

    def __init__(self, file: BufferedReader, name: str):
        self.file, self.name = file, name
        try:
            found = self._directory()
        except (struct.error, UnicodeDecodeError) as error:
            raise self._truncated() from error
        self.entries = found

    def read(self, name: str, most: int | None = None) -> bytearray:
        """The bytes of an entry, after the check of their number and checksum.

        Raises:
            ConversionError: if they are damaged, or more than `most`.
        """
        entry = self.entries[name]
        if most is not None and entry.size > most:
            raise self._unusual(f"{name} has {entry.size} bytes, more than {most}")
        self.file.seek(entry.start)
        header = self.file.read(LOCAL.size)
        if len(header) < LOCAL.size or header[:4] != MAGIC:
            raise self._damaged(name)
        *_, name_size, extra_size = LOCAL.unpack(header)
        if self.file.read(name_size) != name.encode():
            raise self._damaged(name)
        self.file.seek(extra_size, 1)
        if self.file.tell() + entry.size > entry.limit:
            raise self._damaged(name)
        data = bytearray(entry.size)
        if self.file.readinto(data) != entry.size or zlib.crc32(data) != entry.checksum:
            raise self._damaged(name)
        return data

    def _directory(self) -> dict[str, Entry]:
        """The entries by name, from the one directory that ends where the file does."""
        end = self.file.seek(0, 2) - END.size
        magic, *_, count, size, start, comment = self._unpack(END, end)
        if magic != b"PK\x05\x06" or comment:
            raise self._truncated()
        long = self._long_end(end)
        if long is not None:
            end, count, size, start = long
        if start + size != end:
            raise self._truncated()
        if count > MOST_ENTRIES or size > MOST_DIRECTORY_BYTES:
            raise self._unusual(f"it has {count} entries, more than {MOST_ENTRIES}")
        self.file.seek(start)
        return self._entries(self.file.read(size), count, start)

    def _long_end(self, end: int) -> tuple[int, int, int, int] | None:
        """The place of the zip64 end record, and the count, size and start that it gives.

        torch always writes one; None if there is none.
        """
        if end < LOCATOR.size + END_64.size:
            return None
        magic, _, place, _ = self._unpack(LOCATOR, end - LOCATOR.size)
        if magic != b"PK\x06\x07":
            return None
        magic, *_, count, size, start = self._unpack(END_64, end - LOCATOR.size - END_64.size)
        if magic != b"PK\x06\x06" or place != end - LOCATOR.size - END_64.size:
            raise self._truncated()
        return place, count, size, start

    def _entries(self, directory: bytes, count: int, end: int) -> dict[str, Entry]:
        entries, folded, at = {}, set(), 0
        for _ in range(count):
            name, entry, at = self._entry(directory, at)
            if name.casefold() in folded:  # other readers may take the other one
                raise self._unusual(f"{name!r} occurs twice in it")
            folded.add(name.casefold())
            entries[name] = entry
        if at != len(directory):
            raise self._truncated()
        for name in sorted(entries, key=lambda name: entries[name].start, reverse=True):
            entry = entries[name]
            if entry.start + LOCAL.size + len(name.encode()) + entry.size > end:
                raise self._unusual(
                    "its entries overlap: it would unpack to more than its own size"
                )
            entries[name] = entry._replace(limit=end)
            end = entry.start
        return entries

    def _entry(self, directory: bytes, at: int) -> tuple[str, Entry, int]:
        """Name, entry and the place behind an entry of the directory."""
        values = CENTRAL.unpack_from(directory, at)
        magic, _, _, flags, method, _, _, checksum, packed, size, *lengths = values[:13]
        start = values[-1]
        if magic != b"PK\x01\x02":
            raise self._truncated()
        at += CENTRAL.size
        name = directory[at : at + lengths[0]].decode()
        extra = directory[at + lengths[0] : at + lengths[0] + lengths[1]]
        packed, size, start = _long_values(extra, size, packed, start)
        if method or flags & 1 or packed != size:
            raise self._unusual("it is compressed: it would unpack to more than its own size")
        return name, Entry(start, size, checksum), at + sum(lengths)

    def _unpack(self, layout: struct.Struct, at: int) -> tuple:
        if at < 0:
            raise self._truncated()
        self.file.seek(at)
        return layout.unpack(self.file.read(layout.size))

    def _truncated(self) -> ConversionError:
        return ConversionError(
            f"{self.name} is truncated or no PyTorch checkpoint (a zip archive, as torch.save"
            " writes):"
            " copy or download it again"
        )

    def _damaged(self, name: str) -> ConversionError:
        return ConversionError(
            f"{self.name} is damaged ({name[:80]} fails its checksum): copy or download it again"
        )

    def _unusual(self, fault: str) -> ConversionError:
        return ConversionError(f"{self.name} is not as torch.save writes it: {fault}")


def _long_values(extra: bytes, size: int, packed: int, start: int) -> tuple[int, int, int]:
    """Packed size, size and start of an entry, from its zip64 part where they need 64 bits."""
    at = 0
    while UNSET in (size, packed, start):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            long = iter(struct.unpack_from(f"<{length // 8}Q", extra, at))
            size, packed, start = (
                next(long, UNSET) if value == UNSET else value for value in (size, packed, start)
            )
            break
        at += length
    return packed, size, start
