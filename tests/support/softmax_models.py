"""Small softmax models of transformers, inputs for them, and folders with such models."""

import csv
import os
import signal

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.models import SIZES, SPECIAL_TOKENS
from torch.nn import functional as F
from transformers import BertTokenizer, ViTImageProcessor

from lion_hf.linearize import stage
from lion_hf.linearize.copying import linearize_model
from lion_hf.linearize.families import FAMILIES, MODEL_TYPES
from lion_hf.modeling import lion_layers

TEXT = {
    "vocab_size": 60,
    "max_position_embeddings": 20,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-7,
    "num_labels": 3,
}
IMAGE = {
    "image_size": [8, 12],
    "patch_size": 4,
    "encoder_stride": 4,
    "layer_norm_eps": 1e-5,
    "num_labels": 3,
}
OTHERS = {
    "bert": {"pad_token_id": 0, "type_vocab_size": 2},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "camembert": {"pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"pad_token_id": 0, "hidden_dim": 40, "activation": "gelu"},
    "electra": {"pad_token_id": 0, "type_vocab_size": 2, "embedding_size": 24},
    "vit": {},
    "deit": {},
    "dinov2": {"mlp_ratio": 2, "layerscale_value": 0.5, "image_size": 12},
}
TYPE_OF = {
    f"{family.classes}{suffix}": name
    for name, family in FAMILIES.items()
    for suffix in family.heads
}
ONE_OF_EACH = (
    "BertForSequenceClassification",
    "RobertaForMaskedLM",
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)


def softmax_model(architecture: str, **changes):
    """A random softmax model in evaluation mode, without parameters that hide mistakes."""
    kind = TYPE_OF[architecture]
    sizes = TEXT if MODEL_TYPES[kind] == "text" else IMAGE
    if "MaskedImage" in architecture:  # which in transformers takes squares only
        sizes = {**sizes, "image_size": 8}
    if "QuestionAnswering" in architecture:
        sizes = {**sizes, "num_labels": 2}
    cls = getattr(transformers, architecture)
    torch.manual_seed(1)
    model = cls(
        cls.config_class(
            **{**SIZES, **sizes, **OTHERS[kind], "architectures": [architecture], **changes}
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs_of(architecture: str) -> dict[str, torch.Tensor]:
    """Inputs for any of the models; texts with padding behind the shorter one."""
    kind = TYPE_OF[architecture]
    if MODEL_TYPES[kind] == "image":
        if "MaskedImage" in architecture:
            return {
                "pixel_values": torch.randn(2, 3, 8, 8),
                "bool_masked_pos": torch.rand(2, 4) < 0.5,
            }
        return {"pixel_values": torch.randn(2, 3, 8, 12)}
    input_ids, mask = torch.randint(5, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    input_ids[1, 6:], mask[1, 6:] = OTHERS[kind]["pad_token_id"], 0
    if "MultipleChoice" in architecture:
        input_ids, mask = input_ids[None], mask[None]
    return {"input_ids": input_ids, "attention_mask": mask}


@pytest.fixture
def softmax(monkeypatch):
    """Puts softmax attention in place of LION's; the feature map must be the identity."""

    def attention(query, key, value, log_decay, attention_mask=None, **kwargs):
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    monkeypatch.setattr(lion_layers, "lion_attention", attention)


def as_softmax(teacher):
    """A copy whose attention is the teacher's under the fixture `softmax`."""
    return linearize_model(
        teacher, sharpness=1.0, feature_map="identity", attention_form="attention"
    )[0]


def without_second_token(teacher) -> None:
    """DeiT as LION copies it: without the distillation token."""
    teacher.base_model.embeddings.register_forward_hook(
        lambda _m, _a, x: torch.cat([x[:, :1], x[:, 2:]], dim=1)
    )
    if type(teacher).__name__ == "DeiTForMaskedImageModeling":  # which counts on it
        teacher.deit.layernorm.register_forward_hook(
            lambda _m, _a, x: torch.cat([x[:, :1], x], dim=1)
        )


def answers_of(outputs) -> list[torch.Tensor]:
    names = (
        "cls_logits",
        "logits",
        "prediction_logits",
        "start_logits",
        "end_logits",
        "reconstruction",
        "last_hidden_state",
    )
    found = [outputs[name] for name in names if outputs.get(name) is not None]
    return found[:1] if "cls_logits" in outputs else found


@pytest.fixture
def text_source(tmp_path):
    """A folder with BERT as classifier, its tokenizer and card, and two small tables beside it."""
    words = [*SPECIAL_TOKENS, "good", "bad", "film", "a", "the", "very"]
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}, "num_labels": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    softmax_model(
        "BertForSequenceClassification", vocab_size=len(words), **names, **dropout
    ).save_pretrained(tmp_path / "source")
    BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(
        tmp_path / "source"
    )
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n")
    for part in ("train", "validation"):
        with open(tmp_path / f"{part}.csv", "w", newline="") as file:
            rows = [(f"a very {word} film", word) for word in ("good", "bad")] * 4
            csv.writer(file).writerows([("text", "label"), *rows])
    return tmp_path / "source"


@pytest.fixture
def image_source(tmp_path):
    """A folder with a ViT as classifier and its image processor, and small images beside it."""
    names = {
        "id2label": {0: "dark", 1: "light"},
        "label2id": {"dark": 0, "light": 1},
        "num_labels": 2,
    }
    softmax_model("ViTForImageClassification", **names, image_size=8).save_pretrained(
        tmp_path / "source"
    )
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "source")
    for part in ("train", "val"):
        for label, number in names["label2id"].items():
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for n in range(3):
                pixels = np.random.default_rng(n).integers(
                    0, 100, (8, 8, 3), dtype=np.uint8
                ) + np.uint8(100 * number)
                Image.fromarray(pixels).save(tmp_path / "images" / part / label / f"{n}.png")
    return tmp_path / "source"


def stop_at(monkeypatch, step: int) -> list[int]:
    """Ctrl-C in a step of learning, counted over all stages; returns what grows with each step."""
    steps, own = [], stage.Learner._step

    def counted(self, *args):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return own(self, *args)

    monkeypatch.setattr(stage.Learner, "_step", counted)
    return steps
