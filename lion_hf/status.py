"""How a command ends: its exit status, and its last line on stderr."""

import sys
from typing import NoReturn

FAILED = 1  # the work failed, such as on a full disk, or the user declined it
MISTAKEN = 2  # arguments, settings or data do not fit; also argparse's
INTERRUPTED = 130  # what shells give for Ctrl-C
MISTAKES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
FAILURES = (OSError, FloatingPointError)


def status_of(error: Exception) -> int:
    """Prints an error of `MISTAKES` or `FAILURES` in one line; returns the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return MISTAKEN if isinstance(error, MISTAKES) else FAILED


def stop(message: str) -> NoReturn:
    """Ends the process for a mistake of the user.

    Raises:
        SystemExit: always; with the message as its text, which is on stderr too.
    """
    print(message, file=sys.stderr)
    end = SystemExit(message)
    end.code = MISTAKEN
    raise end
