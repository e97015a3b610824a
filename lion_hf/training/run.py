"""A training run from start to end: continue or start, train, evaluate, and leave a model that others can use."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import gather_object

from ..folders import write_json
from ..hub import save_for_hub
from ..modeling.modeling_lion import LionPreTrainedModel
from .callbacks import Curves
from .checkpoints import find_checkpoint
from .settings import SETTINGS_FILE, differences, resolved_settings, save_settings
from .trainer import LionTrainer

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
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


def run(
    trainer: LionTrainer,
    *,
    title: str,
    metric: str | None = None,
    dataset: str | None = None,
    name: str | None = None,
    settings: Sequence[Any] = (),
    finish: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Trains and evaluates, continuing an interrupted run, and writes the results.

    In `trainer.args.output_dir` it leaves the model (for LION's classes with code and model card, as `save_for_hub` writes
    them), tokenizer or image processor, `curves.csv` and, with matplotlib, `curves.png`, the settings (`settings.yaml`), and
    last `metrics.json`.

    Args:
        trainer: with its data sets; `processing_class` is saved with the model.
        title: above the curves.
        metric: the evaluation's main metric, without "eval_", for the curves.
        dataset: name of the data for the model card.
        name: the model's name on its card; that of the folder if None.
        settings: the script's dataclasses, saved with the trainer's arguments.
        finish: called with the metrics when all is written, on all processes, before `push_to_hub` uploads the folder.

    Returns:
        The metrics of the last evaluation, and loss and speed of the training.

    Raises:
        ValueError: for `resume` as in `find_checkpoint`.
        FloatingPointError: if the loss is not finite.
        OSError: if a checkpoint cannot be written, or the folder not be uploaded.
    """
    args = trainer.args
    checkpoint = find_checkpoint(args.output_dir, args.resume)
    found = gather_object([checkpoint and checkpoint.name])
    if len(set(found)) > 1:
        raise ValueError(
            f"resume={args.resume!r}: the processes found different checkpoints in {args.output_dir}: {found}; expected one"
            " folder that all machines see, or, with save_on_each_node, the same checkpoints on each"
        )
    if checkpoint is not None:
        if not Path(
            checkpoint, "scheduler.pt"
        ).is_file():  # else Trainer would go on with a new optimizer and schedule
            raise ValueError(
                f"{checkpoint} holds a model only (save_only_model), with which no run can be continued: choose another"
                " output_dir, or remove it"
            )
        logger.warning("continuing from %s", checkpoint)
    if args.should_save:
        for change in (
            _changes(Path(args.output_dir), resolved_settings(*settings, args))
            if checkpoint
            else ()
        ):
            logger.warning("not as when the run began: %s", change)
        save_settings(args.output_dir, *settings, args)
    curves = Curves(title, metric)
    trainer.add_callback(curves)
    trained = trainer.train(
        resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
    ).metrics
    metrics = {name: trained[name] for name in ("train_loss", "train_runtime") if name in trained}
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    save(
        trainer,
        dataset,
        name,
        {
            name.removeprefix("eval_"): value
            for name, value in metrics.items()
            if name.startswith("eval_")
        },
    )
    if trainer.is_world_process_zero():
        curves.write(args, trainer.state)
        write_json(Path(args.output_dir, METRICS_FILE), metrics)
    if finish is not None:
        finish(metrics)
    if args.push_to_hub:
        trainer.upload_output()
    return metrics


def save(
    trainer: LionTrainer, dataset: str | None, name: str | None, metrics: Mapping[str, float]
) -> None:
    """Writes the trainer's model to its folder, with code and a card that has the metrics if it is one of LION's."""
    folder, model = (
        trainer.args.output_dir,
        trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False),
    )
    if not isinstance(model, LionPreTrainedModel):
        trainer.save_model(
            folder, _internal_call=True
        )  # else it would push here and again in the end
        if trainer.args.push_to_hub:
            trainer.create_model_card(model_name=name, dataset=dataset)
        return
    state_dict = trainer.accelerator.get_state_dict(
        trainer.model_wrapped
    )  # on all processes: shares are gathered
    state_dict = {
        name.replace("_orig_mod.", ""): weight for name, weight in state_dict.items()
    }  # as torch.compile calls them
    for tied in model.all_tied_weights_keys:  # gathered apart, it would be saved twice
        state_dict.pop(tied, None)
    if trainer.args.should_save:
        speed = (
            "runtime",
            "samples_per_second",
            "steps_per_second",
            "model_preparation_time",
        )  # of each evaluation set
        results = {
            name: round(value, 4) for name, value in metrics.items() if not name.endswith(speed)
        }
        save_for_hub(
            model,
            folder,
            processing_class=trainer.processing_class,
            repo_id=trainer.hub_model_id or name,
            dataset=dataset,
            metrics=results if dataset else None,
            state_dict=state_dict,
        )
    trainer.accelerator.wait_for_everyone()


def _changes(folder: Path, settings: dict[str, Any]) -> list[str]:
    """How settings differ from those that an earlier part of the run left in the folder."""
    try:
        before = yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, RecursionError):
        return []
    before = before if isinstance(before, dict) else {}
    return [change for name, change in differences(before, settings).items() if name not in FREE]
