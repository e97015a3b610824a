"""The reference checkpoints, as they are and changed, for the tests of conversion."""

import argparse
import os
from pathlib import Path

import pytest
import torch

import lion_hf

REFERENCE = Path(__file__).parents[1] / "reference"
IMAGE, LIT_IMAGE = "vision-selective-s-pos", "vision-lit-s-pos"
TEXT, LIT_TEXT, CLASSIFIER = "text-lion-s-mlm", "text-lion-lit-mlm", "text-lion-d-seqcls"


def file_of(case: str) -> Path:
    return REFERENCE / case / ("checkpoint.pth" if case.startswith("vision") else "latest-rank0.pt")


def content_of(case: str) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file_of(case), weights_only=True)


def weights_of(content: dict) -> dict:
    return content["model"] if "model" in content else content["state"]["model"]


def saved(content, path: Path) -> Path:
    torch.save(content, path)
    return path


def refused(checkpoint: Path, output: Path, match: str, **options) -> None:
    """The conversion fails with such a message, and leaves nothing behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(ValueError, match=match):
        lion_hf.convert_checkpoint(checkpoint, output, **options)
    assert sorted(output.parent.iterdir()) == before


class Bomb:
    """Unpickled without care it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
