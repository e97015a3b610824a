"""A folder of a softmax model in, a folder of a LION model out."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig

from ..auto import has_words
from ..convert.conversion import Conversion
from ..convert.errors import ConversionError
from ..convert.tokenizer_files import check_processor_files, check_words
from ..data.documents import find_files
from ..data.fingerprints import fingerprint
from ..folders import check_new_folder, new_folder
from ..hub import save_for_hub
from ..modeling.configuration_lion import LionConfig
from ..modeling.modeling_lion import LionPreTrainedModel
from ..training.finite import not_finite
from .copying import _copying, check_window, linearize_model, source_positions
from .pooling import pooling_modes
from .sentence_modules import SentenceModules, find_sentence_modules
from .settings import Copying, Distillation
from .softmax_models import load_softmax_model
from .sources import check_image_sizes, license_of, source_folder

if TYPE_CHECKING:
    from .report import Report

FREE = ("license",)  # options that an interrupted run may change


@dataclass(frozen=True)
class Linearization(Conversion):
    """What was made: as in `Conversion`, and the distillation's numbers."""

    metrics: dict[str, float]


def linearize_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    distillation: Distillation | None = None,
    **options: Any,
) -> Linearization:
    """Turns a pretrained softmax encoder into a LION folder for `from_pretrained`.

    The modules of a sentence-transformers folder come along, so that it loads with
    sentence-transformers again.

    Args:
        source: folder or Hub name of a checkpoint of transformers. No code that comes with it is
            run.
        output: the folder to write; it must not exist, or be empty. It appears only if all went
            well.
        distillation: how to teach the copy by the source; None to leave it as copied.
        **options: fields of `Copying`.

    Returns:
        The folder, the model's class name and configuration, notes, and the distillation's numbers.

    Raises:
        ValueError: for a source that is no such checkpoint or has parts that LION lacks, an option
            of another value, data that do not fit, or an output folder that is not empty. All is
            checked before training starts.
    """
    copying = _copying(options)
    output = check_new_folder(output)
    modules = find_sentence_modules(source_folder(source))
    folder = modules.transformer_folder
    teacher, notes = load_softmax_model(source, modules.transformer)
    window = _window(copying, distillation, teacher.config, modules)
    repeated = copying.max_position_embeddings is not None
    options |= {"window": window if repeated else None}
    student, more = linearize_model(teacher, **options)
    processor, missing = _processor(folder, student.config)
    notes += more + missing
    license, unknown = (copying.license, []) if copying.license else _license(modules.folder)
    notes += unknown
    _check_finite(student, source)
    longest = copying.max_position_embeddings
    if processor is not None and longest is not None:
        processor.model_max_length = longest
    base_model = None if Path(source).is_dir() else str(source)
    card = _Card(processor, license, base_model, modules, longest)

    metrics: dict[str, float] = {}
    if distillation is None:
        card.write(student, output)
    else:
        from .distillation import Lesson
        from .learning import distil, make_report, run_in, this_process

        process = this_process()
        alpha, tau = distillation.alpha, distillation.tau
        lesson = Lesson(student, teacher, alpha, tau, pooling_modes(modules), window)
        record = _record(folder, copying, distillation)
        with run_in(output, process, record) as run:
            learned = distil(lesson, processor, distillation, run, process, copying.seed)
            notes, metrics = notes + learned.notes, learned.state.metrics
            _check_finite(student, source)
            if process.is_main_process:
                name = card.base_model or Path(source).resolve().name
                report = make_report(name, lesson, distillation, learned, process.device)
                card.write(student, output, report)
                run.remove()
            process.wait_for_everyone()
    return Linearization(output, type(student).__name__, student.config, tuple(notes), metrics)


@dataclass(frozen=True)
class _Card:
    """What goes into the output beside the model.

    Args:
        processor: tokenizer or image processor.
        license: of the weights.
        base_model: the source's name on the Hub.
        modules: of sentence-transformers.
        longest: tokens of the longest text, if there are more than the source takes.
    """

    processor: Any
    license: str
    base_model: str | None
    modules: SentenceModules
    longest: int | None = None

    def write(
        self, student: LionPreTrainedModel, output: Path, report: "Report | None" = None
    ) -> None:
        """Writes the output, whole or not at all."""
        with new_folder(output) as new:
            save_for_hub(
                student,
                new,
                processing_class=self.processor,
                license=self.license,
                base_model=self.base_model,
            )
            self.modules.copy_to(new, self.longest)
            if report is not None:
                report.write(new)


def _window(
    copying: Copying,
    distillation: Distillation | None,
    theirs: PreTrainedConfig,
    modules: SentenceModules,
) -> int | None:
    """Tokens that the source reads at once, as given or as its folder says; None if unknown."""
    if copying.window is not None:
        check_window(copying, theirs, distillation is not None and distillation.wants_documents)
        return copying.window
    longest = source_positions(theirs)
    return None if longest is None or modules.window is None else min(modules.window, longest)


def _check_finite(student: LionPreTrainedModel, source: str | os.PathLike) -> None:
    broken = not_finite(student.named_parameters())
    if broken:
        raise ConversionError(
            f"{source}: {len(broken)} parameters of the copy are not finite, first {broken[0]}:"
            " nothing was written"
        )


def _record(folder: Path, copying: Copying, distillation: Distillation) -> dict[str, Any]:
    """What a run depends on: options, and the content of the source and of the data."""
    from ..training.run_state import digest, model_digest
    from ..training.settings import resolved_settings

    record = resolved_settings(copying, distillation)
    record = {name: value for name, value in record.items() if name not in FREE}
    record["the source"] = model_digest(str(folder))
    for name in ("train_file", "validation_file", "data_path", "dataset"):
        paths = getattr(distillation, name)
        if paths is not None:
            # a file that is missing is an error of the data, in its words; a dataset may be a name
            with suppress(OSError, ValueError):
                record[f"the content of {name}"] = digest(fingerprint(_data(name, paths)))
    return record


def _data(name: str, paths: Any) -> Sequence[str | Path]:
    """The files and folders that are read for an option that names data."""
    if name != "data_path":
        return find_files(paths) if isinstance(paths, list) else [paths]
    from ..data.images import HELD_OUT, visible_files  # with torchvision

    # the output and logs may also be in the folder, and grow
    root = Path(paths)
    folders = [root / part for part in ("train", *HELD_OUT) if (root / part).is_dir()]
    return folders or [Path(file) for file in visible_files(root, (".parquet",))]


def _processor(folder: Path, config: LionConfig) -> tuple[Any, list[str]]:
    """The source's tokenizer or image processor, or None with a note."""
    kind, auto = (
        ("tokenizer", AutoTokenizer)
        if config.modality == "text"
        else ("image processor", AutoImageProcessor)
    )
    check_processor_files(folder, config.vocab_size if kind == "tokenizer" else 0)
    if kind != "tokenizer":
        check_image_sizes(folder, config)
    try:
        processor = auto.from_pretrained(folder, trust_remote_code=False)
        found = kind != "tokenizer" or has_words(processor)
    except (
        Exception
    ) as error:  # files may hold anything, and transformers and tokenizers raise accordingly
        found, reason = False, f" ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    else:
        reason = ""
    if not found:
        return None, [
            f"the source has no {kind} that can be read{reason}: save one into the folder with"
            " save_pretrained."
        ]
    if kind == "tokenizer":
        check_words(processor, config)
    return processor, []


def _license(folder: Path) -> tuple[str, list[str]]:
    """The licence on the source's model card, else "unknown" with a note."""
    license = license_of(folder)
    if license:
        return license, []
    return "unknown", [
        "the source's model card names no licence: the new one says unknown (--license)."
    ]
