"""What a model card says of a run: how near the copy came to its source, layer by layer, and its
speed."""

import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch

from .. import plots
from ..folders import write_json, write_text
from ..presets import shipped
from .budget import IN_WORDS, words_of
from .run_folder import State
from .settings import Distillation
from .timing import TOKENS, Times, faster_from

FIGURES_FILE = "linearize.json"
PICTURES = ("quality.png", "layer_errors.png")
BEFORE = "## Citation"  # the section of a card that the report goes before
COLUMNS = {
    "copied": "copied weights",
    "layers": "after the layers",
    "answers": "before long documents",
    "end": "at the end",
}
# Figure -> its name on the card, and the source's value: a number, or the name of a figure.
ROWS: dict[str, tuple[str, float | str]] = {
    "cosine": ("cosine of embeddings with the source's", 1.0),
    "retrieval": ("embeddings whose nearest of the source's is their own", 1.0),
    "similarity": ("rank correlation of all pairs' similarities", 1.0),
    "passage_cosine": ("cosine of passages of one pass with the source's", 1.0),
    "document_cosine": ("cosine of long documents with the mean of the source's passages", 1.0),
    "agreement": ("same class as the source", 1.0),
    "accuracy": ("accuracy", "teacher_accuracy"),
    "layer_error": ("mean error of the layers' attention", 0.0),
}


@dataclass(frozen=True)
class Report:
    """The results of a run, for the folder of its model.

    Args:
        source: name of the source on the Hub, or of its folder.
        architecture: the source's class.
        unit: "tokens" or "patches".
        settings: of the run.
        state: the run's figures.
        times: the comparison of speeds.
    """

    source: str
    architecture: str
    unit: str
    settings: Distillation
    state: State
    times: list[Times]

    def write(self, folder: Path) -> None:
        """Adds a section to the model card, the figures as JSON, and, with matplotlib, pictures."""
        figures = {name: getattr(self.state, name) for name in FIGURES}
        write_json(folder / FIGURES_FILE, figures | {"times": [x._asdict() for x in self.times]})
        pictures = importlib.util.find_spec("matplotlib") is not None
        if pictures:
            self._draw(folder)
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8")
        section = self.section(pictures)
        write_text(card, text.replace(BEFORE, f"{section.strip()}\n\n{BEFORE}", 1))

    def section(self, pictures: bool) -> str:
        """The section for the model card, as Markdown."""
        template = (shipped("model_cards") / "linearize.md").read_text(encoding="utf-8")
        state = self.state
        names = [name for name in COLUMNS if name in state.layer_errors]
        errors = [state.layer_errors[name] for name in names]
        return jinja2.Template(template, undefined=jinja2.StrictUndefined).render(
            source=self.source,
            architecture=self.architecture,
            learning_time=words_of(state.clock),
            labelled=self.settings.alpha < 1,
            stages=self._stages(),
            data=self._data(),
            samples=state.samples[0],
            columns=[COLUMNS[name] for name in names],
            rows=[row for figure in ROWS if (row := self._row(figure, names))],
            layers=[[f"{x:.4f}" for x in row] for row in zip(*errors)],
            pictures=pictures,
            times=self.times,
            faster_from=faster_from(self.times),
            machine=machine(),
            unit=self.unit,
            tokens=TOKENS,
        )

    def _stages(self) -> list[dict[str, Any]]:
        return [
            {"name": IN_WORDS[stage], "steps": steps, "rate": f"{self.state.rates[stage]:.2g}"}
            for stage, steps in self.state.steps.items()
        ]

    def _data(self) -> str:
        settings = self.settings
        if settings.data_path:
            return f"the images in `{Path(settings.data_path).name}`"
        if settings.dataset:
            return f"the data set {settings.dataset}"
        return ", ".join(f"`{Path(file).name}`" for file in settings.train_file or [])

    def _row(self, figure: str, names: list[str]) -> dict[str, Any] | None:
        metrics = self.state.metrics
        keys = [figure if name == "end" else f"{name}_{figure}" for name in names]
        if not any(key in metrics for key in keys):
            return None
        title, source = ROWS[figure]
        source = metrics.get(source, float("nan")) if isinstance(source, str) else source
        values = [f"{metrics[key]:.4f}" if key in metrics else "" for key in keys]
        return {"name": title, "source": f"{source:.4g}", "values": values}

    def _draw(self, folder: Path) -> None:
        errors = {COLUMNS[x]: self.state.layer_errors[x] for x in self.state.layer_errors}
        plots.plot_layer_errors(errors, folder / PICTURES[1], "Error of each layer's attention")
        figure = next(
            x for x in ROWS if any(x in entry for entry in self.state.history) or x == "layer_error"
        )
        plots.plot_quality(self.state.history, figure, folder / PICTURES[0], ROWS[figure][0])


FIGURES = ("metrics", "layer_errors", "history", "rates", "trials", "steps", "samples", "clock")


def machine() -> str:
    """The device that this runs on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
