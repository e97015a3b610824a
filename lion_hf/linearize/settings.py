"""How a softmax model is copied into LION, and how the copy is taught."""

from dataclasses import dataclass, field, replace
from typing import Any

from ..convert.errors import ConversionError

# What the fields of `Copying` left at None become: what came nearest to the source in the trials
# (benchmarks/results/linearize.md).
COPYING_DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {"feature_map": "exponential", "sharpness": 1.0, "conv_kernel_size": 3},
    "image": {"feature_map": "elu_plus_one", "sharpness": 2.0, "conv_kernel_size": 0},
}


@dataclass
class Distillation:
    """How a copy is taught by its source: data, and two stages of training.

    In the first stage every layer's attention learns on its own to answer the teacher's hidden
    states as the teacher's attention does; the rest of the network waits. In the second the whole
    network learns the teacher's answers.
    """

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Text: a document per line (.txt), CSV, JSON lines, parquet. Images: parquet."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same to measure on."})
    data_path: str | None = field(
        default=None,
        metadata={"help": "Images: folder with train/ and val/, validation/ or test/, by class."},
    )
    text_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "One or two columns of text, if their names do not tell."},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of labels, if its name does not tell."}
    )
    layer_steps: int = field(default=300, metadata={"help": "Steps of the first stage."})
    layer_learning_rate: float = field(default=1e-3, metadata={"help": "Its peak learning rate."})
    steps: int = field(default=300, metadata={"help": "Steps of the second stage."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Its peak learning rate."})
    alpha: float = field(
        default=1.0,
        metadata={"help": "Weight of the teacher in the second stage; the rest is the labels'."},
    )
    tau: float = field(default=1.0, metadata={"help": "Temperature of the teacher's answers."})
    batch_size: int = field(default=64, metadata={"help": "Samples per step."})
    max_length: int = field(default=128, metadata={"help": "Tokens per text."})
    mask_probability: float = field(
        default=0.15, metadata={"help": "Share of masked tokens, for masked language models."}
    )
    validation_samples: int = field(
        default=2000, metadata={"help": "Samples to measure on, evenly spread."}
    )
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 autocast."})

    def __post_init__(self):
        for name in ("layer_steps", "steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 0")
        for name in ("batch_size", "max_length", "validation_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 1")
        for name in ("layer_learning_rate", "learning_rate", "tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: expected a number in [0, 1]")
        if not 0 < self.mask_probability < 1:
            raise ValueError(
                f"mask_probability={self.mask_probability}: expected a number between 0 and 1"
            )
        if len(self.text_columns) > 2:
            raise ValueError(f"text_columns={self.text_columns}: expected one or two")

    @property
    def has_data(self) -> bool:
        """Whether there is anything to learn from."""
        return bool(self.train_file or self.data_path)


@dataclass
class Copying:
    """What the copy is to be: fields of LionConfig, and how its attention starts.

    Softmax attention is positive and its rows sum to one, so a positive feature map and division by
    the row sum are the nearest to it. It is also sharper than most products of features:
    `sharpness` multiplies queries and keys, which makes elu(x) + 1 nearer to relu(x).
    """

    mask_type: str = field(default="selective", metadata={"help": "lit, decay or selective."})
    attention_form: str = field(
        default="auto", metadata={"help": "attention, chunk, recurrent or auto."}
    )
    patch_order: str = field(
        default="raster", metadata={"help": "raster, or snake for both S-curves of an image."}
    )
    feature_map: str | None = field(
        default=None,
        metadata={
            "help": "exponential, elu_plus_one, normalized_silu or identity. Default: exponential"
            " for text, elu_plus_one for images."
        },
    )
    conv_kernel_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of a convolution on queries, keys and values that the source lacks. It"
            " starts as the identity; 0 for none. Default: 3 for text, 0 for images."
        },
    )
    normalize_attention: bool = field(default=True, metadata={"help": "Divide by the row sum."})
    attention_norm: bool = field(
        default=False, metadata={"help": "A LayerNorm over the heads, which the source lacks."}
    )
    max_position_embeddings: int | None = field(
        default=None,
        metadata={
            "help": "Longest text of the copy in tokens, if that is to be above the source's."
            " Behind the source's positions they are repeated."
        },
    )
    half_life: float = field(
        default=1000.0,
        metadata={
            "help": "Tokens in which gates halve at first; 0 for LION's own, which vary by head."
        },
    )
    sharpness: float | None = field(
        default=None,
        metadata={
            "help": "Factor of queries and keys, above 0. Default: 1 for text, 2 for images."
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Of the gates' weights in LION-S, and of the distillation."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the weights for the model card; the source's if not given."},
    )

    def __post_init__(self):
        if self.half_life != 0 and not 1e-3 <= self.half_life < float("inf"):
            raise ConversionError(
                f"half_life={self.half_life}: expected 0, or a number of tokens of at least 0.001"
            )
        if self.sharpness is not None and not 0 < self.sharpness < float("inf"):
            raise ConversionError(f"sharpness={self.sharpness}: expected a number above 0")
        if not 0 <= self.seed < 2**32 - 1:
            raise ConversionError(f"seed={self.seed}: expected an integer from 0 to {2**32 - 2}")

    def resolved(self, modality: str) -> "Copying":
        """The same with the defaults of "text" or "image" in place of None."""
        defaults = COPYING_DEFAULTS[modality]
        return replace(
            self, **{name: x for name, x in defaults.items() if getattr(self, name) is None}
        )
