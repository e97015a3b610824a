"""What importing the package sets in motion, and when: registration with transformers and timm."""

import multiprocessing
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from . import moved

PACKAGE = __name__.rpartition(".")[0]
COMMAND = "lion-hf"  # as setup.py names it


def is_command_line() -> bool:
    """Whether this process is `lion-hf ...` or `python -m lion_hf ...`.

    The command line imports torch and registers LION only once it has something to run, so that
    `--help` and mistakes in the options are answered at once. Everywhere else the import of the
    package does both.
    """
    if multiprocessing.parent_process() is not None:  # a worker, which inherits sys.argv
        return False
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # Python is still looking for the module that it will run
        words = sys.orig_argv
        return words[words.index("-m") + 1] == PACKAGE if "-m" in words else False
    if Path(program) == Path(__file__).with_name("__main__.py"):  # now Python has found it
        return True
    return Path(program).stem == COMMAND


def register() -> None:
    """Registers LION with the Auto classes and with timm. Calling it again changes nothing."""
    from .auto import register as register_auto_classes

    register_auto_classes()
    moved.install()  # again: now the modules that names have left are there
    # Text models do without timm, so a timm or torchvision that does not load is no error.
    with suppress(ImportError, RuntimeError):
        import_module(f"{PACKAGE}.timm_models")
