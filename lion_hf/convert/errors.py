"""The error of checkpoints that cannot be converted."""


class ConversionError(ValueError):
    """A checkpoint that cannot be converted, or an option that is missing or does not fit."""
