"""Callbacks of a run: progress bar, logs at checkpoints, the data's epoch, curves."""

import importlib.util
import time
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback

from .. import plots


class Progress(ProgressCallback):
    """Trainer's progress bar with the latest numbers, instead of a line per log entry."""

    SHOWN = (
        "loss",
        "eval_loss",
        "eval_accuracy",
        "eval_masked_accuracy",
        "tokens_per_second",
        "images_per_second",
        "mfu",
    )

    def __init__(self):
        super().__init__()
        self.shown = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.shown |= {name: f"{logs[name]:.4g}" for name in self.SHOWN if name in (logs or {})}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


class LogAtCheckpoints(TrainerCallback):
    """Logs at every checkpoint and at the last step.

    The means in the log are then over the same steps in a run that continues from a checkpoint,
    and the mean loss of the training, which is computed from the log, includes all steps.
    """

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save or control.should_training_stop

    on_epoch_end = on_step_end


class SetEpoch(TrainerCallback):
    """Tells the data which epoch begins. accelerate's loaders do so for one process only."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch))


SECONDS_BETWEEN_PICTURES = 30.0


class Curves(TrainerCallback):
    """Keeps `curves.csv` and, with matplotlib, `curves.png` in the run's folder up to date."""

    def __init__(self, title: str, metric: str | None):
        self.title, self.metric, self.drawn = title, metric, float("-inf")

    def write(self, args, state, draw: bool = True) -> None:
        history = [entry for entry in state.log_history if "step" in entry]
        plots.save_history(history, Path(args.output_dir, "curves.csv"))
        if draw and history and importlib.util.find_spec("matplotlib"):
            plots.plot_curves(
                history, Path(args.output_dir, "curves.png"), self.title, metric=self.metric
            )
            self.drawn = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write(args, state, draw=time.monotonic() > self.drawn + SECONDS_BETWEEN_PICTURES)

    on_evaluate = on_save
