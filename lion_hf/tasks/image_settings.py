"""Settings of `lion-hf images`: the model, the data, the teacher. They load no torch."""

from dataclasses import dataclass, field
from typing import Any

from ..data.image_settings import Augmentation, ImageSource
from ..training.options import RunOptions

USAGE = """Trains LION on images with the DeiT recipe, from scratch or from a checkpoint.

    # LION-S base on ImageNet (train/ and val/ with one folder per class) on 8 GPUs, with the
    # options of the original:
    torchrun --nproc_per_node=8 -m lion_hf images --model lion_base_patch16_224 --batch-size 128 \\
        --data-path imagenet --output_dir outputs/lion-s --mask_type Selective --order S \\
        --format Attention --pos_emb

    # the same with a recipe, and with RegNetY-16GF as teacher:
    accelerate launch -m lion_hf images --config images/imagenet-distilled \\
        --model lion-s-snake-base-patch16-224 --data_path imagenet \\
        --output_dir outputs/lion-s-distilled

    # a small model on small images in minutes on a CPU, then a softmax ViT of the same size:
    lion-hf images --config images/fashion-mnist --data_path fashion_mnist \\
        --output_dir outputs/fashion-mnist
    lion-hf images --config images/fashion-mnist --data_path fashion_mnist \\
        --softmax --output_dir outputs/fashion-mnist-softmax

    # fine-tuning at another resolution:
    lion-hf images --model outputs/fashion-mnist --input_size 36 --data_path fashion_mnist \\
        --epochs 1 --output_dir outputs/fashion-mnist-36

    # images of different sizes as they are, at most 1,024 patches of each, 8,192 at a time:
    lion-hf images --native_resolution --max_patches 1024 --patches_per_batch 8192 \\
        --data_path photographs --output_dir outputs/photographs

    # evaluation and predictions (predictions.csv) of a trained model:
    lion-hf images --model outputs/fashion-mnist --data_path fashion_mnist \\
        --do_train false --do_eval --do_predict --output_dir outputs/fashion-mnist-evaluation

The data come from an image folder, parquet files or the Hub. A command that is started again
continues from the newest whole checkpoint, if the data are the same. At the end the output folder
holds the model with a model card, curves (PNG, CSV), the settings and the metrics, and in ema/ the
model with averaged weights. Images that cannot be read are named and left out.
"""

# The original's words for LION's fields; LION's own are legal too.
MASK_TYPES = {"Lit": "lit", "Decay": "decay", "Selective": "selective"}
ORDERS = {"Normal": "raster", "S": "snake"}
FORMATS = {"Attention": "attention", "RNN": "recurrent", "Chunk": "chunk", "auto": "auto"}
DISTILLATIONS = ("none", "hard", "soft")
MEGABYTES = 380  # MAX_BYTES of image_processing_lion.py, which loads torch


@dataclass
class ModelSettings:
    """What to train."""

    model: str = field(
        default="lion-s-snake-tiny-patch16-224",
        metadata={
            "help": "Preset, model folder, name on the Hub, lion_{tiny,small,base}_patch16_224"
            " (no position embeddings without --pos_emb), or another model of timm. If it has"
            " weights, training starts from them.",
            "aliases": ["--preset", "--model_name_or_path"],
        },
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Start from random weights even if the model has others."}
    )
    model_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the configuration: name=value,name=value."}
    )
    softmax: bool = field(
        default=False,
        metadata={"help": "Train a softmax ViT of the same size instead, for comparison."},
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
        default=None, metadata={"help": "Tokens per chunk in the chunk form."}
    )
    pos_emb: bool = field(default=False, metadata={"help": "Use position embeddings."})
    cls_tok: bool = field(
        default=False,
        metadata={"help": "Classify by the class token instead of the mean over all tokens."},
    )
    drop_path: float | None = field(
        default=None, metadata={"help": "Stochastic depth of the last layer; 0.1 in LION."}
    )
    input_size: int | None = field(
        default=None,
        metadata={
            "help": "Height and width of the images in pixels.",
            "aliases": ["--image_size", "--img_size"],
        },
    )

    def overrides(self, original_words: bool) -> dict[str, Any]:
        """The fields of LionConfig that the options set.

        Args:
            original_words: whether options that are missing mean the original's defaults.
        """
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
class DataSettings(ImageSource):
    """What to train on, and what to predict."""

    predict_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images for --do_predict; the validation images if none. Those in"
            " folders with names of classes have labels."
        },
    )
    max_unreadable: float = field(
        default=0.01,
        metadata={"help": "Share of images that may be unreadable; above it the run stops."},
    )
    max_image_megabytes: int = field(
        default=MEGABYTES,
        metadata={
            "help": "Memory that decoding one image may take. Larger images count as unreadable."
        },
    )

    def __post_init__(self):
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(
                f"max_unreadable={self.max_unreadable}: expected a share between 0 and 1"
            )
        if self.max_image_megabytes < 1:
            raise ValueError(
                f"max_image_megabytes={self.max_image_megabytes}: expected an integer of at least 1"
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
        default=None,
        metadata={"help": "File with weights of a timm teacher; timm's own if none."},
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
            "help": "The class token learns from the teacher, with a head of its own; the other"
            " head reads the mean."
        },
    )
    model_ema: bool = field(default=True, metadata={"help": "Keep an average of the weights."})
    model_ema_decay: float = field(default=0.99996, metadata={"help": "Its decay per step."})
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
        for name in ("distillation_token", "teacher_path"):
            if getattr(self, name) and self.distillation_type == "none":
                raise ValueError(
                    f"{name} without a teacher: expected --distillation-type hard or soft"
                )


@dataclass
class ImageRunOptions(RunOptions):
    """`RunOptions` with the names and defaults of the DeiT recipe (arXiv 2012.12877)."""

    per_device_train_batch_size: int = field(
        default=64,
        metadata={
            "help": "Images per device at a time.",
            "aliases": ["--batch-size", "--batch_size"],
        },
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Images per device at a time in evaluation."}
    )
    patches_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "With --native_resolution: patches per device at a time, in training and"
            " evaluation, in place of a number of images. A batch gets images as long as they fit."
        },
    )
    num_train_epochs: float = field(
        default=300, metadata={"help": "Epochs.", "aliases": ["--epochs"]}
    )
    lr: float = field(
        default=5e-4,
        metadata={"help": "Learning rate for a total batch of 512; it is scaled with the batch."},
    )
    learning_rate: float = field(
        default=0.0, metadata={"help": "Learning rate that is not scaled, instead of --lr."}
    )
    min_lr: float = field(
        default=1e-5, metadata={"help": "Learning rate at the end of the cosine schedule."}
    )
    warmup_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of warm-up, instead of --warmup_steps."}
    )
    warmup_steps: float = field(
        default=5 / 300,
        metadata={"help": "Steps of linear warm-up; below 1, the share of all steps."},
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


# What `--help` shows.
OPTIONS = (ModelSettings, DataSettings, Augmentation, TeachingSettings, ImageRunOptions)


def _word(option: str, value: str | None, words: dict[str, str]) -> str | None:
    """LION's own word for one of the original's, or for its own."""
    if value is None or value in words.values():
        return value
    if value not in words:
        raise ValueError(
            f"{option}={value!r}: expected one of {', '.join(words)}"
            f" (or {', '.join(words.values())})"
        )
    return words[value]
