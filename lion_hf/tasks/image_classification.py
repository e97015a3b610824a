"""Trains LION on images with the DeiT recipe, from scratch or from a checkpoint.

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

    # evaluation and predictions (predictions.csv) of a trained model:
    lion-hf images --model outputs/fashion-mnist --data_path fashion_mnist \\
        --do_train false --do_eval --do_predict --output_dir outputs/fashion-mnist-evaluation

The data come from an image folder, parquet files or the Hub. A command that is started again
continues from the newest whole checkpoint, if the data are the same. At the end the output folder
holds the model with a model card, curves (PNG, CSV), the settings and the metrics, and in ema/ the
model with averaged weights. Images that cannot be read are named and left out.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..auto import image_processor
from ..data.augmentation import Augmentation, EvaluationTransform, ImageCollator, TrainingTransform
from ..data.images import Images, ImageSource, check_readable, read_unlabelled
from ..data.samples import SeededDataset
from ..hub import save_for_hub
from ..modeling.configuration_lion import LionConfig
from ..modeling.image_processing_lion import MAX_BYTES, LionImageProcessor
from ..training.run import log_to_terminal, run
from ..training.settings import parse_settings
from ..training.trainer import LionTrainingArguments
from .image_model import ModelSettings, build_model, class_order
from .image_results import accuracies, answers, write_predictions
from .image_trainer import DISTILLATIONS, ImageTrainer
from .teacher import load_teacher

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "predictions.csv"


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
        default=MAX_BYTES // 1_000_000,
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
        if self.distillation_token and self.distillation_type == "none":
            raise ValueError(
                "distillation_token without a teacher: expected --distillation-type hard or soft"
            )


@dataclass
class ImageTrainingArguments(LionTrainingArguments):
    """`LionTrainingArguments` with the names and defaults of the DeiT recipe (arXiv 2012.12877)."""

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

    def __post_init__(self):
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: its name here is smoothing"
            )
        if self.warmup_epochs is not None:
            if not 0 <= self.warmup_epochs < self.num_train_epochs:
                raise ValueError(
                    f"warmup_epochs={self.warmup_epochs}: expected less than the"
                    f" {self.num_train_epochs} epochs"
                )
            self.warmup_steps = self.warmup_epochs / self.num_train_epochs
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr": self.min_lr}
        super().__post_init__()
        if not self.learning_rate:
            batch = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
            self.learning_rate = self.lr * batch / 512


def main(argv: list[str] | None = None, prog: str | None = None) -> dict[str, float]:
    """Runs the command; returns the metrics."""
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
    log_to_terminal(args)
    set_seed(args.seed)
    try:
        return train_and_evaluate(*settings)
    except ValueError as error:
        raise SystemExit(f"{prog or 'lion-hf images'}: {error}") from error


def train_and_evaluate(
    model_settings: ModelSettings,
    data: DataSettings,
    augmentation: Augmentation,
    teaching: TeachingSettings,
    args: ImageTrainingArguments,
) -> dict[str, float]:
    """Trains, evaluates and predicts as the settings say; returns the metrics.

    Raises:
        ValueError: for settings or data that do not work, before the first step where possible.
    """
    train, validation = read_data(model_settings, data, args)
    trainer = build_trainer(
        model_settings, data, augmentation, teaching, args, parts=(train, validation)
    )
    to_predict, config = validation, trainer.model.config
    if data.predict_path:
        to_predict = read_unlabelled(data.predict_path, train.names)
    record = None
    if args.do_train and args.process_index == 0:
        record = {"classes": train.names, "train": train.record(), "held_out": validation.record()}
    source = data.data_path or data.train_file or data.validation_file or ""
    name = data.dataset or Path(source).name
    kind = " ".join(filter(None, (config.model_type, getattr(config, "mask_type", ""))))
    metrics = run(
        trainer,
        title=f"{kind} on {name}, {trainer.model.num_parameters() / 1e6:.2f} M parameters",
        metric="accuracy",
        dataset=name,
        settings=(model_settings, data, augmentation, teaching),
        data=record if args.process_index == 0 or not args.do_train else {},
        predict_dataset=evaluation_dataset(to_predict, trainer.processing_class, args.seed),
        write_predictions=partial(
            write_predictions, images=to_predict, file=Path(args.output_dir, PREDICTIONS_FILE)
        ),
        finish=partial(save_average, trainer, name),
    )
    shown = [x for x in ("accuracy", "accuracy_top5", "ema_accuracy") if f"eval_{x}" in metrics]
    logger.info(
        "%s in %s",
        ", ".join(f"{x} {metrics[f'eval_{x}']:.2%}" for x in shown) or "finished",
        args.output_dir,
    )
    return metrics


def read_data(
    model_settings: ModelSettings, data: DataSettings, args: ImageTrainingArguments
) -> tuple[Images, Images]:
    """Reads the training and the validation pictures, with the class numbers of the model.

    Raises:
        ValueError: as `ImageSource`, `class_order` and `check_readable`.
    """
    with args.main_process_first():  # tables are prepared once, the other processes read the cache
        train, validation = data.read(args.do_train)
    names = class_order(model_settings, train.names, args.do_train)
    train, validation = train.in_order_of(names), validation.in_order_of(names)
    logger.info(
        "%d classes; training: %s; evaluation: %s",
        len(names),
        train.describe(),
        validation.describe(),
    )
    max_bytes = data.max_image_megabytes * 1_000_000
    if args.do_train:
        check_readable(train, "training", data.max_unreadable, max_bytes)
    check_readable(validation, "validation", data.max_unreadable, max_bytes)
    return train, validation


def build_trainer(
    model_settings: ModelSettings,
    data: DataSettings,
    augmentation: Augmentation,
    teaching: TeachingSettings,
    args: ImageTrainingArguments,
    parts: tuple[Images, Images] | None = None,
) -> ImageTrainer:
    """Builds the trainer with its model, teacher and data.

    Args:
        model_settings, data, augmentation, teaching, args: the command's settings.
        parts: training and validation pictures; None to read them.

    Raises:
        ValueError: if the settings and data do not work together.
    """
    train, validation = parts or read_data(model_settings, data, args)
    model = build_model(model_settings, train.names, teaching.distillation_token)
    size: Any = model_settings.input_size or getattr(model.config, "image_size", 224)
    processor = image_processor(size, augmentation.eval_crop_ratio)
    processor.max_bytes = data.max_image_megabytes * 1_000_000
    teacher = None
    if teaching.distillation_type != "none" and args.do_train:
        teacher = load_teacher(
            teaching.teacher_model, teaching.teacher_path, len(train.names), processor
        )
    transform = TrainingTransform(augmentation, size, processor)
    return ImageTrainer(
        model,
        args,
        train_dataset=SeededDataset(train, transform, args.seed, repeats=augmentation.repeated_aug),
        eval_dataset=evaluation_dataset(validation, processor, args.seed),
        data_collator=ImageCollator(len(train.names), augmentation),
        processing_class=processor,
        compute_metrics=partial(
            accuracies, num_classes=len(train.names), max_unreadable=data.max_unreadable
        ),
        preprocess_logits_for_metrics=answers,
        teacher=teacher,
        distillation=teaching.distillation_type,
        alpha=teaching.distillation_alpha,
        tau=teaching.distillation_tau,
        average_decay=teaching.model_ema_decay if teaching.model_ema else None,
        average_warmup=teaching.model_ema_warmup,
        max_unreadable=data.max_unreadable,
    )


def evaluation_dataset(images: Images, processor: LionImageProcessor, seed: int) -> SeededDataset:
    """Pictures as evaluation and prediction see them; unreadable ones keep their places."""
    transform = EvaluationTransform(processor, mark_unreadable=True)
    return SeededDataset(images, transform, seed, vary=False)


def save_average(trainer: ImageTrainer, dataset: str, metrics: dict[str, float]) -> None:
    """Writes the model with averaged weights, if there is one, to ema/ in the run's folder."""
    if trainer.average is None or not trainer.args.should_save:
        return
    folder, prefix = Path(trainer.args.output_dir, "ema"), "eval_ema_"
    model = trainer.average.module
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
