"""LionConfig: one configuration for text and images."""

import copy
import math
import os
from dataclasses import fields
from numbers import Integral
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .lion_checks import SMALLEST_EPS
from .lion_code import AUTO_MAP, code_goes_along, in_folder, save_code
from .lion_ops import ATTENTION_FORMS
from .lion_scan import PATCH_ORDERS

MODALITIES = ("text", "image")
MASK_TYPES = ("lit", "decay", "selective")
FEATURE_MAP_NAMES = ("identity", "elu_plus_one", "normalized_silu")
CLASSIFIER_POOLINGS = ("cls", "mean")

# Legal values of the fields that name a choice. They are checked on assignment too: `config.attention_form = "chnk"` raises.
CHOICES = {
    "modality": MODALITIES,
    "mask_type": MASK_TYPES,
    "attention_form": ATTENTION_FORMS,
    "feature_map": (None, *FEATURE_MAP_NAMES),
    "patch_order": PATCH_ORDERS,
    "classifier_pooling": (None, *CLASSIFIER_POOLINGS),
}

# What a field left at None becomes, besides what `family_defaults` adds.
TEXT_DEFAULTS = {
    "feature_map": "identity",
    "normalize_attention": False,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "drop_path_rate": 0.0,
    "classifier_pooling": "cls",
}
IMAGE_DEFAULTS = {
    "normalize_attention": True,
    "layer_norm_eps": 1e-6,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.1,
    "classifier_pooling": "mean",
}

SIZES = (
    *("hidden_size", "num_attention_heads", "intermediate_size", "patch_size", "num_channels"),
    *("vocab_size", "type_vocab_size", "max_position_embeddings"),
)
# What `max_position_embeddings` says where there are none and nothing limits the length: other libraries
# cut texts at this number. It is the longest text that LION is tested with.
LONGEST_TEXT = 1_000_000
MOST_LABELS = 10_000_000  # transformers gives each a name, in memory
PROBABILITIES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "classifier_dropout",
)


def family_defaults(modality: str, mask_type: str) -> dict:
    """What the fields left at None become in a family of models."""
    text, lit = modality == "text", mask_type == "lit"
    return {
        "feature_map": "elu_plus_one" if lit else "normalized_silu",
        "attention_norm": text and lit,
        "use_position_embeddings": not text or lit,
        **(TEXT_DEFAULTS if text else IMAGE_DEFAULTS),
    }


@strict
class LionConfig(PreTrainedConfig):
    """Configuration of a LION encoder (arXiv 2502.16249) for text (BERT-like, post-norm) or images (ViT-like, pre-norm).

    Fields left at None take the choice of the model family that modality and mask type name, and are saved resolved.

    Args:
        modality: "text" or "image".
        mask_type: the family: "lit" (no decay), "decay" (LION-D, one learned decay a head) or "selective" (LION-S, one a
            head and token, computed from the layer's input).
        attention_form: "attention", "recurrent", "chunk", or "auto", which picks the fastest in every call (`lion_hf.explain`
            says which and why) and takes padding out of text batches where that pays. All give the same numbers; it may be
            changed on a loaded model at any time.
        chunk_size: tokens a chunk in the chunk form; None lets the operation choose.
        hidden_size: width of the encoder.
        num_hidden_layers: number of layers.
        num_attention_heads: heads a layer; must divide `hidden_size`.
        intermediate_size: width of the MLPs.
        hidden_act: activation of the MLPs, a name in `transformers.activations.ACT2FN`.
        hidden_dropout_prob: dropout after embeddings, attention and MLP. None: 0.1 for text, 0 for images.
        attention_probs_dropout_prob: dropout of the masked scores. Training with it needs the attention form, which "auto"
            then picks; set 0 to train in the chunk or recurrent form. None: 0.1 for text, 0 for images.
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0. None: 0 for text, 0.1 for images.
        layer_norm_eps: None: 1e-12 for text, 1e-6 for images.
        initializer_range: standard deviation of the initial weights.
        qkv_bias: whether the query, key and value projections have biases.
        feature_map: applied to queries and keys: "identity", "elu_plus_one", or "normalized_silu" (silu(x) + 0.5, then of
            unit length). None: identity for text; for images elu_plus_one (lit) or normalized_silu (decay, selective).
        normalize_attention: divide by the row sum of the masked scores. None: False for text, True for images.
        attention_norm: LayerNorm (eps 1e-5) over the concatenated heads before the output projection. None: True for lit
            text, else False.
        use_position_embeddings: learned absolute positions. None: False for text with decays, else True.
        classifier_pooling: "cls" (class token or first token) or "mean" (class token included). None: cls for text, mean for
            images. On text the pooled vector then passes a dense layer with tanh.
        classifier_dropout: dropout before text classifiers. None: `hidden_dropout_prob`.
        vocab_size: words of a text model.
        max_position_embeddings: longest text of a model with position embeddings. Text models without
            them have no limit, and the number becomes 1,000,000, whatever is given.
        type_vocab_size: token types of a text model.
        pad_token_id: id of the padding token.
        sparse_prediction: whether the masked-LM head computes only the labelled tokens when it gets labels, as ModernBERT's.
        tie_word_embeddings: whether the masked-LM decoder shares the word embeddings.
        image_size: height and width of training images in pixels, one integer or a pair. Other sizes work at run time.
        patch_size: height and width of a patch in pixels.
        num_channels: channels of an image.
        distillation_head: whether image classifiers have a second linear head, on the class token, to be trained on a teacher's
            answers (arXiv 2012.12877). Logits are then the mean of both heads'. It needs classifier_pooling="mean".
        patch_order: "raster", or "snake" for two S-curves with gates of their own (no effect on lit).

    Example:
        >>> from lion_hf import LionConfig, LionModel
        >>> config = LionConfig(modality="image", mask_type="decay", patch_order="snake")
        >>> model = LionModel(config)
    """

    model_type = "lion"

    modality: str = "text"
    mask_type: str = "selective"
    attention_form: str = "auto"
    chunk_size: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int | None = None
    attention_probs_dropout_prob: float | int | None = None
    drop_path_rate: float | int | None = None
    layer_norm_eps: float | None = None
    initializer_range: float = 0.02
    qkv_bias: bool = True
    feature_map: str | None = None
    normalize_attention: bool | None = None
    attention_norm: bool | None = None
    use_position_embeddings: bool | None = None
    classifier_pooling: str | None = None
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
        names = self.id2label
        if names is not None and not (
            isinstance(names, dict) and all(str(n).isdecimal() for n in names)
        ):
            raise ValueError(f"id2label={names!r}: expected a dict from numbers to names")
        if isinstance(self.image_size, tuple):
            self.image_size = list(self.image_size)
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "LionConfig | tuple[LionConfig, dict]":
        """As in `PreTrainedConfig`, but fields given by name are set before the others are resolved and checked.

        So `from_pretrained(folder, mask_type="lit")` also gets the rest of LION-lit's choices, where the folder has its own
        family's.
        """
        if config_dict.get("use_position_embeddings") is False:  # then that is resolved, too
            config_dict = {k: v for k, v in config_dict.items() if k != "max_position_embeddings"}
        names = {field.name for field in fields(cls)}
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        old = {
            name: config_dict.get(name) or getattr(cls, name) for name in ("modality", "mask_type")
        }
        changed = {name: given[name] for name in old if given.get(name, old[name]) != old[name]}
        if changed and all(value in CHOICES[name] for name, value in changed.items()):
            resolved = family_defaults(**old)
            config_dict = {
                k: v for k, v in config_dict.items() if k not in resolved or v != resolved[k]
            }
        return super().from_dict({**config_dict, **given}, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs
    ) -> None:
        """As in `PreTrainedConfig`, but an `auto_map` is only saved with the code that it names.

        A configuration that has one, and one that goes to the Hub, takes LION's code along. Models
        save their configuration with this method, so this holds for whatever saves a model.
        """
        folder, own = Path(save_directory), getattr(self, "auto_map", None) or {}
        ours = type(self).__name__ == LionConfig.__name__ and not folder.is_file()
        if ours and (own or push_to_hub):
            save_code(folder)
            own = {**AUTO_MAP, **in_folder(folder, own)}
        saved = copy.copy(self)
        saved.__dict__.pop("auto_map", None)
        if entries := in_folder(folder, own):
            saved.auto_map = entries
        super(LionConfig, saved).save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As in `PushToHubMixin`; LION's code goes along."""
        with code_goes_along(self):
            return super().push_to_hub(repo_id, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """As in `PushToHubMixin`, without the code files, which then count as new."""
        found = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in found.items() if not name.endswith(".py")}

    def check(self) -> None:
        """Raises ValueError if no model can be built from the fields together. Models call it again."""
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 1")
        if self.num_hidden_layers < 0:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}: expected an integer of at least 0"
            )
        for name in PROBABILITIES:
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a probability in [0, 1)")
        if not SMALLEST_EPS <= self.layer_norm_eps < math.inf:
            raise ValueError(
                f"layer_norm_eps={self.layer_norm_eps}: expected a finite number of at least {SMALLEST_EPS:.3g}"
            )
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(
                f"initializer_range={self.initializer_range}: expected a finite number of at least 0"
            )
        if self.modality == "text" and not 0 <= (self.pad_token_id or 0) < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id}: expected None or 0 to vocab_size - 1 = {self.vocab_size - 1}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r}: expected one of {sorted(ACT2FN)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}:"
                " every head needs the same whole number of dimensions"
            )
        if self.modality == "text" and self.patch_order != "raster":
            raise ValueError(
                f"patch_order={self.patch_order!r} with modality='text': expected 'raster'"
            )
        if self.distillation_head and (self.modality, self.classifier_pooling) != ("image", "mean"):
            raise ValueError(
                f"distillation_head=True with modality={self.modality!r}, classifier_pooling={self.classifier_pooling!r}:"
                " expected 'image' and 'mean', because the class token is then the teacher's"
            )
        if self.modality == "image":
            if isinstance(self.image_size, list) and len(self.image_size) != 2:
                raise ValueError(
                    f"image_size={self.image_size}: expected one integer or a pair (height, width)"
                )
            height, width = self.image_height_width
            if min(height, width) < 1 or height % self.patch_size or width % self.patch_size:
                raise ValueError(
                    f"image_size={self.image_size}: expected multiples of patch_size={self.patch_size}"
                )

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def classifier_dropout_prob(self) -> float:
        """Dropout before text classifiers, with `classifier_dropout` None resolved."""
        return (
            self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout
        )

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width of training images in pixels."""
        return (
            tuple(self.image_size)
            if isinstance(self.image_size, list)
            else (self.image_size, self.image_size)
        )

    @property
    def num_patch_orders(self) -> int:
        """Sets of gates a layer has: two for snake order, else one."""
        return 2 if self.patch_order == "snake" else 1


__all__ = ["LionConfig"]
