"""The error for checkpoints that cannot be converted."""

from collections.abc import Iterable

MOST_CHARACTERS = 1000
MOST_NAMES = 5  # tensors that an error lists


class ConversionError(ValueError):
    """A checkpoint that cannot be converted, or an option that is missing or does not fit.

    Args:
        message: what is wrong. Parts of it may come from the file, so it becomes one line of
            printable characters of bounded length.
    """

    def __init__(self, message: str):
        line = " ".join(str(message)[: 4 * MOST_CHARACTERS].split())
        line = "".join(character if character.isprintable() else "?" for character in line)
        short = len(line) <= MOST_CHARACTERS
        super().__init__(line if short else f"{line[: MOST_CHARACTERS - 4]} ...")


def first_names(names: Iterable[str]) -> str:
    """The first names of tensors in alphabetical order, and how many more there are."""
    names = sorted(names)
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
