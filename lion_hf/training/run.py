"""A training run from start to end: start or continue, train, evaluate, leave a usable model."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PredictionOutput

from ..folders import has_weights, write_json
from ..hub import save_for_hub
from ..modeling.modeling_lion import LionPreTrainedModel
from .callbacks import Curves
from .checkpoints import RESUME, find_checkpoint
from .data_record import check_data, write_data
from .lock import run_lock
from .model_record import check_model
from .run_state import on_first_process
from .settings import SETTINGS_FILE, differences, load_yaml, resolved_settings, save_settings
from .trainer import LionTrainer

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"  # of a training with its evaluation
EVALUATION_FILE = "eval_metrics.json"  # of an evaluation without training
PREDICTION_FILE = "predict_metrics.json"
# Settings that may differ between a run and its continuation without changing what is computed.
FREE = (
    "resume",
    "report_to",
    "save_total_limit",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "disable_tqdm",
    "peak_tflops",
)


def log_to_terminal(args: TrainingArguments) -> None:
    """Shows the command's own messages, without a line per request to the Hub."""
    level = logging.INFO if args.should_log else logging.ERROR
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def run(
    trainer: LionTrainer,
    *,
    title: str,
    metric: str | None = None,
    dataset: str | None = None,
    name: str | None = None,
    settings: Sequence[Any] = (),
    data: Mapping[str, Any] | None = None,
    predict_dataset: Any = None,
    write_predictions: Callable[[PredictionOutput], None] | None = None,
    finish: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Trains, evaluates and predicts, as `do_train`, `do_eval` and `do_predict` ask for.

    A training continues an interrupted one. In `trainer.args.output_dir` it leaves the model (for
    LION's classes with code and model card, as `save_for_hub` writes them), tokenizer or image
    processor, `curves.csv` and, with matplotlib, `curves.png`, the settings (`settings.yaml`), the
    description of the data (`data.json`), and last `metrics.json`. It is evaluated if the trainer
    has an `eval_dataset`.

    Without training, the weights are those of the checkpoint in `resume`, if it names one; else of
    the finished model in `output_dir`, if it was made from the same model; else the trainer's.
    Only `eval_metrics.json`, `predict_metrics.json` and the predictions are written.

    Args:
        trainer: with its data sets; `processing_class` is saved with the model.
        title: above the curves.
        metric: the evaluation's main metric, without "eval_", for the curves.
        dataset: name of the data for the model card.
        name: the model's name on its card; that of the folder if None.
        settings: the script's dataclasses, saved with the trainer's arguments.
        data: plain values that describe the data and what depends on it, such as
            `lion_hf.data.fingerprints.fingerprint` of its files, class names and the vocabulary's
            size. A run continues only with equal ones.
        predict_dataset: what `do_predict` predicts.
        write_predictions: writes the predictions; it is called on the first process.
        finish: called with the metrics after a training, on all processes, when the model is
            written. With `push_to_hub`, the folder is uploaded after that.

    Returns:
        The metrics of the last evaluation and prediction, and loss and speed of the training.

    Raises:
        ValueError: for `resume` as in `find_checkpoint`, for other data or another model than the
            run began with, if another run uses the folder, and if there is nothing to do, or
            nothing to do it with.
        FloatingPointError: if the loss, the gradient or the model is not finite.
        OSError: if a checkpoint cannot be written, or the folder not be uploaded.
    """
    args = trainer.args
    _check_actions(trainer, predict_dataset, write_predictions)
    if not args.do_train:
        metrics = _evaluate(trainer, settings)
        return metrics | _predict(trainer, predict_dataset, write_predictions)
    with run_lock(args):
        curves = Curves(title, metric)
        metrics = _train(trainer, curves, settings, data)
        _finish(trainer, curves, dataset, name, metrics)
        if finish is not None:
            finish(metrics)
        metrics |= _predict(trainer, predict_dataset, write_predictions)
        if args.push_to_hub:
            trainer.upload_output()
    return metrics


def _check_actions(trainer: LionTrainer, predict_dataset: Any, write_predictions: Any) -> None:
    args = trainer.args
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError(
            "do_train=False with do_eval=False and do_predict=False: there is nothing to do, so set"
            " one of them to true"
        )
    if args.do_eval and not args.do_train and trainer.eval_dataset is None:
        raise ValueError("do_eval=True without validation data: expected some to evaluate on")
    if args.do_predict and (predict_dataset is None or write_predictions is None):
        raise ValueError("do_predict=True without test data: expected some to predict")


def _train(
    trainer: LionTrainer, curves: Curves, settings: Sequence[Any], data: Mapping[str, Any] | None
) -> dict[str, float]:
    """Trains, from a checkpoint if there is one, and evaluates; returns the metrics."""
    args = trainer.args
    checkpoint = _same_checkpoint(args)
    if data is not None:
        record = write_data if checkpoint is None else check_data
        on_first_process(args, lambda: record(args.output_dir, data))
    if checkpoint is not None:
        check_model(checkpoint, getattr(trainer.model, "config", None))
    if args.should_save:
        if checkpoint is not None:
            for change in _changes(Path(args.output_dir), resolved_settings(*settings, args)):
                logger.warning("not as when the run began: %s", change)
        save_settings(args.output_dir, *settings, args)
    trainer.add_callback(curves)
    trained = trainer.train(
        resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
    ).metrics
    metrics = {name: trained[name] for name in ("train_loss", "train_runtime") if name in trained}
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    return metrics


def _finish(
    trainer: LionTrainer,
    curves: Curves,
    dataset: str | None,
    name: str | None,
    metrics: Mapping[str, float],
) -> None:
    """Writes the model and the results of a training; `metrics.json` says that all is there."""
    file = Path(trainer.args.output_dir, METRICS_FILE)
    if trainer.is_world_process_zero():
        file.unlink(missing_ok=True)
    results = {
        key.removeprefix("eval_"): value for key, value in metrics.items() if key[:5] == "eval_"
    }
    save(trainer, dataset, name, results)
    if trainer.is_world_process_zero():
        curves.write(trainer.args, trainer.state)
        write_json(file, metrics)


def _same_checkpoint(args: Any) -> Path | None:
    """The checkpoint to continue from, on which all processes agree; None to start anew."""
    checkpoint = find_checkpoint(args.output_dir, args.resume)
    found = gather_object([checkpoint and checkpoint.name])
    if len(set(found)) > 1:
        raise ValueError(
            f"resume={args.resume!r}: the processes found different checkpoints in"
            f" {args.output_dir}: {found}; expected one folder that all machines see, or, with"
            " save_on_each_node, the same checkpoints on each"
        )
    if checkpoint is None:
        return None
    # without a scheduler Trainer would go on with a new optimizer and schedule
    if not Path(checkpoint, "scheduler.pt").is_file():
        raise ValueError(
            f"{checkpoint} holds a model only (save_only_model), with which no run can be"
            " continued: choose another output_dir, or remove it"
        )
    file = Path(checkpoint, TRAINER_STATE_NAME)
    try:
        TrainerState.load_from_json(str(file))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): remove {checkpoint.name}, and the run continues from"
            " the checkpoint before, or choose another output_dir"
        ) from error
    logger.warning("continuing from %s", checkpoint)
    return checkpoint


def _evaluate(trainer: LionTrainer, settings: Sequence[Any]) -> dict[str, float]:
    """Loads the model to evaluate or to predict with, and evaluates it if that is asked for."""
    _load_trained(trainer, settings)
    return evaluate_and_write(trainer) if trainer.args.do_eval else {}


def evaluate_and_write(trainer: LionTrainer) -> dict[str, float]:
    """Evaluates the trainer's model as it is, and writes the metrics to its folder."""
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / EVALUATION_FILE, metrics)
    return metrics


def _load_trained(trainer: LionTrainer, settings: Sequence[Any]) -> None:
    """Loads the weights to evaluate, where they are not the trainer's own."""
    args, own = trainer.args, getattr(trainer.model, "name_or_path", "")
    folder = Path(args.output_dir)
    if args.resume not in RESUME:
        source = find_checkpoint(args.output_dir, args.resume, alone=False)
    elif Path(folder, METRICS_FILE).is_file() and _same_model(folder, settings):
        source = folder
    else:
        source = None
    if source is not None:
        check_model(source, getattr(trainer.model, "config", None), evaluated=True)
        try:
            trainer.load_weights(source)
        except (RuntimeError, SafetensorError, UnpicklingError) as error:
            raise ValueError(f"{source}: its weights cannot be loaded: {error}") from error
    elif own and not has_weights(own):
        raise ValueError(
            f"do_train=False, but neither {own} nor {folder} holds weights of a trained model:"
            " name a model with weights, or the output_dir of a finished run"
        )
    elif missing := getattr(trainer.model, "missing_weights", []):
        raise ValueError(
            f"do_train=False, but {own or 'the model'} is not trained for this: it lacks"
            f" {', '.join(missing[:2])}"
            f"{', ...' if len(missing) > 2 else ''}. Name a model with all weights that the"
            " settings ask for, or the output_dir of a finished run"
        )
    logger.warning("no training; the model is that of %s", source or own or "the trainer")


def _same_model(folder: Path, settings: Sequence[Any]) -> bool:
    """Whether the run in the folder began with the model that these settings name.

    A folder has several paths: with a slash at its end, relative or not.
    """
    now, before = resolved_settings(*settings), _settings_before(folder)
    names = ("model", "model_name_or_path")
    return all(_path(now.get(name)) == _path(before.get(name)) for name in names)


def _path(name: str | None) -> str | None:
    """A model's folder, or its name on the Hub, in one way of writing it."""
    return None if name is None else os.path.abspath(name)


def _predict(
    trainer: LionTrainer, predict_dataset: Any, write_predictions: Callable | None
) -> dict[str, float]:
    """Predicts and writes if that is asked for; returns the metrics, which need labels."""
    if not trainer.args.do_predict or write_predictions is None:
        return {}
    output = trainer.predict(predict_dataset)
    metrics = dict(output.metrics or {})
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(output)
        write_json(folder / PREDICTION_FILE, metrics)
    return metrics


def save(
    trainer: LionTrainer, dataset: str | None, name: str | None, metrics: Mapping[str, float]
) -> None:
    """Writes the trainer's model to its folder; every process calls this.

    Models of LION's classes get their code and a card with the metrics.

    Raises:
        FloatingPointError: if the model holds values that are not finite.
    """
    folder = trainer.args.output_dir
    trainer.check_finite(f"the model for {folder}")
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if not isinstance(model, LionPreTrainedModel):
        trainer.save_model(folder, _internal_call=True)  # otherwise it would upload here, too
        if trainer.args.push_to_hub:
            trainer.create_model_card(model_name=name, dataset=dataset)
        return
    # on all processes, because shares are gathered
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    # torch.compile adds a prefix
    state_dict = {name.replace("_orig_mod.", ""): weight for name, weight in state_dict.items()}
    for tied in model.all_tied_weights_keys:  # gathered apart, it would be saved twice
        state_dict.pop(tied, None)
    if trainer.args.should_save:
        save_for_hub(
            model,
            folder,
            processing_class=trainer.processing_class,
            repo_id=trainer.hub_model_id or name,
            dataset=dataset,
            metrics=_results(metrics) if dataset else None,
            state_dict=state_dict,
        )
    trainer.accelerator.wait_for_everyone()


def _results(metrics: Mapping[str, float]) -> dict[str, float]:
    """Rounded metrics for a model card, without the speeds of each evaluation set."""
    speed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {name: round(value, 4) for name, value in metrics.items() if not name.endswith(speed)}


def _changes(folder: Path, settings: dict[str, Any]) -> list[str]:
    """How settings differ from those that an earlier part of the run left in the folder."""
    found = differences(_settings_before(folder), settings).items()
    return [change for name, change in found if name not in FREE]


def _settings_before(folder: Path) -> dict[str, Any]:
    """The settings that a run left in its folder; empty if they cannot be read."""
    try:
        before = load_yaml((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError(f"it holds a {type(before).__name__}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read and is not compared: %s", folder / SETTINGS_FILE, error)
        return {}
    return before
