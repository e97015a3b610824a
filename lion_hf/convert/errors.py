"""The error for checkpoints that cannot be converted."""

MOST_CHARACTERS = 1000


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
