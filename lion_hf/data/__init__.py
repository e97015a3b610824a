"""Data for training: seeded samples, masking, packing, labels, tables, images, streams of text."""

from ..moved import names_that_left
from ..startup import is_command_line

if not is_command_line():  # whose `--help` does without torch
    from .masking import MaskTokens, pad_rows
    from .packing import DataCollatorForPackedLanguageModeling, pack
    from .samples import SeededDataset, SkippedSample, sample_seed, seeded

__all__ = [
    "DataCollatorForPackedLanguageModeling",
    "MaskTokens",
    "SeededDataset",
    "SkippedSample",
    "pack",
    "pad_rows",
    "sample_seed",
    "seeded",
]

__getattr__ = names_that_left(__name__)
