"""Import paths of version 0.1, which work for one more release with a DeprecationWarning."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old module -> the modules that hold its names now.
MOVED = {
    "checkpoints": ("training.checkpoints",),
    "distillation": ("linearize.distillation", "linearize.losses", "linearize.settings"),
    "distributed": ("training.processes",),
    "finished": ("training.run_state",),
    "glue": ("tasks.glue_tasks", "tasks.metrics", "tasks.report"),
    "image_trainer": ("tasks.image_trainer", "tasks.teacher"),
    "images": ("data.images", "data.augmentation"),
    "labelled_text": ("tasks.glue_data", "data.labelled_text", "data.tables"),
    "lesson_data": ("linearize.data", "linearize.text_data"),
    "modeling.lion_scan": ("modeling.lion_orders", "modeling.configuration_lion"),
    "original": ("convert.reading", "convert.errors"),
    "settings": ("training.settings",),
    "streaming": ("data.text_stream", "training.stream_trainer"),
    "text_classifier": ("tasks.text_classifier",),
    "trainer": ("training.trainer", "training.callbacks", "training.speed"),
}
PACKAGE = __name__.rpartition(".")[0]


class MovedModules(MetaPathFinder, Loader):
    """Finds a module under its old path, and gives it the names of the modules that replaced it."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        """The specification of a module in `MOVED`, None for any other."""
        old = fullname.removeprefix(f"{PACKAGE}.")
        return ModuleSpec(fullname, self) if fullname != old and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual, empty module."""

    def exec_module(self, module: ModuleType) -> None:
        """Warns, and gives the module the names of those that replaced it."""
        homes = [f"{PACKAGE}.{home}" for home in MOVED[module.__name__.removeprefix(f"{PACKAGE}.")]]
        warnings.warn(
            f"{module.__name__} has moved to {' and '.join(homes)}; the next release"
            " removes the old path",
            DeprecationWarning,
            stacklevel=2,
        )
        for home in reversed(homes):
            vars(module).update(
                {
                    k: v
                    for k, v in vars(importlib.import_module(home)).items()
                    if not k.startswith("__")
                }
            )


def install() -> None:
    """Makes Python find the old paths. Calling it again changes nothing."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
