"""Trains LION on images with the DeiT recipe, from scratch or from a checkpoint, with or without a teacher.

    # LION-S base on ImageNet (train/ and val/ with one folder a class), 8 GPUs, in the original's words:
    torchrun --nproc_per_node=8 -m lion_hf images --model lion_base_patch16_224 --batch-size 128 \\
        --data-path imagenet --output_dir outputs/lion-s --mask_type Selective --order S --format Attention --pos_emb

    # the same by a recipe's file, with RegNetY-16GF as teacher:
    accelerate launch -m lion_hf images --config images/imagenet-distilled \\
        --model lion-s-snake-base-patch16-224 --data_path imagenet --output_dir outputs/lion-s-distilled

    # a small model on small images in minutes on a CPU; then a softmax ViT of the same size, for comparison:
    lion-hf images --config images/fashion-mnist --data_path fashion_mnist \\
        --output_dir outputs/fashion-mnist
    lion-hf images --config images/fashion-mnist --data_path fashion_mnist \\
        --softmax --output_dir outputs/fashion-mnist-softmax

    # fine-tuning at another resolution:
    lion-hf images --model outputs/fashion-mnist --input_size 36 --data_path fashion_mnist \\
        --epochs 1 --output_dir outputs/fashion-mnist-36

Data come from an image folder, parquet files or the Hub. Started again, it continues from the newest whole checkpoint. In the
end the folder holds the model with a model card, curves (PNG, CSV), the settings and the metrics, and in ema/ the model with
averaged weights.
"""

import difflib
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import timm
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from ..auto import image_processor
from ..data.augmentation import Augmentation, EvaluationTransform, ImageCollator, TrainingTransform
from ..data.images import describe, read_images
from ..data.samples import SeededDataset
from ..folders import has_weights
from ..hub import save_for_hub
from ..modeling.configuration_lion import LionConfig
from ..presets import find_preset, preset_names
from ..timm_models import resize_images
from ..training.run import run
from ..training.settings import parse_mapping, parse_overrides, parse_settings
from ..training.trainer import LionTrainingArguments
from .image_trainer import DISTILLATIONS, ImageTrainer
from .teacher import load_teacher

logger = logging.getLogger(__name__)

# The original's words for LION's fields; LION's own are legal too.
MASK_TYPES = {"Lit": "lit", "Decay": "decay", "Selective": "selective"}
ORDERS = {"Normal": "raster", "S": "snake"}
FORMATS = {"Attention": "attention", "RNN": "recurrent", "Chunk": "chunk", "auto": "auto"}


@dataclass
class ModelSettings:
    """What to train."""

    model: str = field(
        default="lion-s-snake-tiny-patch16-224",
        metadata={
            "help": "Preset in configs/, model folder or Hub name, lion_{tiny,small,base}_patch16_224 (without --pos_emb no"
            " position embeddings), or another model of timm. With weights, training starts from them.",
            "aliases": ["--preset", "--model_name_or_path"],
        },
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Random weights even if there are others."}
    )
    model_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the configuration: name=value,name=value."}
    )
    softmax: bool = field(
        default=False,
        metadata={"help": "Train a softmax ViT of the same sizes instead, for comparison."},
    )
    mask_type: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(MASK_TYPES)}."}
    )
    order: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(ORDERS)}.", "aliases": ["--patch_order"]},
    )
    format: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(FORMATS)}.", "aliases": ["--attention_form"]},
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "Tokens a chunk in the chunk form."}
    )
    pos_emb: bool = field(default=False, metadata={"help": "Position embeddings."})
    cls_tok: bool = field(
        default=False,
        metadata={"help": "Classify by the class token, not by the mean over all tokens."},
    )
    drop_path: float | None = field(
        default=None, metadata={"help": "Stochastic depth of the last layer; 0.1 in LION."}
    )
    input_size: int | None = field(
        default=None,
        metadata={
            "help": "Height and width of images in pixels.",
            "aliases": ["--image_size", "--img_size"],
        },
    )

    def overrides(self, original_words: bool) -> dict:
        """Fields of LionConfig that the options set."""
        fields = {
            "mask_type": _word("mask_type", self.mask_type, MASK_TYPES),
            "patch_order": _word("order", self.order, ORDERS),
            "attention_form": _word("format", self.format, FORMATS),
            "chunk_size": self.chunk_size,
            "drop_path_rate": self.drop_path,
            "use_position_embeddings": True if self.pos_emb else False if original_words else None,
            "classifier_pooling": "cls" if self.cls_tok else "mean" if original_words else None,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass
class DataSettings:
    """What to train on: one of data_path, dataset, and the two files."""

    data_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder with train/ and val/, validation/ or test/ (a folder a class), or parquet files named so."
        },
    )
    dataset: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "Parquet file."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of images; by default image or img."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of classes; by default label or labels."}
    )


@dataclass
class TeachingSettings:
    """A teacher, and the average of the weights."""

    distillation_type: str = field(
        default="none", metadata={"help": "none, hard (the teacher's class) or soft."}
    )
    teacher_model: str = field(
        default="regnety_160.deit_in1k",
        metadata={"help": "Model of timm, or transformers folder or Hub name."},
    )
    teacher_path: str | None = field(
        default=None, metadata={"help": "File with weights of a timm teacher; timm's own if none."}
    )
    distillation_alpha: float = field(
        default=0.5, metadata={"help": "Weight of the teacher in the loss."}
    )
    distillation_tau: float = field(
        default=1.0, metadata={"help": "Temperature of soft distillation."}
    )
    distillation_token: bool = field(
        default=False,
        metadata={
            "help": "The class token learns from the teacher, with a head of its own; the other reads the mean."
        },
    )
    model_ema: bool = field(default=True, metadata={"help": "Keep an average of the weights."})
    model_ema_decay: float = field(default=0.99996, metadata={"help": "Its decay a step."})
    model_ema_warmup: bool = field(
        default=False, metadata={"help": "Raise the decay from 0, for short trainings."}
    )

    def __post_init__(self):
        if self.distillation_type not in DISTILLATIONS:
            raise ValueError(
                f"distillation_type={self.distillation_type!r}: expected one of {DISTILLATIONS}"
            )
        for name in ("distillation_alpha", "model_ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number in [0, 1]")
        if self.distillation_tau <= 0:
            raise ValueError(
                f"distillation_tau={self.distillation_tau}: expected a positive number"
            )
        if self.distillation_token and self.distillation_type == "none":
            raise ValueError(
                "distillation_token without a teacher: expected --distillation-type hard or soft"
            )


@dataclass
class ImageTrainingArguments(LionTrainingArguments):
    """`LionTrainingArguments` with the defaults of the DeiT recipe (arXiv 2012.12877) and the words of its command line."""

    per_device_train_batch_size: int = field(
        default=64,
        metadata={
            "help": "Images at a time a device.",
            "aliases": ["--batch-size", "--batch_size"],
        },
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Images at a time a device in evaluation."}
    )
    num_train_epochs: float = field(
        default=300, metadata={"help": "Epochs.", "aliases": ["--epochs"]}
    )
    lr: float = field(
        default=5e-4,
        metadata={"help": "Learning rate of a total batch of 512; scaled with the batch."},
    )
    learning_rate: float = field(
        default=0.0, metadata={"help": "Learning rate as it is, in place of --lr."}
    )
    min_lr: float = field(
        default=1e-5, metadata={"help": "Learning rate at the end of the cosine schedule."}
    )
    warmup_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of warm-up, in place of --warmup_steps."}
    )
    warmup_steps: float = field(
        default=5 / 300, metadata={"help": "Steps of linear warm-up; below 1: share of all steps."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr", metadata={"help": "Schedule of the learning rate."}
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that load images.", "aliases": ["--num_workers"]}
    )
    eval_strategy: str = field(
        default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."}
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to write a checkpoint: no, steps or epoch."}
    )

    def __post_init__(self):
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: its name here is smoothing"
            )
        if self.warmup_epochs is not None:
            if not 0 <= self.warmup_epochs < self.num_train_epochs:
                raise ValueError(
                    f"warmup_epochs={self.warmup_epochs}: expected less than the {self.num_train_epochs} epochs"
                )
            self.warmup_steps = self.warmup_epochs / self.num_train_epochs
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr": self.min_lr}
        super().__post_init__()
        if not self.learning_rate:
            batch = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
            self.learning_rate = self.lr * batch / 512


def main(argv: list[str] | None = None, prog: str | None = None) -> dict[str, float]:
    settings = parse_settings(
        __doc__,
        ModelSettings,
        DataSettings,
        Augmentation,
        TeachingSettings,
        ImageTrainingArguments,
        argv=argv,
        prog=prog,
    )
    args = settings[-1]
    logging.basicConfig(
        level=logging.INFO if args.should_log else logging.ERROR, format="%(name)s: %(message)s"
    )
    set_seed(args.seed)
    try:
        trainer = build_trainer(*settings)
    except ValueError as error:
        raise SystemExit(f"run_image_classification.py: {error}") from error
    model, data = trainer.model, settings[1]
    name = data.dataset or Path(data.data_path or data.train_file).name
    kind = " ".join(filter(None, (model.config.model_type, getattr(model.config, "mask_type", ""))))
    metrics = run(
        trainer,
        title=f"{kind} on {name}, {model.num_parameters() / 1e6:.2f} M parameters",
        metric="accuracy",
        dataset=name,
        settings=settings[:-1],
        finish=partial(save_average, trainer, name),
    )
    shown = {
        x: metrics[f"eval_{x}"]
        for x in ("accuracy", "accuracy_top5", "ema_accuracy")
        if f"eval_{x}" in metrics
    }
    logger.info(
        "%s in %s", ", ".join(f"{x} {value:.2%}" for x, value in shown.items()), args.output_dir
    )
    skipped = trainer.train_dataset.skipped + trainer.eval_dataset.skipped
    if skipped:
        logger.warning(
            "images that could not be read were replaced %d times; the warnings above name them",
            skipped,
        )
    return metrics


def build_trainer(model_settings, data, augmentation, teaching, args) -> ImageTrainer:
    """Everything that can go wrong before the first step goes wrong here, with a ValueError."""
    with args.main_process_first():  # tables are prepared once, the other processes read the cache
        train, validation = read_images(
            data.data_path,
            data.dataset,
            data.dataset_config,
            data.train_file,
            data.validation_file,
            data.image_column,
            data.label_column,
        )
    logger.info(
        "%d classes; training: %s; evaluation: %s",
        len(train.names),
        describe(train),
        describe(validation),
    )
    model = build_model(model_settings, train.names, teaching.distillation_token)
    size = model_settings.input_size or getattr(model.config, "image_size", 224)
    processor = image_processor(size, augmentation.eval_crop_ratio)
    teacher = None
    if teaching.distillation_type != "none":
        teacher = load_teacher(
            teaching.teacher_model, teaching.teacher_path, len(train.names), processor
        )
    return ImageTrainer(
        model,
        args,
        train_dataset=SeededDataset(
            train,
            TrainingTransform(augmentation, size, processor),
            args.seed,
            repeats=augmentation.repeated_aug,
        ),
        eval_dataset=SeededDataset(
            validation, EvaluationTransform(processor), args.seed, vary=False
        ),
        data_collator=ImageCollator(len(train.names), augmentation),
        processing_class=processor,
        compute_metrics=partial(accuracies, num_classes=len(train.names)),
        preprocess_logits_for_metrics=answers,
        teacher=teacher,
        distillation=teaching.distillation_type,
        alpha=teaching.distillation_alpha,
        tau=teaching.distillation_tau,
        average_decay=teaching.model_ema_decay if teaching.model_ema else None,
        average_warmup=teaching.model_ema_warmup,
    )


def build_model(
    settings: ModelSettings, names: list[str], distillation_head: bool
) -> PreTrainedModel:
    """The model of the settings, for the classes of these names, with weights if there are any and they are wanted."""
    name = settings.model
    labels = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {label: n for n, label in enumerate(names)},
    }
    folder = Path(find_preset(name))
    folder = folder if (folder / "config.json").is_file() else None
    original_words = folder is None and name.startswith("lion_") and timm.is_model(name)
    if original_words:
        size = name.split("_")[1]
        folder = Path(find_preset(f"lion-s-{size}-patch16-224"))
    if folder is None and timm.is_model(name):
        return build_timm_model(settings, labels)
    if folder is None and "/" not in name:
        presets = [preset for preset in preset_names() if "-patch" in preset]
        nearest = difflib.get_close_matches(
            name, [*presets, *timm.list_models("lion_*")], n=1, cutoff=0.0
        )[0]
        raise ValueError(
            f"model={name!r} is no folder with config.json, no preset and no model of timm; did you mean {nearest}?"
        )
    source = str(folder or name)
    weights = has_weights(source) and not settings.from_scratch
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if not isinstance(config, LionConfig) or config.modality != "image":
        raise ValueError(
            f"model={name!r} is a {config.model_type}: expected a LION model for images"
        )
    fields = (
        settings.overrides(original_words)
        | parse_overrides(settings.model_overrides, config)
        | labels
    )
    if distillation_head:
        fields["distillation_head"] = True
    if settings.input_size and not weights:
        fields["image_size"] = settings.input_size
    found = config.num_labels
    config = LionConfig.from_pretrained(source, **fields)
    if settings.softmax:
        return softmax_model(config, labels)
    if not weights:
        return AutoModelForImageClassification.from_config(config)
    if found != len(names):
        logger.warning(
            "the classifier of %s for %d classes is replaced by a random one for %d",
            name,
            found,
            len(names),
        )
    model = AutoModelForImageClassification.from_pretrained(
        source, config=config, ignore_mismatched_sizes=found != len(names), dtype=torch.float32
    )
    if settings.input_size:
        resize_images(model, settings.input_size)
    return model


def softmax_model(config: LionConfig, labels: dict) -> ViTForImageClassification:
    """A ViT of the sizes of a LION model, without weights."""
    same = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout_prob",
        "layer_norm_eps", "initializer_range", "qkv_bias", "image_size", "patch_size", "num_channels",
    )  # fmt: skip
    return ViTForImageClassification(
        ViTConfig(**{name: getattr(config, name) for name in same}, **labels)
    )


def build_timm_model(settings: ModelSettings, labels: dict) -> TimmWrapperForImageClassification:
    """Another model of timm, without weights: a convolutional teacher, for one. Its overrides are timm's arguments."""
    arguments = parse_mapping(settings.model_overrides)
    try:
        config = TimmWrapperConfig(architecture=settings.model, model_args=arguments, **labels)
        return TimmWrapperForImageClassification(config)
    except TypeError as error:
        raise ValueError(
            f"model={settings.model!r} does not take model_overrides={settings.model_overrides!r}: {error}"
        ) from error


def answers(
    logits: torch.Tensor | tuple, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The five best classes, or as many as there are, (B, <= 5), and the loss of each image, (B,)."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return logits.topk(min(5, logits.shape[-1])).indices, losses


def accuracies(prediction, num_classes: int) -> dict[str, float]:
    """Share of images whose class is the best one, and with more than five classes among the best five; the mean loss."""
    best, losses = prediction.predictions
    right = best == prediction.label_ids[:, None]
    result = {"accuracy": float(right[:, 0].mean()), "exact_loss": float(losses.mean())}
    return result | ({"accuracy_top5": float(right.any(1).mean())} if num_classes > 5 else {})


def save_average(trainer: ImageTrainer, dataset: str, metrics: dict[str, float]) -> None:
    """Writes the model with averaged weights, if there is one, to ema/ in the run's folder."""
    if trainer.average is None or not trainer.args.should_save:
        return
    folder, model, prefix = (
        Path(trainer.args.output_dir, "ema"),
        trainer.average.module,
        "eval_ema_",
    )
    if isinstance(model.config, LionConfig):
        results = {
            name.removeprefix(prefix): round(metrics[name], 4)
            for name in metrics
            if name.startswith(f"{prefix}acc")
        }
        save_for_hub(
            model,
            folder,
            processing_class=trainer.processing_class,
            dataset=dataset,
            metrics=results,
        )
    else:
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)


def _word(option: str, value: str | None, words: dict[str, str]) -> str | None:
    """LION's own word for one of the original's, or for its own."""
    if value is None or value in words.values():
        return value
    if value not in words:
        raise ValueError(
            f"{option}={value!r}: expected one of {', '.join(words)} (or {', '.join(words.values())})"
        )
    return words[value]
