"""Import paths of version 0.1, which work for one more release with a DeprecationWarning."""

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
# Module that still exists -> the modules that hold what has left it.
LEFT = {
    "auto": ("folders",),
    "convert": ("convert.names", "convert.conversion"),
    "data": ("data.packing", "data.samples"),
    "hub": ("folders",),
    "linearize": ("linearize.families", "linearize.softmax_models", "linearize.copying"),
    "modeling.lion_checks": ("modeling.lion_numerics",),
    "modeling.lion_chunkwise": ("modeling.lion_choice", "modeling.lion_chunk_parts"),
    "modeling.lion_naive": ("modeling.lion_numerics",),
    "modeling.lion_ops": ("modeling.lion_choice", "modeling.configuration_lion"),
    "modeling.modeling_lion": ("modeling.lion_layers",),
    "training": ("training.run", "training.callbacks"),
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


def names_that_left(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module in `LEFT`: finds the names that are elsewhere now, and warns.

    Args:
        module: the module's full name.
    """

    def find(name: str) -> Any:
        for home in LEFT[module.removeprefix(f"{PACKAGE}.")] if not name.startswith("_") else ():
            names = vars(importlib.import_module(f"{PACKAGE}.{home}"))
            if name in names:
                warnings.warn(
                    f"{module}.{name} has moved to {PACKAGE}.{home}; the next release removes the"
                    " old path",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return names[name]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


def install() -> None:
    """Makes Python find the old paths. Calling it again changes nothing.

    The files in modeling/ travel to the Hub, where this one is not, so they get their `__getattr__`
    from here.
    """
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
    for old in LEFT:
        module = sys.modules.get(f"{PACKAGE}.{old}")
        if module is not None and old.startswith("modeling."):
            vars(module)["__getattr__"] = names_that_left(module.__name__)
