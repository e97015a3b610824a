"""LION image models in timm's registry.

    timm.create_model("lion_base_patch16_224", mask_type="decay", patch_order="snake")

They are `LionForImageClassification` with timm's interface; parameters have the same names and
values.
"""

from dataclasses import fields
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from transformers import PreTrainedConfig

from .modeling.configuration_lion import LionConfig
from .modeling.lion_convolution import Grid
from .modeling.lion_embeddings import resize_images
from .modeling.lion_packing import pool
from .modeling.modeling_lion import LionForImageClassification

# timm's word -> `classifier_pooling`. LION's mean includes the class token; "" keeps all tokens.
GLOBAL_POOLS = {"avg": "mean", "token": "cls", "": None}
OUTPUT_FORMATS = ("NCHW", "NLC")
# Fields of the configuration that have other names in timm.
RENAMED = {
    "num_channels": "in_chans",
    "classifier_pooling": "global_pool",
    "image_size": "img_size",
}
LION_FIELDS = sorted(
    {field.name for field in fields(LionConfig)}
    - {field.name for field in fields(PreTrainedConfig)}
    - {*RENAMED, "modality", "distillation_head"}
)


class LionTimmModel(LionForImageClassification):
    """A LION image classifier as timm's training script and feature extraction expect it.

    Args:
        img_size: height and width of training images, one integer or a pair; others work too.
        in_chans: channels of an image.
        num_classes: classes; 0 for a model without classifier.
        global_pool: "avg" (class token included), "token" (class token), or "" for no pooling.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last layer.
        **lion_fields: other fields of `LionConfig`, such as mask_type, patch_order and hidden_size.

    Raises:
        ValueError: for a name that is no field of `LionConfig`, or an illegal value.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        **lion_fields,
    ):
        for name in lion_fields:
            if name not in LION_FIELDS:
                legal = RENAMED.get(name, f"one of {LION_FIELDS}")
                raise ValueError(f"unknown argument {name}: expected {legal}")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate={drop_rate}: expected a probability in [0, 1)")
        super().__init__(
            LionConfig(
                modality="image",
                image_size=img_size,
                num_channels=in_chans,
                num_labels=max(num_classes, 1),
                classifier_pooling=GLOBAL_POOLS[_checked_pool(global_pool)],
                drop_path_rate=drop_path_rate,
                **lion_fields,
            )
        )
        config = self.config
        self.in_chans, self.num_features = config.num_channels, config.hidden_size
        self.head_hidden_size = self.embed_dim = config.hidden_size
        self.num_prefix_tokens = 1
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {
                "module": f"lion.layers.{n}",
                "num_chs": config.hidden_size,
                "reduction": config.patch_size,
            }
            for n in range(config.num_hidden_layers)
        ]
        self.num_classes, self.global_pool = num_classes, global_pool
        if num_classes == 0:
            self.classifier = nn.Identity()

    def to_transformers(self) -> LionForImageClassification:
        """Returns a transformers model that shares the parameters.

        Saved, it is a folder that the Auto classes load.

        Raises:
            ValueError: if the model has no classifier, does not pool, or lacks its last norm.
        """
        if self.num_classes == 0 or self.global_pool == "":
            raise ValueError(
                f"num_classes={self.num_classes}, global_pool={self.global_pool!r}: expected a"
                " classifier of pooled images"
            )
        if isinstance(self.lion.norm, nn.Identity):
            raise ValueError("the last norm was removed (prune_norm), which LION's models need")
        with torch.device("meta"):
            model = LionForImageClassification(self.config)
        model.lion, model.classifier = self.lion, self.classifier
        return model.train(self.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Returns class token and patches after the last norm, (B, 1 + patches, C).

        Args:
            x: images, (B, channels, height, width).
        """
        return self.lion(pixel_values=x).last_hidden_state

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Returns logits, or with `pre_logits` what the classifier reads.

        Args:
            x: what `forward_features` returned.
            pre_logits: whether to leave out the classifier.
        """
        if self.global_pool:
            x = pool(x, None, GLOBAL_POOLS[self.global_pool] or "mean")
        x = self.head_drop(x)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list | tuple[torch.Tensor, list] | dict:
        """Returns the outputs of layers and the final features, as timm's vision transformers do.

        Args:
            x: images, (B, channels, height, width).
            indices: an integer for that many of the last layers, a list of layers, or None for
                all.
            return_prefix_tokens: return pairs of patches and class token (B, 1, C).
            norm: apply the last norm to every layer's output.
            stop_early: leave out the layers after the last of `indices`.
            output_fmt: "NCHW" (B, C, rows, columns) or "NLC" (B, patches, C).
            intermediates_only: leave out the final features.
            output_dict: return a dict with `image_intermediates`, `image_features` and, with
                `return_prefix_tokens`, `image_intermediates_prefix`.
        """
        if output_fmt not in OUTPUT_FORMATS:
            raise ValueError(f"output_fmt={output_fmt!r}: expected one of {OUTPUT_FORMATS}")
        lion: Any = self.lion
        wanted, last = feature_take_indices(len(lion.layers), indices)
        rows, columns = lion.embeddings.patch_grid(x)
        order = lion.embeddings.reading_orders(x)
        hidden_states, outputs = lion.embeddings(x, None), {}
        for number, layer in enumerate(lion.layers[: last + 1] if stop_early else lion.layers):
            hidden_states = layer(hidden_states, order=order, conv_layout=Grid(rows, columns))
            if number in wanted:
                outputs[number] = lion.norm(hidden_states) if norm else hidden_states
        prefixes = [outputs[number][:, :1] for number in wanted]
        intermediates = [outputs[number][:, 1:] for number in wanted]
        if output_fmt == "NCHW":
            intermediates = [
                y.mT.unflatten(-1, (rows, columns)).contiguous() for y in intermediates
            ]
        if output_dict:
            answer = {"image_intermediates": intermediates}
            if return_prefix_tokens:
                answer["image_intermediates_prefix"] = prefixes
            return (
                answer
                if intermediates_only
                else answer | {"image_features": lion.norm(hidden_states)}
            )
        if return_prefix_tokens:
            intermediates = list(zip(intermediates, prefixes))
        return intermediates if intermediates_only else (lion.norm(hidden_states), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the layers after the wanted ones, and last norm and classifier if asked to."""
        wanted, last = feature_take_indices(len(self.lion.layers), indices)
        self.lion.layers = self.lion.layers[: last + 1]
        self.config.num_hidden_layers = len(self.lion.layers)  # for what is saved
        if prune_norm:
            self.lion.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a random one, or by none for `num_classes` 0."""
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
            pooling = GLOBAL_POOLS[global_pool] or "mean"
            self.config.classifier_pooling = pooling
            if self.lion.pooler is not None:
                self.lion.pooler.pooling = pooling
        self.num_classes, like = num_classes, self.lion.embeddings.cls_token
        self.classifier = nn.Identity()
        if num_classes > 0:
            self.config.num_labels = self.num_labels = num_classes
            place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
            self.classifier = linear = nn.Linear(self.num_features, num_classes, **place)
            nn.init.normal_(linear.weight, std=self.config.initializer_range)
            nn.init.zeros_(linear.bias)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Changes the image size; position embeddings are interpolated."""
        resize_images(self, img_size if isinstance(img_size, int) else list(img_size))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            self.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.gradient_checkpointing_disable()

    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions over parameter names, for timm's layer-wise learning rates."""
        return {
            "stem": r"^lion\.embeddings",
            "blocks": [(r"^lion\.layers\.(\d+)", None), (r"^lion\.norm", (99999,))],
        }


def _checked_pool(global_pool: str) -> str:
    if global_pool not in GLOBAL_POOLS:
        raise ValueError(f"global_pool={global_pool!r}: expected one of {tuple(GLOBAL_POOLS)}")
    return global_pool


def _resample_positions(
    state_dict: dict[str, torch.Tensor], model: LionTimmModel
) -> dict[str, torch.Tensor]:
    """Weights of square images for a model of another image size."""
    name, own = "lion.embeddings.position_embeddings", model.lion.embeddings.position_embeddings
    if own is None or name not in state_dict or state_dict[name].shape == own.shape:
        return state_dict
    grid = list(model.lion.embeddings.grid)
    return {
        **state_dict,
        name: resample_abs_pos_embed(state_dict[name], grid, num_prefix_tokens=1, antialias=False),
    }


def _create(variant: str, pretrained: bool, **kwargs) -> LionTimmModel:
    return build_model_with_cfg(
        LionTimmModel,
        variant,
        pretrained,
        pretrained_filter_fn=_resample_positions,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


CONFIGURATION = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "lion.embeddings.patch_embeddings",
    "classifier": "classifier",
    "license": "apache-2.0",
}

default_cfgs = generate_default_cfgs(
    {f"lion_{size}_patch16_224": CONFIGURATION for size in ("tiny", "small", "base")}
)


@register_model
def lion_tiny_patch16_224(pretrained: bool = False, **kwargs) -> LionTimmModel:
    """LION of DeiT-tiny's size: width 192, 3 heads, 12 layers."""
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    return _create("lion_tiny_patch16_224", pretrained, **(sizes | kwargs))


@register_model
def lion_small_patch16_224(pretrained: bool = False, **kwargs) -> LionTimmModel:
    """LION of DeiT-small's size: width 384, 6 heads, 12 layers."""
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return _create("lion_small_patch16_224", pretrained, **(sizes | kwargs))


@register_model
def lion_base_patch16_224(pretrained: bool = False, **kwargs) -> LionTimmModel:
    """LION of DeiT-base's size: width 768, 12 heads, 12 layers."""
    return _create("lion_base_patch16_224", pretrained, **kwargs)
