"""Finds the row for one of our tensors in a table of names."""

import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

Row = TypeVar("Row")


class Place(NamedTuple):
    """The number of a tensor's layer, and what follows its module's name, such as ".weight".

    Both are "" if there is none.
    """

    layer: str
    leaf: str


def find_row(name: str, rows: Mapping[str, Row]) -> tuple[Row, Place]:
    """The row of a tensor, or of its module, in a table with "layers.{n}." for the layers' numbers.

    Raises:
        KeyError: if there is none.
    """
    number = re.search(r"layers\.(\d+)\.", name)
    layer = number[1] if number else ""
    row = name.replace(f"layers.{layer}.", "layers.{n}.")
    if row in rows:
        return rows[row], Place(layer, "")
    module, _, leaf = row.rpartition(".")
    return rows[module], Place(layer, f".{leaf}")
