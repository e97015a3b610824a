"""Fine-tunes a text model: `lion-hf glue`. For its use see glue_settings.py."""

import dataclasses
from pathlib import Path

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, set_seed

from ..status import stop
from ..training.checkpoints import checkpoints, remove
from ..training.run import evaluate_and_write, run
from ..training.run_state import begin, finish
from ..training.settings import parse_settings
from ..training.trainer import LionTrainer
from .glue_arguments import GlueTrainingArguments
from .glue_data import describe, load_data, load_tasks, tokenize
from .glue_evaluation import plan_evaluation
from .glue_plan import Data, TaskRun, configuration, load_model_parts, plan
from .glue_settings import USAGE, GlueArguments, check_actions
from .report import save_summary, summarize, table, write_predictions
from .text_classifier import build_classifier


def main(argv: list[str] | None = None, prog: str | None = None) -> dict:
    """Runs the command line `argv`; returns the summary, which is empty without evaluation."""
    options, args = parse_settings(
        USAGE, GlueArguments, GlueTrainingArguments, argv=argv, prog=prog
    )
    say = print if args.process_index == 0 else lambda *_: None
    try:
        tokenizer, data, runs = prepare(options, args)
    except ValueError as error:
        stop(f"lion-hf glue: {error}")
    for name, (task, splits) in data.items():
        say(describe(name, task, splits))

    results: dict = {}
    tokens: dict[str, dict] = {}
    for task_run in runs:
        done = "" if task_run.metrics is None else "finished before, in "
        say(f"\n{task_run.name}, seed {task_run.seed}: {done}{task_run.args.output_dir}")
        if task_run.name not in tokens:  # of one task at a time
            found = data[task_run.name][1].items()
            tokens = {
                task_run.name: {
                    split: tokenize(examples.data, tokenizer, options.max_length)
                    for split, examples in found
                }
            }
        perform(task_run, tokens[task_run.name], options, tokenizer)
        if task_run.metrics is not None:
            results.setdefault(task_run.name, {})[task_run.seed] = task_run.metrics
            stem = "results" if args.do_train else "eval_results"
            if args.process_index == 0:
                title = f"{options.task or 'own'}: {Path(options.model_name_or_path).name}"
                save_summary(summarize(results), args.output_dir, title, stem)
    if not results:
        return {}
    summary = summarize(results)
    say(f"\n{table(summary)}\n\nTable and picture are in {args.output_dir}/{stem}.*")
    return summary


def prepare(
    options: GlueArguments, args: GlueTrainingArguments
) -> tuple[PreTrainedTokenizerBase, Data, list[TaskRun]]:
    """Everything that can go wrong before the first run goes wrong here, with a ValueError."""
    check_actions(options, args)
    if args.do_predict and not options.own_data:
        options.predict = True
    tokenizer = load_model_parts(options)
    if not args.do_train:
        return tokenizer, *plan_evaluation(options, args)
    data = {
        name: (task, load_data(name, task, options)) for name, task in load_tasks(options).items()
    }
    return tokenizer, data, plan(data, options, args, tokenizer)


def perform(
    task_run: TaskRun,
    tokens: dict[str, Dataset],
    options: GlueArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Trains a run that is not finished, or evaluates a model, and predicts the test sets."""
    finished = task_run.metrics is not None
    tested = not set(task_run.task.test_splits).isdisjoint(tokens)
    if finished and not tested:
        return
    if finished:
        task_run.model, task_run.from_scratch = task_run.args.output_dir, False
    trainer = make_trainer(task_run, tokens, options, tokenizer)
    if not finished and task_run.args.do_train:
        fine_tune(task_run, trainer, options)
    elif task_run.args.do_eval and not finished:
        task_run.metrics = _chosen(evaluate_and_write(trainer), task_run)
    if tested:
        predict(task_run, trainer, tokens)


def make_trainer(
    task_run: TaskRun,
    tokens: dict[str, Dataset],
    options: GlueArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> LionTrainer:
    """The trainer of a run with its model and data."""
    task, args = task_run.task, task_run.args
    evaluation = {
        prefix.rstrip("_"): tokens[split] for split, prefix in task.splits if split in tokens
    }
    set_seed(task_run.seed)
    model = build_classifier(
        task_run.model,
        configuration(task_run.model, options),
        task.classes,
        task_run.from_scratch,
        options.trust_remote_code,
        trained=not args.do_train or task_run.metrics is not None,
    )
    return LionTrainer(
        model,
        args,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=tokens.get("train"),
        eval_dataset=evaluation.get("", evaluation) or None,
        processing_class=tokenizer,
        compute_metrics=lambda found: task.measure(found.predictions, found.label_ids),
    )


def fine_tune(task_run: TaskRun, trainer: LionTrainer, options: GlueArguments) -> None:
    """Trains and evaluates a run, and leaves its metrics in the run and on disk."""
    task, folder = task_run.task, task_run.args.output_dir
    if trainer.is_world_process_zero():
        begin(folder, task_run.settings)
    metrics = run(
        trainer,
        title=f"{task_run.name}, seed {task_run.seed}",
        name=f"{Path(options.model_name_or_path).name}-{task_run.name}-{task_run.seed}",
        metric=task.splits[0][1] + task.metrics[0],
        dataset=task_run.name if options.own_data else "nyu-mll/glue",
        settings=[dataclasses.replace(options, task=task_run.name, seeds=[], redo=False)],
    )
    task_run.metrics = _chosen(metrics, task_run)
    if trainer.is_world_process_zero():
        finish(folder, task_run.settings, task_run.metrics)
        for checkpoint in [] if options.keep_checkpoints else checkpoints(folder):
            remove(checkpoint)


def _chosen(metrics: dict[str, float], task_run: TaskRun) -> dict[str, float]:
    """The task's own metrics among those of an evaluation."""
    task = task_run.task
    names = [prefix + key for _, prefix in task.splits for key in task.metrics]
    return {name: metrics[f"eval_{name}"] for name in names}


def predict(task_run: TaskRun, trainer: LionTrainer, tokens: dict[str, Dataset]) -> None:
    """Writes the predictions of the test sets that were read."""
    task = task_run.task
    for split, file in zip(task.test_splits, task.submission):
        if split in tokens:
            logits = trainer.predict(tokens[split]).predictions
            if trainer.is_world_process_zero():
                path = Path(task_run.args.output_dir, file)
                write_predictions(path, task.predictions(logits), task)
