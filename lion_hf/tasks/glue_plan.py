"""The runs of `lion-hf glue`: which there are, what each depends on, and which are finished."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..data.labelled_text import Examples
from ..training.checkpoints import RESUME, find_checkpoint
from ..training.run_state import digest, finished, model_digest, on_first_process
from ..training.settings import ACTIONS, resolved_settings
from .glue_arguments import GlueTrainingArguments
from .glue_settings import SEEDS, GlueArguments
from .glue_tasks import Task
from .text_classifier import check_weights, load_config, load_tokenizer

# Settings by which two runs may differ and still be the same.
FREE = (
    *("output_dir", "run_name", "resume", "redo", "predict", "keep_checkpoints", *ACTIONS),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),
    *("total_batch_size", "disable_tqdm", "report_to", "peak_tflops", "local_rank", "project"),
    *("data_dir", "train_file", "validation_file", "test_file", "task", "seeds", "recipes"),
    *("model_name_or_path", "tokenizer_name", "start_from_mnli", "mnli_checkpoint"),
)
FREE_GROUPS = (
    *("logging_", "log_", "save_", "dataloader_", "hub_", "push_to_hub", "ddp_", "trackio_"),
)

Data = dict[str, tuple[Task, dict[str, Examples]]]  # name -> task and splits


@dataclass
class TaskRun:
    """One run: a task with a seed.

    Args:
        name: the task's name.
        task: what is learnt.
        seed: of the run.
        model: folder or name on the Hub of the model to start from.
        from_scratch: whether it starts from random weights instead.
        args: the trainer's arguments.
        settings: what the result depends on, as plain values.
        metrics: of a finished run.
    """

    name: str
    task: Task
    seed: int
    model: str
    from_scratch: bool
    args: GlueTrainingArguments
    settings: dict[str, Any]
    metrics: dict[str, float] | None = None


def load_model_parts(options: GlueArguments) -> PreTrainedTokenizerBase:
    """The tokenizer, after checks of all that is loaded later."""
    for path in filter(None, (options.model_name_or_path, options.mnli_checkpoint)):
        config = configuration(path, options)
        if not options.from_scratch or path == options.mnli_checkpoint:
            check_weights(path)
    return load_tokenizer(
        options.tokenizer_name or options.model_name_or_path, config, options.trust_remote_code
    )


def configuration(path: str, options: GlueArguments) -> PreTrainedConfig:
    """A model's configuration with the changes that the options ask for."""
    form = {} if options.attention_form is None else {"attention_form": options.attention_form}
    return load_config(
        path, options.model_overrides, form, options.max_length, options.trust_remote_code
    )


def plan(
    data: Data,
    options: GlueArguments,
    args: GlueTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> list[TaskRun]:
    """All runs with their settings. Those that are finished have their metrics.

    Raises:
        ValueError: for seeds or `resume` that do not fit, a folder that may not be deleted, or a
            run that was made with other settings.
    """
    if options.seeds and "seed" in args.given:
        raise ValueError(f"seeds={options.seeds} and seed={args.seed}: expected one of them")
    runs: list[TaskRun] = []
    digests: dict[str, str] = {}
    for name, (task, splits) in data.items():
        for seed in seeds_of(task, options, args):
            own = arguments_of(name, task, seed, args)
            settings = settings_of(options, own, tokenizer, splits)
            model, random = start_of(task, options, runs)
            if model not in digests:
                digests[model] = _digest_of_start(model, random, runs)
            settings["model"] = digests[model]
            runs.append(TaskRun(name, task, seed, model, random, own, settings))
    if args.resume not in RESUME and len(runs) > 1:
        raise ValueError(
            f"resume={args.resume!r} with {len(runs)} runs: expected one of {RESUME}, or one task"
            " and one seed"
        )
    for run, metrics in zip(runs, on_first_process(args, lambda: _metrics(runs, options))):
        run.metrics = metrics
        if metrics is None and args.resume != "auto":  # an error if there is none, or for "never"
            find_checkpoint(run.args.output_dir, args.resume)
    return runs


def _metrics(runs: list[TaskRun], options: GlueArguments) -> list[dict[str, float] | None]:
    """The metrics of runs that are finished. `redo` deletes these, once all of them may be."""
    folders = [run.args.output_dir for run in runs]
    for folder in folders if options.redo else ():
        check_deletable(folder, options)
    return [finished(folder, run.settings, options.redo) for folder, run in zip(folders, runs)]


def seeds_of(task: Task, options: GlueArguments, args: GlueTrainingArguments) -> Sequence[int]:
    """The seeds of a task's runs: those given, else its own."""
    given = [args.given["seed"]] if "seed" in args.given else options.seeds
    return list(dict.fromkeys(given or SEEDS[: task.seeds]))


def start_of(task: Task, options: GlueArguments, runs: list[TaskRun]) -> tuple[str, bool]:
    """The model that a task starts from, and whether its weights are random instead."""
    if task.from_mnli and options.mnli_checkpoint:
        return options.mnli_checkpoint, False
    if task.from_mnli and options.start_from_mnli:
        return runs[0].args.output_dir, False
    return options.model_name_or_path, options.from_scratch


def _digest_of_start(model: str, random: bool, runs: list[TaskRun]) -> str:
    """A hash of the model; of MNLI's first run, which has no weights yet, of what makes them."""
    if runs and model == runs[0].args.output_dir:
        return digest(runs[0].settings)
    return model_digest(model, weights=not random)


def check_deletable(folder: str, options: GlueArguments) -> None:
    """Checks that `redo`, which deletes results and checkpoints, leaves all that a run needs.

    Raises:
        ValueError: if the folder is a link, or holds anything that a run starts from.
    """
    path = Path(folder)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(
            f"redo: {folder} is not a folder of its own: remove it, or choose another output_dir"
        )
    needed = ("model_name_or_path", "mnli_checkpoint", "tokenizer_name", "data_dir", "recipes")
    for name in (*needed, "train_file", "validation_file", "test_file"):
        value = getattr(options, name)
        if value and Path(value).resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"redo would delete {name}={value!r}, which is in {folder}: choose another"
                " output_dir"
            )


def arguments_of(
    name: str, task: Task, seed: int, args: GlueTrainingArguments
) -> GlueTrainingArguments:
    """The trainer's arguments for a run: the task's own, where the user gave no others."""
    parts = _parts(args)
    total = args.total_batch_size or task.batch_size
    if "per_device_train_batch_size" not in args.given and total % parts:
        raise ValueError(
            f"{name} takes batches of {total} rows, which {parts} parts (processes times"
            " gradient_accumulation_steps) cannot share evenly: give per_device_train_batch_size"
        )
    recipe: dict[str, Any] = {
        "learning_rate": task.learning_rate,
        "weight_decay": task.weight_decay,
        "num_train_epochs": task.epochs,
        "per_device_train_batch_size": total // parts,
    }
    recipe |= args.given | {"seed": seed, "output_dir": str(Path(args.output_dir, name, str(seed)))}
    if args.push_to_hub:  # every run has a repository of its own
        base = args.hub_model_id or Path(args.output_dir).absolute().name
        recipe["hub_model_id"] = f"{base}-{name}-{seed}"
    recipe["do_predict"] = False  # test sets are predicted after the run, also one finished before
    own = copy.copy(args)
    for key, value in recipe.items():
        setattr(own, key, value)
    return own


def settings_of(
    options: GlueArguments,
    args: GlueTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, Examples],
) -> dict[str, Any]:
    """What a run's result depends on besides the model, as plain values."""
    settings = {
        name: value
        for name, value in resolved_settings(options, args).items()
        if name not in FREE and not name.startswith(FREE_GROUPS)
    }
    settings["batch_size"] = (args.per_device_train_batch_size or 0) * _parts(args)
    settings["vocabulary"] = digest(tokenizer.get_vocab())
    for split, found in splits.items():
        if not split.startswith("test"):
            settings[f"{split} data"] = found.digest
    return settings


def _parts(args: GlueTrainingArguments) -> int:
    """Into how many pieces a step's rows are divided."""
    return max(1, args.world_size) * max(1, args.n_gpu) * args.gradient_accumulation_steps
