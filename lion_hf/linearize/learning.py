"""Teaches a copy by its source: what is checked, measured, planned and learnt, in this order."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size

from ..convert.errors import ConversionError
from ..modeling.modeling_lion import LionPreTrainedModel
from .batches import FEWER_TOKENS, TOKENS, Batches
from .budget import (
    LAYERS_SHARE,
    Speed,
    Wishes,
    plan_by_clock,
    plan_by_steps,
    report_seconds,
    seconds_of,
    words_of,
)
from .data import lesson_data
from .distillation import Lesson
from .documents import check_documents, long_documents
from .held_out import HeldOut
from .precision import bf16_is_faster
from .report import Report
from .run_folder import RunFolder, State, run_folder_of
from .settings import Distillation
from .stage import STAGES, Learner
from .timing import compare_speeds

SAMPLES = 64  # images per step, and samples per batch that is measured
# Where there is time for at most so many steps of the usual size, smaller ones teach more; with
# time for 740 they were worth nothing (benchmarks/results/linearize.md).
FEW_STEPS = 500
MUCH_FASTER = 0.5  # of the time of a usual step: below that, smaller ones are taken

logger = logging.getLogger(__name__)


class Learned(NamedTuple):
    """What came of a run.

    Args:
        state: its figures: see `State`.
        notes: what the user should know.
        seconds_left: of the budget; None without one.
    """

    state: State
    notes: list[str]
    seconds_left: float | None


def this_process() -> PartialState:
    """The devices and processes of a run, as its launcher set them up."""
    return PartialState(cpu=not torch.accelerator.is_available())


@contextlib.contextmanager
def run_in(output: Path, process: PartialState, record: Mapping[str, Any]) -> Iterator[RunFolder]:
    """Holds the folder of a run, beside its output, in the first process; the others wait for it.

    Raises:
        ValueError: in all processes, as `RunFolder.held`.
    """
    run, record = RunFolder(run_folder_of(output), process.is_main_process), dict(record)
    record["processes"] = process.num_processes
    with contextlib.ExitStack() as stack:
        on_first_process(process, lambda: stack.enter_context(run.held(record)))
        yield run


def on_first_process(process: PartialState, function: Callable[[], Any]) -> None:
    """Calls a function on the first process; all of them raise its ValueError."""
    problem: list[str | None] = [None]
    if process.is_main_process:
        try:
            function()
        except ValueError as error:
            if process.num_processes == 1:
                raise
            problem = [str(error)]
    if process.num_processes > 1:
        broadcast_object_list(problem)
    if problem[0] is not None:
        raise ValueError(problem[0])


def distil(
    lesson: Lesson,
    processor: Any,
    settings: Distillation,
    run: RunFolder,
    process: PartialState,
    seed: int,
) -> Learned:
    """Teaches a lesson's student, in place, from where an interrupted run stopped.

    Args:
        lesson: the copy, and what it was copied from.
        processor: their tokenizer or image processor.
        settings: data and stages.
        run: where the state is kept.
        process: its device, and its place among others.
        seed: of order, masks and dropout.

    Raises:
        ConversionError: for data that do not fit, a model whose answers need data of another kind
            (multiple choice), a budget that is too short, or too little memory.
        FloatingPointError: if the loss is not finite.
    """
    check_student(lesson.student, processor)
    check_documents(lesson, processor, settings)  # an error before the data are read
    train, validation, collate, notes = lesson_data(
        lesson.student, processor, settings, seed, lesson.longest_text
    )
    texts = train, validation.dataset  # type: ignore[attr-defined]
    documents, measured = long_documents(lesson, texts, processor, settings, seed)
    lesson.to(process.device)
    found = run.load()
    process.wait_for_everyone()  # the first one removes this checkpoint with its next
    state = State(bf16=_computes_in_bf16(settings, process)) if found is None else found[0]
    place = process.process_index, process.num_processes
    text = lesson.student.config.modality == "text"
    batch_size = settings.batch_size or (None if text else SAMPLES)
    batches = {
        stage: Batches(train, collate, batch_size, seed + number, *place)
        for number, stage in enumerate(STAGES)
    }
    batches["answers"].resize(state.tokens)
    batches["documents"].documents = documents
    held_out = HeldOut.of(validation, collate, batch_size or SAMPLES)
    held_out.documents = [collate([document]) for document in measured]
    learner = Learner(lesson, batches, held_out, state, run, process)
    with memory_errors(settings):
        if found is None:
            _prepare(learner, settings)
        else:
            held_out.sizes = state.samples
            learner.restore(*found[1:])
            logger.info("going on after %s of learning", words_of(state.clock))
        learner.run()
    lesson.student.requires_grad_(True).eval().cpu()
    lesson.teacher.cpu()
    budget = None if settings.by_steps else seconds_of(settings.time)
    return Learned(learner.state, notes, None if budget is None else budget - learner.clock.elapsed)


def make_report(
    source: str, lesson: Lesson, settings: Distillation, learned: Learned, device: torch.device
) -> Report:
    """The report of a run, after a comparison of speeds in what is left of its time.

    Args:
        source: the source's name, for readers.
        lesson: student and teacher.
        settings: of the run.
        learned: what came of it.
        device: where speeds are compared.
    """
    left = learned.seconds_left
    seconds = report_seconds(learned.state.clock) if left is None else max(left, 0.5)
    teacher, student = lesson.teacher, lesson.student
    return Report(
        source,
        type(teacher).__name__,
        "tokens" if student.config.modality == "text" else "patches",
        settings,
        learned.state,
        compare_speeds(teacher.config, student.config, seconds, device),
    )


def check_student(student: LionPreTrainedModel, processor: Any) -> None:
    """Raises ConversionError for a model that cannot learn from its source."""
    if type(student).__name__ == "LionForMultipleChoice":
        raise ConversionError(
            "distillation of LionForMultipleChoice is not offered: its answers need questions with"
            " choices"
        )
    if processor is None:
        raise ConversionError(
            "the source has no tokenizer or image processor, which distillation needs"
        )


def _computes_in_bf16(settings: Distillation, process: PartialState) -> bool:
    """The choice of the first process: how fast its device is depends on what else it does."""
    choice = [settings.bf16 or bf16_is_faster(process.device)]
    if process.num_processes > 1:
        broadcast_object_list(choice)
    return choice[0]


def _prepare(learner: Learner, settings: Distillation) -> None:
    """Tries a step of each stage, measures the copy, and makes the plan, the same in all processes.

    Raises:
        ValueError: if the budget is too short.
    """
    process, held_out = learner.process, learner.held_out
    budget = None if settings.by_steps else seconds_of(settings.time)
    wishes, steps = _wishes(learner.lesson, settings), dict[str, float]()
    if budget is not None:
        logger.info("timing a step of each stage, and a measurement")
        steps = {stage: _step_seconds(learner, stage) for stage in wishes.shares}
        _choose_tokens(learner, wishes.shares["answers"] * budget, steps["answers"])
        learner.lesson.begin(STAGES[0])
        about = Speed(steps, held_out.limit(learner.lesson, budget))
        later = learner.clock.elapsed + about.measurement
        # a budget that is too short is an error before the copy is measured
        on_first_process(process, lambda: plan_by_clock(budget, later, about, wishes))
    began = time.monotonic()
    learner.measure_all("copied")
    speed, now = Speed(steps, time.monotonic() - began), learner.clock.elapsed

    def make_plan() -> None:
        if budget is None:
            plan = plan_by_steps(settings.stage_steps(wishes.layers > 0), wishes)
        else:
            plan = plan_by_clock(budget, now, speed, wishes)
        learner.state.phases = [asdict(phase) for phase in plan]
        learner.state.samples = held_out.sizes

    on_first_process(process, make_plan)
    if process.num_processes > 1:
        shared = [asdict(learner.state)]
        broadcast_object_list(shared)
        learner.state = State(**shared[0])
        held_out.sizes = learner.state.samples
    logger.info("%s", settings.in_words(wishes.layers > 0))
    logger.info("after an interruption the same command goes on from %s", learner.folder.path)


def _wishes(lesson: Lesson, settings: Distillation) -> Wishes:
    """What suits a model.

    Text was measured (benchmarks/results/linearize.md): a stage for the layers alone is worth
    nothing there, because the other one looks at each layer's hidden states too. It is there for
    those who give it a learning rate.
    """
    given = settings.given_rates
    text = lesson.student.config.modality == "text" and given["layers"] is None
    layers = 0.0 if text else LAYERS_SHARE
    return Wishes(given, settings.usual_rates, layers, settings.document_share)


def _choose_tokens(learner: Learner, seconds: float, step: float) -> None:
    """Makes the steps end to end smaller if there is time for few, and they then take less time.

    Several processes exchange their gradients after every step, so theirs stay as they are.

    Args:
        learner: what takes them.
        seconds: the time for them.
        step: seconds of a step of the usual size.
    """
    batches = learner.batches["answers"]
    counted = batches.batch_size is not None
    if counted or learner.process.num_processes > 1 or seconds > FEW_STEPS * step:
        return
    batches.resize(FEWER_TOKENS)
    if _step_seconds(learner, "answers") < MUCH_FASTER * step:
        learner.state.tokens = FEWER_TOKENS
        logger.info("steps of about %d tokens, because there is time for few", FEWER_TOKENS)
    else:
        batches.resize(TOKENS)


def _step_seconds(learner: Learner, stage: str) -> float:
    """Seconds of a step on the largest batch, which also shows whether the memory suffices."""
    learner.lesson.begin(stage)
    learner.lesson.train()
    if stage != "layers":
        learner.lesson.scale(learner.held_out.sample(learner.process.device))
    batch, seconds = learner.batches[stage].largest(), []
    for _ in range(2):  # the first one also warms up
        began = time.monotonic()
        learner.backward(batch).item()
        seconds.append(time.monotonic() - began)
    learner.lesson.student.zero_grad()
    return min(seconds)


@contextlib.contextmanager
def memory_errors(settings: Distillation) -> Iterator[None]:
    """Makes one line of the many ways in which memory runs out.

    Raises:
        ConversionError: if it did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not should_reduce_batch_size(error):
            raise
        size = settings.batch_size
        given = f"batch_size={size}" if size else "batches of the usual size"
        raise ConversionError(
            f"out of memory with {given}: try --batch_size"
            f" {max((size or 16) // 2, 1)}, or a smaller --max_length for text, or"
            " --max_position_embeddings for long documents"
        ) from error
