"""`lion-hf glue` without training: which models are evaluated, and on what."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from transformers import IntervalStrategy, PreTrainedConfig

from ..data.labelled_text import Examples
from ..folders import has_weights
from ..training.run_state import STATE_FILE
from ..training.settings import SETTINGS_FILE
from .glue_arguments import GlueTrainingArguments
from .glue_data import listed, load_data, load_tasks
from .glue_plan import TaskRun, configuration
from .glue_settings import GlueArguments
from .glue_tasks import TASKS, Task, task_names


def plan_evaluation(
    options: GlueArguments, args: GlueTrainingArguments
) -> tuple[dict[str, tuple[Task, dict[str, Examples]]], list[TaskRun]]:
    """The data and the models to evaluate.

    These are the finished runs in `output_dir` that started from this model; where there are none,
    the model itself, which then has a trained classifier. Classes are the model's own.

    Raises:
        ValueError: if the data does not fit the models.
    """
    names = [options.task or "own"] if options.own_data else task_names(options.task or "")
    data: dict[str, tuple[Task, dict[str, Examples]]] = {}
    runs = []
    for name in names:
        folder = Path(args.output_dir, name)
        there: dict[Any, Path] = {
            seed: folder / str(seed) for seed in finished_seeds(folder, options)
        }
        for seed, place in (there or {args.seed: folder}).items():
            model = str(place) if there else options.model_name_or_path
            task = task_of(name, model, configuration(model, options), options)
            if name not in data:
                splits = load_data(name, task, options, train=False, evaluate=args.do_eval)
                data[name] = task, splits
            elif task != data[name][0]:
                raise ValueError(
                    f"{place} was trained for the classes {listed(task.classes)}, other runs of"
                    f" {name} for {listed(data[name][0].classes)}: give --seeds of one kind"
                )
            own = copy.copy(args)
            own.output_dir, own.eval_strategy = str(place), IntervalStrategy.NO
            runs.append(TaskRun(name, task, seed, model, False, own, {}))
    return data, runs


def finished_seeds(folder: Path, options: GlueArguments) -> list[int]:
    """The seeds of a task's finished runs that started from the options' model.

    Raises:
        ValueError: if one of `seeds` is not among them.
    """
    runs = [path for path in folder.glob("*") if path.name.isdecimal() and has_weights(path)]
    seeds = sorted(int(path.name) for path in runs if _is_finished(path, options))
    missing = sorted(set(options.seeds) - set(seeds))
    if missing:
        raise ValueError(
            f"seeds={missing}: {folder} has no finished runs of them that started from"
            f" {options.model_name_or_path}; it has {seeds}"
        )
    return options.seeds or seeds


def _is_finished(run: Path, options: GlueArguments) -> bool:
    """Whether a run has its metrics, and began with this model."""
    try:
        state = json.loads((run / STATE_FILE).read_text(encoding="utf-8"))
        settings = yaml.safe_load((run / SETTINGS_FILE).read_text(encoding="utf-8"))
        model = settings["model_name_or_path"]
        done = state.get("metrics") is not None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError):
        return False
    return done and Path(model).absolute() == Path(options.model_name_or_path).absolute()


def task_of(name: str, model: str, config: PreTrainedConfig, options: GlueArguments) -> Task:
    """The task that a fine-tuned model solves.

    Raises:
        ValueError: if it is not a classifier, or its classes are not those of GLUE's task, or are
            in another order.
    """
    kinds = config.architectures or ["ForSequenceClassification"]
    if not any("ForSequenceClassification" in kind for kind in kinds):
        raise ValueError(
            f"model {model} is a {kinds[0]}, which is not fine-tuned: train it first, or name a"
            " fine-tuned model or the output_dir of finished runs"
        )
    classes = tuple(config.id2label[number] for number in range(config.num_labels))
    unnamed = all(re.fullmatch(r"LABEL_\d+|target", label) for label in classes)
    if config.num_labels == 1:
        classes = ()
    if options.own_data:
        task = load_tasks(options, classes)[name]
        return replace(task, own=not unnamed)  # labels are then the classes' numbers
    task = TASKS[name]
    same = [label.lower() for label in classes] == list(task.classes)
    if not same and not (unnamed and len(classes) == len(task.classes)):
        raise ValueError(
            f"model {model} has the classes {listed(classes) or 'of a real-valued target'}, {name}"
            f" has {listed(task.classes) or 'a real-valued target'}, in this order: name a model"
            " fine-tuned on this task, or correct id2label in its config.json"
        )
    return task
