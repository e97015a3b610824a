"""LionConfig: one configuration for text and images, and the names that its fields may have.

This file is the ground floor: it imports nothing else of LION. Every list of names has its home
here.
"""

import copy
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

MODALITIES = ("text", "image")
MASK_TYPES = ("lit", "decay", "selective")
FORMS = ("attention", "recurrent", "chunk")
ATTENTION_FORMS = ("auto", *FORMS)
FORMS_WITHOUT_SCORES = ("recurrent", "chunk")  # they cannot drop scores out
BACKENDS = ("auto", "torch", "triton")
WIDER_FEATURE_MAPS = ("exponential",)  # two features of each number
FEATURE_MAP_NAMES = ("identity", "elu_plus_one", "normalized_silu", "sqrt_softmax", "exponential")
CLASSIFIER_POOLINGS = ("cls", "mean")
CONV_PLACEMENTS = ("projections", "inputs")
# Patch order -> number of curves (see lion_orders.py), each with its own gates.
CURVES = {"raster": 1, "snake": 2}
PATCH_ORDERS = tuple(CURVES)

CODE = Path(__file__).resolve().parent  # the files that travel with saved models

# Legal values of the fields that name a choice, which are checked on assignment too.
CHOICES = {
    "modality": MODALITIES,
    "mask_type": MASK_TYPES,
    "attention_form": ATTENTION_FORMS,
    "feature_map": (None, *FEATURE_MAP_NAMES),
    "patch_order": PATCH_ORDERS,
    "classifier_pooling": (None, *CLASSIFIER_POOLINGS),
    "conv_placement": CONV_PLACEMENTS,
}

# What a field left at None becomes, besides what `family_defaults` adds.
TEXT_DEFAULTS = {
    "feature_map": "identity",
    "normalize_attention": False,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "pre_norm": False,
    "classifier_pooling": "cls",
}
IMAGE_DEFAULTS = {
    "normalize_attention": True,
    "layer_norm_eps": 1e-6,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.1,
    "pre_norm": True,
    "classifier_pooling": "mean",
}

SIZES = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "num_channels",
    "vocab_size",
    "type_vocab_size",
    "max_position_embeddings",
)
# What `max_position_embeddings` says where nothing limits the length, because other libraries cut
# texts at that number. It is the longest text that LION is tested with.
LONGEST_TEXT = 1_000_000
MOST_LABELS = 10_000_000  # transformers keeps a name for each of them in memory
PROBABILITIES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "classifier_dropout",
)
SMALLEST_EPS = 2.0**-126  # the smallest normal number of float32


def save_code(folder: Path) -> None:
    """Copies LION's code files into a folder, which is made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(CODE.glob("*.py")):
        if file.name != "__init__.py" and folder.resolve() != CODE:
            shutil.copyfile(file, folder / file.name)


def auto_map_of(folder: Path, auto_map: Mapping[str, str]) -> dict[str, str]:
    """The entries of an `auto_map` whose code is in the folder.

    An entry `owner/name--file.Class`, as a model from the Hub has, then means the folder's file.
    """
    entries = {name: str(code).rpartition("--")[2] for name, code in auto_map.items()}
    return {
        name: code
        for name, code in entries.items()
        if (folder / f"{code.split('.')[0]}.py").is_file()
    }


def family_defaults(modality: str, mask_type: str) -> dict:
    """What the fields left at None become in a family of models."""
    text, lit = modality == "text", mask_type == "lit"
    return {
        "feature_map": "elu_plus_one" if lit else "normalized_silu",
        "attention_norm": text and lit,
        "use_position_embeddings": not text or lit,
        **(TEXT_DEFAULTS if text else IMAGE_DEFAULTS),
    }


T = TypeVar("T")
if TYPE_CHECKING:
    Resolved = Annotated[T, "resolved"]
else:

    class Resolved:
        """`Resolved[T]` is T or None: a field that may be left at None, which then is replaced."""

        def __class_getitem__(cls, kind):
            return kind | None


FAMILY_CHOICE: Any = None  # the choice of the family, in `family_defaults`


class FieldTypeError(StrictDataclassFieldValidationError, ValueError):
    """A field of the configuration got a value of another type."""

    def __init__(self, name: str, value: object, expected: str):
        Exception.__init__(self, f"{name}={value!r}: expected {expected}")


def value_errors(cls: type) -> type:
    """Makes one line of the errors of `strict`, with the value first, and ValueErrors of them."""
    checked_setattr = cls.__setattr__
    types = {field.name: field.type for field in fields(cls)}

    def __setattr__(self, name, value):
        try:
            checked_setattr(self, name, value)
        except StrictDataclassFieldValidationError as error:
            expected = types.get(name)
            shown = expected.__name__ if isinstance(expected, type) else str(expected)
            raise FieldTypeError(name, value, shown) from error

    cls.__setattr__ = __setattr__  # type: ignore[method-assign, assignment]
    return cls


@value_errors
@strict
class LionConfig(PreTrainedConfig):
    """Configuration of a LION encoder (arXiv 2502.16249) for text (like BERT) or images (like ViT).

    By itself it describes the models of the paper: text models normalise after each block, image
    models before it. `pre_norm`, `conv_kernel_size`, `conv_placement`, `gated_mlp` and
    `scale_output_init` make the modern block of the presets `modern-lion-*`. A field left at None
    takes the choice of its family, which `modality` and `mask_type` name, and is saved resolved.

    Args:
        modality: "text" or "image".
        mask_type: the family: "lit" (no decay), "decay" (LION-D, one learned decay per head) or
            "selective" (LION-S, one per head and token, computed from the layer's input).
        attention_form: "attention", "recurrent", "chunk", or "auto", which picks the fastest form
            in every call (`lion_hf.explain` says which and why) and removes padding from text
            batches where that pays. All forms give the same numbers, and the field may be changed
            on a loaded model at any time.
        chunk_size: tokens per chunk in the chunk form. None: the operation chooses.
        hidden_size: width of the encoder.
        num_hidden_layers: number of layers.
        num_attention_heads: heads per layer; must divide `hidden_size`.
        intermediate_size: width of the MLPs.
        hidden_act: activation of the MLPs, a name in `transformers.activations.ACT2FN`.
        hidden_dropout_prob: dropout after embeddings, attention and MLP. None: 0.1 for text, 0 for
            images.
        attention_probs_dropout_prob: dropout of the masked scores. Training with it needs the
            attention form, which "auto" then picks and whose cost is quadratic in the length. None:
            0. The paper trains text models with 0.1.
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0. None: 0 for
            text, 0.1 for images.
        layer_norm_eps: epsilon of the norms. None: 1e-12 for text, 1e-6 for images.
        initializer_range: standard deviation of the initial weights.
        qkv_bias: whether the query, key and value projections have biases.
        feature_map: applied to queries and keys: "identity", "elu_plus_one", "normalized_silu"
            (silu(x) + 0.5, then scaled to unit length), "sqrt_softmax" (the square roots of a
            softmax) or "exponential" (exp(x) and exp(-x), twice as many features). None: identity
            for text; for images elu_plus_one (lit) or normalized_silu (decay, selective).
        normalize_attention: whether to divide by the row sum of the masked scores. None: False for
            text, True for images.
        attention_norm: whether a LayerNorm (eps 1e-5) over the concatenated heads comes before the
            output projection. None: True for lit text, else False.
        pre_norm: whether the norms come before attention and MLP, with a last norm after the
            layers, and not after each of them. None: False for text, True for images.
        conv_kernel_size: width of the depthwise convolutions, an odd number of tokens, or of
            patches both ways. They see neither padding nor other documents. None: no convolutions.
        conv_placement: where the convolutions are: "projections" (on queries, keys and values) or
            "inputs" (on what the attention reads, gates included, and on what the MLP reads).
        gated_mlp: whether the MLPs multiply their activation by a second projection, as in GeGLU
            (arXiv 2002.05202).
        scale_output_init: whether the output projections of attention and MLP start smaller by a
            factor of sqrt(2 * num_hidden_layers).
        use_position_embeddings: whether the model learns absolute positions. None: False for text
            with decay, else True.
        classifier_pooling: "cls" (the class token or the first token) or "mean" (class token
            included). None: cls for text, mean for images. On text the pooled vector then passes a
            dense layer with tanh.
        classifier_dropout: dropout before text classifiers. None: `hidden_dropout_prob`.
        vocab_size: number of words of a text model.
        max_position_embeddings: longest text of a model with position embeddings. Text models
            without them have no limit; whatever is given, the field is then 1,000,000.
        type_vocab_size: number of token types of a text model.
        pad_token_id: id of the padding token.
        sparse_prediction: whether the masked-LM head computes only the labelled tokens when it gets
            labels, as ModernBERT's does.
        tie_word_embeddings: whether the masked-LM decoder shares the word embeddings.
        image_size: height and width of training images in pixels, one integer or a pair. Other
            sizes work at run time.
        patch_size: height and width of a patch in pixels.
        num_channels: number of channels of an image.
        distillation_head: whether image classifiers have a second linear head, on the class token,
            to be trained on a teacher's answers (arXiv 2012.12877). The logits are then the mean of
            both heads'. It needs classifier_pooling="mean".
        patch_order: "raster", or "snake" for two S-curves with gates of their own (no effect on
            lit).

    Raises:
        ValueError: for a value that is not legal, alone or beside the others.

    Example:
        >>> from lion_hf import LionConfig, LionModel
        >>> config = LionConfig(modality="image", mask_type="decay", patch_order="snake")
        >>> model = LionModel(config)
    """

    model_type = "lion"
    keys_to_ignore_at_inference = ["past_key_values", "distillation_logits"]  # read by Trainer

    modality: str = "text"
    mask_type: str = "selective"
    attention_form: str = "auto"
    chunk_size: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: Resolved[float | int] = FAMILY_CHOICE
    attention_probs_dropout_prob: Resolved[float | int] = FAMILY_CHOICE
    drop_path_rate: Resolved[float | int] = FAMILY_CHOICE
    layer_norm_eps: Resolved[float] = FAMILY_CHOICE
    initializer_range: float = 0.02
    qkv_bias: bool = True
    feature_map: Resolved[str] = FAMILY_CHOICE
    normalize_attention: Resolved[bool] = FAMILY_CHOICE
    attention_norm: Resolved[bool] = FAMILY_CHOICE
    pre_norm: Resolved[bool] = FAMILY_CHOICE
    conv_kernel_size: int | None = None
    conv_placement: str = "projections"
    gated_mlp: bool = False
    scale_output_init: bool = False
    use_position_embeddings: Resolved[bool] = FAMILY_CHOICE
    classifier_pooling: Resolved[str] = FAMILY_CHOICE
    classifier_dropout: float | int | None = None
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int | None = 0
    sparse_prediction: bool = False
    tie_word_embeddings: bool = True
    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int = 16
    num_channels: int = 3
    distillation_head: bool = False
    patch_order: str = "raster"

    def __setattr__(self, name, value):
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r}: expected one of {CHOICES[name]}")
        if name == "chunk_size" and value is not None and value < 1:
            raise ValueError(f"chunk_size={value!r}: expected None or an integer of at least 1")
        integer = isinstance(value, Integral) and not isinstance(value, bool)
        if name == "num_labels" and not (integer and 0 <= value <= MOST_LABELS):
            raise ValueError(f"num_labels={value!r}: expected an integer from 0 to {MOST_LABELS:,}")
        if name == "use_position_embeddings" and value and self.use_position_embeddings is False:
            super().__setattr__("max_position_embeddings", type(self).max_position_embeddings)
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs):
        for name, value in family_defaults(self.modality, self.mask_type).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.modality == "text" and not self.use_position_embeddings:
            self.max_position_embeddings = LONGEST_TEXT
        names = {} if self.id2label is None else self.id2label
        if not (isinstance(names, dict) and all(str(n).isdecimal() for n in names)):
            raise ValueError(f"id2label={names!r}: expected a dict from numbers to names")
        if isinstance(self.image_size, tuple):
            self.image_size = list(self.image_size)
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "LionConfig | tuple[LionConfig, dict]":
        """As in `PreTrainedConfig`, but sets fields given by name before it resolves the others.

        So `from_pretrained(folder, mask_type="lit")` also gets the rest of LION-lit's choices where
        the folder has those of its own family.
        """
        if config_dict.get("use_position_embeddings") is False:  # then that is resolved, too
            config_dict = {k: v for k, v in config_dict.items() if k != "max_position_embeddings"}
        names = {field.name for field in fields(cls)}
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        families = ("modality", "mask_type")
        old = {name: config_dict.get(name) or getattr(cls, name) for name in families}
        changed = {name: given[name] for name in old if given.get(name, old[name]) != old[name]}
        if changed and all(value in CHOICES[name] for name, value in changed.items()):
            resolved = family_defaults(**old)
            config_dict = {
                name: value
                for name, value in config_dict.items()
                if name not in resolved or value != resolved[name]
            }
        return super().from_dict({**config_dict, **given}, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in `PreTrainedConfig`, but an `auto_map` takes the code along that it names.

        Models save their configuration with this method, so this holds for whatever saves a model.
        """
        folder, saved = Path(save_directory), copy.copy(self)
        auto_map = saved.__dict__.pop("auto_map", None)
        if auto_map:
            if not folder.is_file():  # which the method below refuses
                save_code(folder)
            if entries := auto_map_of(folder, auto_map):
                saved.auto_map = entries
        super(LionConfig, saved).save_pretrained(save_directory, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """As in `PushToHubMixin`, without the code files, which then count as new."""
        found = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in found.items() if not name.endswith(".py")}

    def check(self) -> None:
        """Checks the fields together. Models call it again, because fields may be assigned.

        Raises:
            ValueError: if no model can be built from them.
        """
        self._check_numbers()
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r}: expected one of {sorted(ACT2FN)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of"
                f" num_attention_heads={self.num_attention_heads}: every head needs the same whole"
                " number of dimensions"
            )
        width = self.conv_kernel_size
        if width is not None and (width < 1 or width % 2 == 0):
            raise ValueError(f"conv_kernel_size={width}: expected None or an odd integer from 1 on")
        modality, pooling = self.modality, self.classifier_pooling
        if self.distillation_head and (modality, pooling) != ("image", "mean"):
            raise ValueError(
                f"distillation_head=True with modality={modality!r}, classifier_pooling={pooling!r}"
                ": expected 'image' and 'mean', because the class token is then the teacher's"
            )
        if self.modality == "text":
            self._check_text()
        else:
            self._check_image()

    def _check_numbers(self) -> None:
        for name, least in (*((name, 1) for name in SIZES), ("num_hidden_layers", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}={value}: expected an integer of at least {least}")
        for name in PROBABILITIES:
            value = getattr(self, name) or 0
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value}: expected a probability in [0, 1)")
        for name, lowest in (("layer_norm_eps", SMALLEST_EPS), ("initializer_range", 0.0)):
            value = getattr(self, name)
            if not lowest <= value < math.inf:
                raise ValueError(
                    f"{name}={value}: expected a finite number of at least {lowest:.3g}"
                )

    def _check_text(self) -> None:
        if not 0 <= (self.pad_token_id or 0) < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id}: expected None or 0 to vocab_size - 1 ="
                f" {self.vocab_size - 1}"
            )
        if self.patch_order != "raster":
            raise ValueError(
                f"patch_order={self.patch_order!r} with modality='text': expected 'raster'"
            )

    def _check_image(self) -> None:
        sides, patch = self.image_size, self.patch_size
        if isinstance(sides, list) and len(sides) != 2:
            raise ValueError(f"image_size={sides}: expected one integer or a pair (height, width)")
        if any(side < 1 or side % patch for side in self.image_height_width):
            raise ValueError(f"image_size={sides}: expected multiples of patch_size={patch}")

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def classifier_dropout_prob(self) -> float:
        """Dropout before text classifiers, with `classifier_dropout` None resolved."""
        if self.classifier_dropout is None:
            return self.hidden_dropout_prob or 0.0
        return self.classifier_dropout

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width of training images in pixels."""
        sides = self.image_size
        return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])

    @property
    def conv_reach(self) -> int:
        """Tokens on one side of a token that a convolution sees."""
        return (self.conv_kernel_size or 1) // 2

    @property
    def num_patch_orders(self) -> int:
        """Number of curves along which a layer reads the patches, each with its own gates."""
        return CURVES[self.patch_order]


__all__ = ["LionConfig"]
