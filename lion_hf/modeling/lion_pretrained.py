"""The base class of the encoder and its heads.

It says how weights start, and what transformers must know.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .configuration_lion import LionConfig
from .lion_convolution import LionConvolution
from .lion_embeddings import LionImageEmbeddings
from .lion_layers import LionAttention, LionDecay, LionGate, LionLayer

# Auto class -> class in modeling_lion.py; for registration, and for the `auto_map` of saved models.
AUTO_MODELS = {
    "AutoModel": "LionModel",
    "AutoModelForMaskedLM": "LionForMaskedLM",
    "AutoModelForSequenceClassification": "LionForSequenceClassification",
    "AutoModelForTokenClassification": "LionForTokenClassification",
    "AutoModelForQuestionAnswering": "LionForQuestionAnswering",
    "AutoModelForMultipleChoice": "LionForMultipleChoice",
    "AutoModelForImageClassification": "LionForImageClassification",
    "AutoModelForMaskedImageModeling": "LionForMaskedImageModeling",
}
AUTO_MAP = {
    "AutoConfig": "configuration_lion.LionConfig",
    **{auto_name: f"modeling_lion.{name}" for auto_name, name in AUTO_MODELS.items()},
}

# Half-lives of the gates of an untrained model in tokens: geometrically spaced over the heads of a
# layer.
SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 2.0, 128.0


@contextlib.contextmanager
def code_goes_along(config: LionConfig) -> Iterator[None]:
    """Within it, saving the configuration also saves LION's code and an `auto_map` of all heads."""
    own = config.__dict__.get("auto_map")
    config.auto_map = {**(own or {}), **AUTO_MAP}
    try:
        yield
    finally:
        config.auto_map = own
        if own is None:
            del config.auto_map


class LionPreTrainedModel(PreTrainedModel):
    """Base class of the encoder and its heads."""

    config_class = LionConfig
    base_model_prefix = "lion"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LionTextEmbeddings", "LionImageEmbeddings", "LionLayer"]
    _keep_in_fp32_modules_strict = ["gate"]
    # read by the quantisers, some of which match it with parameters' whole names
    _keep_in_fp32_modules = [".*gate"]
    _can_record_outputs = {"hidden_states": LionLayer, "attentions": LionAttention}
    input_modalities: tuple[str, ...] = ("text",)

    def __init__(self, config: LionConfig, *args, **kwargs):
        if config.modality not in self.input_modalities:
            raise ValueError(
                f"{type(self).__name__} with modality={config.modality!r}: expected one of"
                f" {self.input_modalities}"
            )
        config.check()
        super().__init__(config, *args, **kwargs)
        self.main_input_name = "input_ids" if config.modality == "text" else "pixel_values"
        if config.mask_type == "lit":  # no gates
            self._keep_in_fp32_modules, self._keep_in_fp32_modules_strict = [], []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LionImageEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, LionConvolution):
            init.copy_(module.weight, module.identity())
        elif self.config.scale_output_init and self._ends_a_branch(module):
            init.normal_(module.weight, std=std / (2 * self.config.num_hidden_layers) ** 0.5)
        elif isinstance(module, LionDecay | LionGate):
            gates = _first_gates(self.config)
            init.copy_(module.bias, gates if isinstance(module, LionDecay) else -gates)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As in `PushToHubMixin`; LION's code goes along."""
        with code_goes_along(self.config):
            return super().push_to_hub(repo_id, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in `PreTrainedModel`; with `push_to_hub=True`, LION's code goes along."""
        pushes = kwargs.get("push_to_hub", False)
        with code_goes_along(self.config) if pushes else contextlib.nullcontext():
            super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # LION's forms are not attention functions of transformers, which guesses this from the
        # file in which it finds a head.
        return False

    def _ends_a_branch(self, module: nn.Module) -> bool:
        """Whether a module is the output projection of an attention or an MLP."""
        layers = [layer for layer in self.modules() if isinstance(layer, LionLayer)]
        return any(module in (layer.attention.o_proj, layer.mlp.fc2) for layer in layers)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would pull to a wrong place.

        Biases and norms are not among them: Trainer exempts those by itself.
        """
        exempt = (
            "cls_token",
            "mask_token",
            "position_embeddings",
            "position_embeddings.weight",
            "gate.bias",
            *(("gate.weight", "_conv.weight") if self.config.conv_kernel_size is not None else ()),
        )
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}


def _first_gates(config: LionConfig) -> torch.Tensor:
    """The gates of an untrained layer before the sigmoid, (curves * heads,)."""
    heads = config.num_attention_heads
    first, last = (0, 1) if heads > 1 else (0.5, 0.5)
    spacing = torch.linspace(first, last, heads, dtype=torch.float32)  # the default may be a half
    half_lives = SHORTEST_HALF_LIFE * (LONGEST_HALF_LIFE / SHORTEST_HALF_LIFE) ** spacing
    return torch.logit(0.5 ** (1 / half_lives)).repeat(config.num_patch_orders)
