"""Tables of the original's names and of what they mean."""

from typing import NamedTuple

from .reading import LAYERS

TEXT_LAYER, IMAGE_LAYER = LAYERS["text"], LAYERS["image"]


class Source(NamedTuple):
    """Original tensors, or modules, that make up one of ours: concatenated, or a third of one."""

    names: tuple[str, ...]
    third: int | None = None


GATE = "lion.layers.{n}.attention.gate"

# Our name -> the original's. A row names a tensor, or a module with all its tensors.
NAMES: dict[str, dict[str, "str | Source"]] = {
    "text": {
        "lion.embeddings.word_embeddings": "bert.embeddings.word_embeddings",
        "lion.embeddings.token_type_embeddings": "bert.embeddings.token_type_embeddings",
        "lion.embeddings.position_embeddings": "bert.embeddings.position_embeddings",
        "lion.embeddings.norm": "bert.embeddings.LayerNorm",
        "lion.layers.{n}.attention.q_proj": f"{TEXT_LAYER}.attention.self.query",
        "lion.layers.{n}.attention.k_proj": f"{TEXT_LAYER}.attention.self.key",
        "lion.layers.{n}.attention.v_proj": f"{TEXT_LAYER}.attention.self.value",
        "lion.layers.{n}.attention.norm": f"{TEXT_LAYER}.attention.self.layer_norm",
        "lion.layers.{n}.attention.o_proj": f"{TEXT_LAYER}.attention.output.dense",
        "lion.layers.{n}.attention_norm": f"{TEXT_LAYER}.attention.output.LayerNorm",
        "lion.layers.{n}.mlp.fc1": f"{TEXT_LAYER}.intermediate.dense",
        "lion.layers.{n}.mlp.fc2": f"{TEXT_LAYER}.output.dense",
        "lion.layers.{n}.mlp_norm": f"{TEXT_LAYER}.output.LayerNorm",
        "lion.pooler.dense": "bert.pooler.dense",
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "decoder": "cls.predictions.decoder",
        "classifier": "classifier",
    },
    "image": {
        "lion.embeddings.cls_token": "cls_token",
        "lion.embeddings.position_embeddings": "pos_embed",
        "lion.embeddings.patch_embeddings": "patch_embed.proj",
        "lion.layers.{n}.attention_norm": f"{IMAGE_LAYER}.norm1",
        "lion.layers.{n}.attention.q_proj": Source((f"{IMAGE_LAYER}.attn.qkv",), third=0),
        "lion.layers.{n}.attention.k_proj": Source((f"{IMAGE_LAYER}.attn.qkv",), third=1),
        "lion.layers.{n}.attention.v_proj": Source((f"{IMAGE_LAYER}.attn.qkv",), third=2),
        "lion.layers.{n}.attention.o_proj": f"{IMAGE_LAYER}.attn.proj",
        "lion.layers.{n}.mlp_norm": f"{IMAGE_LAYER}.norm2",
        "lion.layers.{n}.mlp.fc1": f"{IMAGE_LAYER}.mlp.fc1",
        "lion.layers.{n}.mlp.fc2": f"{IMAGE_LAYER}.mlp.fc2",
        "lion.norm": "norm",
        "classifier": "head",
    },
}
CURVES = (f"{IMAGE_LAYER}.attn.a_i", f"{IMAGE_LAYER}.attn.a2_i")
GATES: dict[tuple[str, str, str], dict[str, "str | Source"]] = {
    ("text", "decay", "raster"): {f"{GATE}.bias": f"{TEXT_LAYER}.attention.self.ai"},
    ("text", "selective", "raster"): {GATE: f"{TEXT_LAYER}.attention.self.Wa_i"},
    ("image", "decay", "raster"): {f"{GATE}.bias": CURVES[0]},
    ("image", "decay", "snake"): {f"{GATE}.bias": Source(CURVES)},
    ("image", "selective", "raster"): {GATE: CURVES[0]},
    ("image", "selective", "snake"): {GATE: Source(CURVES)},
}
# In the files without a use: a buffer, the decoder's bias a second time, and positions that only
# LION-lit adds.
UNUSED = {
    "bert.embeddings.position_ids",
    "bert.embeddings.position_embeddings.weight",
    "cls.predictions.bias",
}

# The tensor of a layer that gives the family away, and whose first size is the number of heads.
# Without any it is LION-lit.
FAMILY_MARKS = {
    "text": {"attention.self.Wa_i.weight": "selective", "attention.self.ai": "decay"},
    "image": {"attn.a_i.weight": "selective", "attn.a_i": "decay"},
}
FAMILY_SETTING = {"text": "arch_type", "image": "mask_type"}
FAMILY_WORDS = {
    "lit": ("lit", "lion-lit", "linear_attention"),
    "decay": ("decay", "lion-d", "nova"),
    "selective": ("selective", "lion-s", "nova-inputdep"),
}

# Beginning of a head's names -> our class, and the tensor whose first size is the number of labels.
HEADS: dict[str, dict[str, tuple[str, str | None]]] = {
    "text": {
        "cls.predictions.": ("LionForMaskedLM", None),
        "classifier.": ("LionForSequenceClassification", "classifier.weight"),
    },
    "image": {"head.": ("LionForImageClassification", "head.weight")},
}

# Settings stored with text checkpoints that mean the same in LionConfig.
STORED_TEXT_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "hidden_act": str,
    "hidden_dropout_prob": (int, float),
    "attention_probs_dropout_prob": (int, float),
    "classifier_dropout": (int, float),
    "layer_norm_eps": float,
    "initializer_range": float,
    "pad_token_id": int,
}

HEAD_DIM = 64  # of all published models

TOKENIZER_NOTE = (
    "no tokenizer was written: the original models used uncased BERT WordPiece (30,522 words)."
    " Convert again with"
    " --tokenizer NAME_OR_FOLDER (google-bert/bert-base-uncased is that one), or save one into the"
    " folder with save_pretrained."
)
