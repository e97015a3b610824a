"""Trains LION on images with the DeiT recipe: `lion-hf images`. Its use: image_settings.py."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, set_seed

from ..auto import image_processor, native_image_processor
from ..data.augmentation import EvaluationTransform, ImageCollator, TrainingTransform
from ..data.image_settings import Augmentation
from ..data.images import Images, check_readable, read_source, read_unlabelled
from ..data.patch_batches import PatchBudget
from ..data.samples import SeededDataset
from ..hub import save_for_hub
from ..modeling.configuration_lion import LionConfig
from ..modeling.image_processing_lion import LionImageProcessor, native_limits
from ..status import stop
from ..training.run import log_to_terminal, run
from ..training.settings import parse_settings
from .image_arguments import ImageTrainingArguments
from .image_model import (
    build_model,
    check_native_resolution,
    class_order,
    image_size_of,
    read_lion_config,
)
from .image_results import accuracies, answers, write_predictions
from .image_settings import USAGE, DataSettings, ModelSettings, TeachingSettings
from .image_trainer import ImageTrainer
from .teacher import load_teacher

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "predictions.csv"


def main(argv: list[str] | None = None, prog: str | None = None) -> dict[str, float]:
    """Runs the command; returns the metrics."""
    settings = parse_settings(
        USAGE,
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
        stop(f"{prog or 'lion-hf images'}: {error}")


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
    check_native_resolution(model_settings, augmentation, teaching, args)
    train, validation = read_data(model_settings, data, args)
    trainer = build_trainer(
        model_settings, data, augmentation, teaching, args, parts=(train, validation)
    )
    to_predict = pictures_to_predict(data, args, validation, trainer.processing_class)
    config = trainer.model.config
    if args.do_predict and trainer.patch_budget is not None:
        trainer.patch_budget.counts(to_predict)  # one too large is an error before the training
    record = None
    if args.do_train and args.process_index == 0:
        record = {"classes": train.names, "train": train.record(), "held_out": validation.record()}
        if augmentation.native_resolution:
            record["native_resolution"] = {
                "max_patches": augmentation.max_patches,
                "patches_per_batch": args.patches_per_batch,
            }
    source = data.data_path or data.train_file or data.validation_file or ""
    name = data.dataset or Path(source).resolve().name  # also of "."
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
        ValueError: as `ImageSource` and `class_order`.
    """
    with args.main_process_first():  # tables are prepared once, the other processes read the cache
        train, validation = read_source(data, args.do_train)
    names = class_order(model_settings, train.names, args.do_train)
    train, validation = train.in_order_of(names), validation.in_order_of(names)
    logger.info(
        "%d classes; training: %s; evaluation: %s",
        len(names),
        train.describe(),
        validation.describe(),
    )
    return train, validation


def pictures_to_predict(
    data: DataSettings,
    args: ImageTrainingArguments,
    validation: Images,
    processor: LionImageProcessor,
) -> Images:
    """The pictures of `predict_path`, or those of the validation.

    Raises:
        ValueError: if there are none, or too many of some of them cannot be read, which the end of
            a long training would find otherwise.
    """
    if data.predict_path is None:
        return validation
    if not args.do_predict:
        logger.warning("predict_path=%s is not used: add --do_predict", data.predict_path)
        return validation
    found = read_unlabelled(data.predict_path, validation.names)
    limits = _most_bytes(data), native_limits(processor)
    check_readable(found, "predicted", data.max_unreadable, *limits)
    return found


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
    if parts is None:
        check_native_resolution(model_settings, augmentation, teaching, args)
    train, validation = parts or read_data(model_settings, data, args)
    described = model_settings, train.names, teaching.distillation_token
    config = read_lion_config(*described) if augmentation.native_resolution else None
    native = None if config is None else (config.patch_size, augmentation.max_patches)
    check_parts(train, validation, native, data, args)  # before the model takes its time
    model, budget = build_model(*described), None
    size = image_size_of(model_settings, model)
    processor = build_processor(model.config, size, data, augmentation)
    if args.patches_per_batch is not None and native is not None:
        budget = PatchBudget(native, args.patches_per_batch)
        budget.counts(validation)
        args.set_batch_size(budget.images_per_batch(train if args.do_train else validation))
    teacher = None
    if teaching.distillation_type != "none" and args.do_train:
        teacher = load_teacher(
            teaching.teacher_model, teaching.teacher_path, train.names, processor
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
        patch_budget=budget,
    )


def build_processor(
    config: PreTrainedConfig, size: Any, data: DataSettings, augmentation: Augmentation
) -> LionImageProcessor:
    """The image processor that evaluates, and that is saved with the model.

    Args:
        config: the model's.
        size: height and width of the images in pixels, one integer or a pair.
        data, augmentation: the command's settings.
    """
    if augmentation.native_resolution:
        processor = native_image_processor(config.patch_size, augmentation.max_patches)
    else:
        processor = image_processor(size, augmentation.eval_crop_ratio)
    processor.max_bytes = _most_bytes(data)
    return processor


def _most_bytes(data: DataSettings) -> int:
    """Memory that decoding a picture may take."""
    return data.max_image_megabytes * 1_000_000


def check_parts(
    train: Images,
    validation: Images,
    native: tuple[int, int | None] | None,
    data: DataSettings,
    args: ImageTrainingArguments,
) -> None:
    """Reads some of the pictures; raises as `check_readable`, where `native` is explained."""
    most, limits = data.max_unreadable, (_most_bytes(data), native)
    if args.do_train:
        check_readable(train, "training", most, *limits)
    check_readable(validation, "validation", most, *limits)


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
