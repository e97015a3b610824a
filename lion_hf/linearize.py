"""Softmax encoders of transformers to LION: `lion-hf linearize`, `linearize_checkpoint`, `linearize_model`.

BERT, RoBERTa, ViT and DeiT are LION's skeleton with another attention. Everything but that is copied; LION's gates are new.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from .convert import Conversion, check_words
from .hub import check_new_folder, new_folder, save_for_hub
from .modeling import modeling_lion
from .modeling.configuration_lion import LionConfig
from .modeling.lion_layers import LionDecay, LionGate
from .modeling.modeling_lion import LionPreTrainedModel
from .original import ConversionError

if TYPE_CHECKING:
    from .distillation import Distillation

BERT_LAYER = "{base}.encoder.layer.{n}"
VIT_LAYER = "{base}.layers.{n}"

# Our name -> that of transformers. A row names a tensor, or a module with all its tensors; {base} is "bert", "vit", ...
ENCODERS = {
    "text": {
        "lion.embeddings.word_embeddings": "{base}.embeddings.word_embeddings",
        "lion.embeddings.token_type_embeddings": "{base}.embeddings.token_type_embeddings",
        "lion.embeddings.position_embeddings": "{base}.embeddings.position_embeddings",
        "lion.embeddings.norm": "{base}.embeddings.LayerNorm",
        "lion.layers.{n}.attention.q_proj": f"{BERT_LAYER}.attention.self.query",
        "lion.layers.{n}.attention.k_proj": f"{BERT_LAYER}.attention.self.key",
        "lion.layers.{n}.attention.v_proj": f"{BERT_LAYER}.attention.self.value",
        "lion.layers.{n}.attention.o_proj": f"{BERT_LAYER}.attention.output.dense",
        "lion.layers.{n}.attention_norm": f"{BERT_LAYER}.attention.output.LayerNorm",
        "lion.layers.{n}.mlp.fc1": f"{BERT_LAYER}.intermediate.dense",
        "lion.layers.{n}.mlp.fc2": f"{BERT_LAYER}.output.dense",
        "lion.layers.{n}.mlp_norm": f"{BERT_LAYER}.output.LayerNorm",
    },
    "image": {
        "lion.embeddings.cls_token": "{base}.embeddings.cls_token",
        "lion.embeddings.position_embeddings": "{base}.embeddings.position_embeddings",
        "lion.embeddings.patch_embeddings": "{base}.embeddings.patch_embeddings.projection",
        "lion.layers.{n}.attention_norm": f"{VIT_LAYER}.layernorm_before",
        "lion.layers.{n}.attention.q_proj": f"{VIT_LAYER}.attention.q_proj",
        "lion.layers.{n}.attention.k_proj": f"{VIT_LAYER}.attention.k_proj",
        "lion.layers.{n}.attention.v_proj": f"{VIT_LAYER}.attention.v_proj",
        "lion.layers.{n}.attention.o_proj": f"{VIT_LAYER}.attention.o_proj",
        "lion.layers.{n}.mlp_norm": f"{VIT_LAYER}.layernorm_after",
        "lion.layers.{n}.mlp.fc1": f"{VIT_LAYER}.mlp.fc1",
        "lion.layers.{n}.mlp.fc2": f"{VIT_LAYER}.mlp.fc2",
        "lion.norm": "{base}.layernorm",
    },
}
POOLER = {"lion.pooler.dense": "{base}.pooler.dense"}
CLASSIFIER = {"classifier": "classifier"}
ANSWERS = {"qa_outputs": "qa_outputs"}
BERT_WORDS = {
    "dense": "cls.predictions.transform.dense",
    "norm": "cls.predictions.transform.LayerNorm",
    "decoder": "cls.predictions.decoder",
}
ROBERTA_WORDS = {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "decoder": "lm_head.decoder"}
ROBERTA_CLASSIFIER = {"lion.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"}
PIXELS = {"lion.embeddings.mask_token": "{base}.embeddings.mask_token", "decoder": "decoder.0"}


class Head(NamedTuple):
    """What a class of transformers becomes: our class, and the rows that it adds to its encoder's."""

    lion: str
    rows: dict[str, str]


HEADS = {
    "BertModel": Head("LionModel", POOLER),
    "BertForMaskedLM": Head("LionForMaskedLM", BERT_WORDS),
    "BertForPreTraining": Head("LionForMaskedLM", BERT_WORDS),
    "BertForSequenceClassification": Head("LionForSequenceClassification", POOLER | CLASSIFIER),
    "BertForTokenClassification": Head("LionForTokenClassification", CLASSIFIER),
    "BertForQuestionAnswering": Head("LionForQuestionAnswering", ANSWERS),
    "BertForMultipleChoice": Head("LionForMultipleChoice", POOLER | CLASSIFIER),
    "RobertaModel": Head("LionModel", POOLER),
    "RobertaForMaskedLM": Head("LionForMaskedLM", ROBERTA_WORDS),
    "RobertaForSequenceClassification": Head("LionForSequenceClassification", ROBERTA_CLASSIFIER),
    "RobertaForTokenClassification": Head("LionForTokenClassification", CLASSIFIER),
    "RobertaForQuestionAnswering": Head("LionForQuestionAnswering", ANSWERS),
    "RobertaForMultipleChoice": Head("LionForMultipleChoice", POOLER | CLASSIFIER),
    "ViTModel": Head("LionModel", {}),
    "ViTForImageClassification": Head("LionForImageClassification", CLASSIFIER),
    "ViTForMaskedImageModeling": Head("LionForMaskedImageModeling", PIXELS),
    "DeiTModel": Head("LionModel", {}),
    "DeiTForImageClassification": Head("LionForImageClassification", CLASSIFIER),
    "DeiTForImageClassificationWithTeacher": Head("LionForImageClassification", {"classifier": "cls_classifier"}),
    "DeiTForMaskedImageModeling": Head("LionForMaskedImageModeling", PIXELS),
}
MODEL_TYPES = {"bert": "text", "roberta": "text", "vit": "image", "deit": "image"}


def without_distillation_token(x: torch.Tensor) -> torch.Tensor:
    """A sequence of DeiT, (B, 2 + patches, ...), without its second token, which LION does not have."""
    return torch.cat([x[:, :1], x[:, 2:]], dim=1)


# Tensors that change on their way: (model type, our name) -> from theirs and its configuration.
CHANGED: dict[tuple[str, str], Callable[[torch.Tensor, PreTrainedConfig], torch.Tensor]] = {
    # RoBERTa's positions begin behind that of the padding token
    ("roberta", "lion.embeddings.position_embeddings.weight"): lambda x, config: x[config.pad_token_id + 1 :],
    ("deit", "lion.embeddings.position_embeddings"): lambda x, config: without_distillation_token(x),
    # a convolution with a kernel of one pixel
    ("vit", "decoder.weight"): lambda x, config: x.flatten(1),
    ("deit", "decoder.weight"): lambda x, config: x.flatten(1),
}

# Fields of LionConfig that mean the same in theirs.
SAME_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "id2label", "label2id", "problem_type",
)  # fmt: skip
SAME_TEXT_FIELDS = (
    "vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id", "classifier_dropout", "tie_word_embeddings",
)  # fmt: skip
SAME_IMAGE_FIELDS = ("image_size", "patch_size", "num_channels", "qkv_bias")

# Settings with which theirs is not LION's skeleton: name -> the only value that is.
NEEDED_SETTINGS = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
NEW = (".attention.gate.", ".attention.norm.")  # parameters that softmax attention has nothing to copy into
# Parts of a checkpoint, by the beginnings of their names, that another head of the same network has; and buffers of old ones.
OTHER_HEADS = re.compile(r"(\w+\.)?pooler\.|cls\.|lm_head\.|\w*classifier\.|qa_outputs\.|decoder\.|.*position_ids$")


@dataclass
class Copying:
    """What the copy is to be: fields of LionConfig, and how its attention starts.

    Softmax attention is positive and its rows sum to one, so a positive feature map and division by the row sum are the nearest
    to it. It is also sharper than a product of features: `sharpness` multiplies queries and keys, which makes elu(x) + 1 nearer
    to relu(x).
    """

    mask_type: str = field(default="selective", metadata={"help": "lit, decay or selective."})
    attention_form: str = field(default="auto", metadata={"help": "attention, chunk, recurrent or auto."})
    patch_order: str = field(default="raster", metadata={"help": "raster, or snake for both S-curves of an image."})
    feature_map: str = field(default="elu_plus_one", metadata={"help": "identity, elu_plus_one or normalized_silu."})
    normalize_attention: bool = field(default=True, metadata={"help": "Divide by the row sum."})
    attention_norm: bool = field(default=False, metadata={"help": "A LayerNorm over the heads, which the source lacks."})
    half_life: float = field(
        default=1000.0, metadata={"help": "Tokens in which all gates halve at first; 0 for LION's own, spaced over the heads."}
    )
    sharpness: float = field(default=2.0, metadata={"help": "Factor of queries and keys, above 0."})
    seed: int = field(default=0, metadata={"help": "Of the gates' weights in LION-S, and of the distillation."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the weights for the model card; the source's if not given."}
    )

    def __post_init__(self):
        if self.half_life != 0 and not 1e-3 <= self.half_life < float("inf"):
            raise ConversionError(f"half_life={self.half_life}: expected 0, or a number of tokens of at least 0.001")
        if not 0 < self.sharpness < float("inf"):
            raise ConversionError(f"sharpness={self.sharpness}: expected a number above 0")
        if not 0 <= self.seed < 2**32 - 1:
            raise ConversionError(f"seed={self.seed}: expected an integer from 0 to {2**32 - 2}")


LION_FIELDS = ("mask_type", "attention_form", "patch_order", "feature_map", "normalize_attention", "attention_norm")


@dataclass(frozen=True)
class Linearization(Conversion):
    """What was made: the folder, the model's class and configuration, what the user should know, and measured numbers."""

    metrics: dict[str, float]


def linearize_checkpoint(
    source: str | os.PathLike, output: str | os.PathLike, *, distillation: "Distillation | None" = None, **options: Any
) -> Linearization:
    """Turns a pretrained BERT, RoBERTa, ViT or DeiT into a LION folder for `from_pretrained`, with all that fits copied.

    Args:
        source: folder or Hub name of a checkpoint of transformers. No code that comes with it is run.
        output: the folder to write; it must not exist, or be empty. It appears only if all went well.
        distillation: how to teach the copy by the source; None to leave it as copied.
        **options: fields of `Copying`.

    Returns:
        The folder, the model's class name and configuration, notes, and the distillation's numbers.

    Raises:
        ValueError: for a source that is no such checkpoint or has parts that LION lacks, an option of another value, data that
            do not fit, or an output folder that is not empty. All is checked before training starts.
    """
    copying = _copying(options)
    output = check_new_folder(output)
    teacher, notes = load_softmax_model(source)
    student, more = linearize_model(teacher, **options)
    processor, missing = _processor(source, student.config)
    notes += more + missing
    license, unknown = (copying.license, []) if copying.license else _license(source)
    notes += unknown

    with new_folder(output) as folder:
        metrics = {}
        if distillation is not None:
            from .distillation import distil

            run = folder.with_name(f"{folder.name}.run")
            metrics, more = distil(student, teacher, processor, distillation, run, copying.seed)
            notes += more
        base_model = None if Path(source).is_dir() else str(source)
        save_for_hub(student, folder, processing_class=processor, license=license, base_model=base_model)
    return Linearization(output, type(student).__name__, student.config, tuple(notes), metrics)


def load_softmax_model(source: str | os.PathLike) -> tuple[PreTrainedModel, list[str]]:
    """A checkpoint that can be linearised, in float32, and notes about parts of it that are left out.

    Raises:
        ConversionError: if there is none, or it has settings or a head that LION lacks, or lacks weights.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # also the strict configurations' own classes
        raise ConversionError(f"source={str(source)!r} has no configuration that transformers can read: {error}") from error
    architecture = (config.architectures or [None])[0]
    check_softmax_config(config, architecture)
    cls = getattr(transformers, architecture)
    try:
        model, info = cls.from_pretrained(source, config=config, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # files may hold anything, and torch and safetensors raise accordingly
        raise ConversionError(f"the weights of {source} cannot be loaded as {architecture}: {error}") from error
    spare = r"(\w+\.)?pooler\." if CLASSIFIER.keys().isdisjoint(HEADS[architecture].rows) else "(?!)"  # classifiers read it
    missing = sorted(name for name in info["missing_keys"] if not re.match(spare, name))
    _refuse_names(f"{source} lacks weights of {architecture}", missing)
    unknown = sorted(name for name in info["unexpected_keys"] if not OTHER_HEADS.match(name))
    _refuse_names(f"{source} has weights that {architecture} does not know", unknown)
    notes = []
    if len(missing) < len(info["missing_keys"]) and cls.__name__ in ("BertModel", "RobertaModel"):
        notes.append("the source has no pooler: pooler_output is that of random weights.")
    left = sorted({".".join(name.split(".")[:2]) for name in info["unexpected_keys"] if not name.endswith("position_ids")})
    if left:
        notes.append(f"the source also has parts that {architecture} does not read: {', '.join(left)}.")
    return model.eval(), notes


def check_softmax_config(config: PreTrainedConfig, architecture: str | None) -> None:
    """Raises ConversionError, which names the setting, if a configuration is not that of LION's skeleton."""
    if config.model_type not in MODEL_TYPES:
        raise ConversionError(f"model_type={config.model_type!r}: expected one of {tuple(MODEL_TYPES)}")
    legal = tuple(name for name in HEADS if name.lower().startswith(config.model_type))
    if architecture not in legal:
        found = config.architectures or architecture  # a class of one's own has a name, but its configuration may have none
        raise ConversionError(f"architectures={found}: expected one of {legal}, which LION has the heads for")
    for name, legal in NEEDED_SETTINGS.items():
        value = getattr(config, name, legal)
        if value != legal:
            raise ConversionError(f"{name}={value!r}: expected {legal!r}, because LION has nothing of the kind")
    if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
        raise ConversionError(f"embedding_size={config.embedding_size}: expected hidden_size={config.hidden_size}")
    if config.hidden_act not in ACT2FN:
        raise ConversionError(f"hidden_act={config.hidden_act!r}: expected one of {sorted(ACT2FN)}")
    if architecture == "RobertaForMaskedLM" and config.hidden_act != "gelu":
        raise ConversionError(
            f"hidden_act={config.hidden_act!r} with RobertaForMaskedLM: expected 'gelu', because its head has gelu whatever"
            " hidden_act says, and LION's has hidden_act"
        )
    if config.model_type == "roberta" and config.pad_token_id is None:
        raise ConversionError("pad_token_id=None with RoBERTa: expected a number, behind which its positions begin")
    if MODEL_TYPES[config.model_type] == "image":
        sides = config.patch_size if isinstance(config.patch_size, list | tuple) else [config.patch_size]
        if len(set(sides)) > 1:
            raise ConversionError(f"patch_size={config.patch_size}: expected a square")
        if architecture.endswith("ForMaskedImageModeling") and config.encoder_stride != sides[0]:
            raise ConversionError(f"encoder_stride={config.encoder_stride}: expected patch_size={sides[0]}, LION's only one")


def linearize_model(teacher: PreTrainedModel, **options: Any) -> tuple[LionPreTrainedModel, list[str]]:
    """A LION model with the weights of a softmax model of transformers, and notes about what LION lacks.

    Args:
        teacher: of one of the classes in `HEADS`. It stays as it is.
        **options: fields of `Copying`; what is not of the model is not read.

    Raises:
        ConversionError: for a teacher that LION has no skeleton or head for, or options that do not fit.
    """
    copying = _copying(options)
    theirs, architecture = teacher.config, type(teacher).__name__
    check_softmax_config(theirs, architecture)
    config = _config(theirs, copying)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(copying.seed)
        student = getattr(modeling_lion, HEADS[architecture].lion)(config)

    weights, expected = _weights(teacher, student), student.state_dict()
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(f"{name} would have shape {tuple(tensor.shape)}: expected {tuple(expected[name].shape)}")
    student.load_state_dict(weights, strict=False)
    student.tie_weights()
    sharpen(student, copying.sharpness)
    if copying.half_life:
        set_half_life(student, copying.half_life)
    notes = []
    if theirs.model_type == "deit":
        notes.append("DeiT's distillation token, its position and its classifier are left out: LION reads the class token.")
    if architecture == "BertForPreTraining":
        notes.append("the next-sentence head and the pooler are left out: LION has no such head.")
    if architecture in ("ViTModel", "DeiTModel") and teacher.pooler is not None:
        notes.append("the pooler's dense layer is left out: LION's pooler_output of images is the class token as it is.")
    return student.eval(), notes


@torch.no_grad()
def sharpen(model: LionPreTrainedModel, sharpness: float) -> None:
    """Multiplies all queries and keys by a number, in the projections that they come from."""
    for layer in model.base_model.layers:
        for projection in (layer.attention.q_proj, layer.attention.k_proj):
            for parameter in projection.parameters():
                parameter.mul_(sharpness)


@torch.no_grad()
def set_half_life(model: LionPreTrainedModel, half_life: float) -> None:
    """Sets all gates, LION-S's where the token says nothing, to halve in this number of tokens; LION-lit has none."""
    rate = math.log(2) / half_life
    before_sigmoid = -rate - math.log(-math.expm1(-rate))  # logit of exp(-rate), which may round to 0 or 1
    for module in model.modules():
        if isinstance(module, LionDecay | LionGate):
            module.bias.fill_(before_sigmoid if isinstance(module, LionDecay) else -before_sigmoid)


def source_name(name: str, teacher: PreTrainedModel) -> str:
    """The teacher's name for one of our tensors or modules, as it is called behind a head ("lion.layers.0...")."""
    rows = ENCODERS[MODEL_TYPES[teacher.config.model_type]] | HEADS[type(teacher).__name__].rows
    number = re.search(r"layers\.(\d+)\.", name)
    layer = number[1] if number else ""
    row, leaf = name.replace(f"layers.{layer}.", "layers.{n}."), ""
    if row not in rows:  # then its module is
        row, _, leaf = row.rpartition(".")
        leaf = f".{leaf}"
    prefix = teacher.base_model_prefix
    theirs = rows[row].format(base=prefix, n=layer) + leaf
    return theirs.removeprefix(f"{prefix}.") if teacher.base_model is teacher else theirs


def _copying(options: dict[str, Any]) -> Copying:
    legal = [entry.name for entry in fields(Copying)]
    for name in options:
        if name not in legal:
            raise ConversionError(f"{name}={options[name]!r}: the options are {legal}")
    return Copying(**options)


def _config(theirs: PreTrainedConfig, copying: Copying) -> LionConfig:
    modality = MODEL_TYPES[theirs.model_type]
    names = SAME_FIELDS + (SAME_TEXT_FIELDS if modality == "text" else SAME_IMAGE_FIELDS)
    same = {name: getattr(theirs, name) for name in names}
    if theirs.model_type == "roberta":
        same["max_position_embeddings"] -= theirs.pad_token_id + 1
    if modality == "image" and not isinstance(theirs.patch_size, int):
        same["patch_size"] = theirs.patch_size[0]
    try:
        return LionConfig(
            modality=modality,
            use_position_embeddings=True,
            classifier_pooling="cls",
            drop_path_rate=0.0,
            **same,
            **{name: getattr(copying, name) for name in LION_FIELDS},
        )
    except Exception as error:  # the strict configuration raises classes of its own
        raise ConversionError(f"no LION model with these settings: {error}") from error


def _weights(teacher: PreTrainedModel, student: LionPreTrainedModel) -> dict[str, torch.Tensor]:
    """The teacher's tensors under the student's names, after the check that none is missing."""
    tensors, prefix = teacher.state_dict(), "lion." if student.base_model is student else ""
    plan = {name: source_name(prefix + name, teacher) for name in student.state_dict() if not any(x in name for x in NEW)}
    _refuse_names(f"{type(teacher).__name__} has other weights than expected; missing", sorted({*plan.values()} - {*tensors}))
    weights = {}
    for name, theirs in plan.items():
        change = CHANGED.get((teacher.config.model_type, prefix + name))
        tensor = tensors[theirs].detach().to("cpu", torch.float32)
        weights[name] = tensor if change is None else change(tensor, teacher.config)
    return weights


def _refuse_names(fault: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ConversionError(f"{fault}: {', '.join(names[:5])}{more}")


def _processor(source: str | os.PathLike, config: LionConfig) -> tuple[Any, list[str]]:
    """The source's tokenizer or image processor, or None with a note."""
    kind, auto = ("tokenizer", AutoTokenizer) if config.modality == "text" else ("image processor", AutoImageProcessor)
    try:
        processor = auto.from_pretrained(source, trust_remote_code=False)
        found = kind != "tokenizer" or set(processor.get_vocab()) - set(processor.all_special_tokens)  # else it is made up
    except Exception as error:  # files may hold anything, and transformers and tokenizers raise accordingly
        found, reason = False, f" ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    else:
        reason = ""
    if not found:
        return None, [f"the source has no {kind} that can be read{reason}: save one into the folder with save_pretrained."]
    if kind == "tokenizer":
        check_words(processor, config)
    return processor, []


def _license(source: str | os.PathLike) -> tuple[str, list[str]]:
    """The licence on the source's model card, else "unknown" with a note."""
    folder = Path(source)
    try:
        license = ModelCard.load(folder / "README.md" if folder.is_dir() else str(source)).data.license
    except Exception:  # a missing card, or an unreachable Hub, whose client passes on errors of its HTTP library
        license = None
    if license:
        return license, []
    return "unknown", ["the source's model card names no licence: the new one says unknown (--license)."]
