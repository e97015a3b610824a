"""Small random models of every family for the tests."""

import torch

import lion_hf
from lion_hf import LionConfig
from lion_hf.modeling.configuration_lion import MASK_TYPES, PATCH_ORDERS

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "initializer_range": 0.2,
}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEXT_HEADS = (
    "MaskedLM",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
)
IMAGE_HEADS = ("ImageClassification", "MaskedImageModeling")
IMAGE_FAMILIES = [(m, o) for m in MASK_TYPES for o in PATCH_ORDERS]


def text_config(mask_type: str = "selective", **kwargs) -> LionConfig:
    options = {
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "chunk_size": 5,
        "num_labels": 3,
        **SIZES,
        **kwargs,
    }
    return LionConfig(modality="text", mask_type=mask_type, **options)


def image_config(mask_type: str = "selective", patch_order: str = "raster", **kwargs) -> LionConfig:
    options = {
        "image_size": 16,
        "patch_size": 4,
        "chunk_size": 5,
        "num_labels": 3,
        **SIZES,
        **kwargs,
    }
    return LionConfig(modality="image", mask_type=mask_type, patch_order=patch_order, **options)


def model(head: str, config: LionConfig):
    """A seeded model in evaluation mode; `head` is "Model" or what follows "LionFor"."""
    torch.manual_seed(1)
    return getattr(lion_hf, "LionModel" if head == "Model" else f"LionFor{head}")(config).eval()


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(5, 99, (batch, length))


def inputs_of(
    head: str, config: LionConfig, batch: int = 2, length: int = 11
) -> dict[str, torch.Tensor]:
    """Inputs that every head of a modality takes, with the labels of this one."""
    if config.modality == "image":
        side = config.image_size
        inputs = {"pixel_values": torch.randn(batch, 3, side, side)}
        if head == "ImageClassification":
            inputs["labels"] = torch.randint(0, 3, (batch,))
        if head == "MaskedImageModeling":
            inputs["bool_masked_pos"] = torch.rand(batch, (side // config.patch_size) ** 2) < 0.5
        return inputs
    shape = (batch, 4, length) if head == "MultipleChoice" else (batch, length)
    inputs = {
        "input_ids": torch.randint(5, 99, shape),
        "attention_mask": torch.ones(shape, dtype=torch.long),
    }
    labels = {
        "MaskedLM": lambda: {"labels": torch.randint(5, 99, shape)},
        "SequenceClassification": lambda: {"labels": torch.randint(0, 3, (batch,))},
        "TokenClassification": lambda: {"labels": torch.randint(0, 3, shape)},
        "QuestionAnswering": lambda: {
            "start_positions": torch.tensor([1] * batch),
            "end_positions": torch.tensor([3] * batch),
        },
        "MultipleChoice": lambda: {"labels": torch.randint(0, 4, (batch,))},
        "Model": dict,
    }
    return inputs | labels[head]()
