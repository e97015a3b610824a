"""Trainer with LION's exemptions from weight decay."""

from torch import nn
from transformers import Trainer

from .modeling.modeling_lion import LionPreTrainedModel


class LionTrainer(Trainer):
    """`transformers.Trainer`, except that weight decay also spares class token, mask token and position embeddings.

    Trainer itself spares biases and norms, and with them LION's decays and gate biases (`gate.bias`).
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters to which weight decay applies, also in a model that wraps a LION model (PEFT, for one)."""
        exempt = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in model.named_modules()
            if isinstance(module, LionPreTrainedModel)
            for name in module.no_weight_decay()
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]
