"""Presets and recipes by name: the folder configs/ of a clone, which an installed package ships."""

import difflib
from pathlib import Path

PACKAGE = Path(__file__).parent
RECIPE_SUFFIX = ".yaml"
CONFIGS = "configs/"  # how a name may start, so that the paths of a clone work from any folder
OURS = ("lion-", "modern-lion-")  # how the names of presets start


def shipped(name: str) -> Path:
    """A folder that ships with the package, "configs" or "model_cards", installed or in a clone."""
    return next(folder for folder in (PACKAGE / name, PACKAGE.parent / name) if folder.is_dir())


def preset_names() -> list[str]:
    """The names of all presets: configurations of models, such as "lion-s-base"."""
    return sorted(file.parent.name for file in shipped("configs").glob("*/config.json"))


def recipe_names() -> list[str]:
    """The names of all recipes: settings of commands, such as "glue" or "mlm/lion-s-base"."""
    configs = shipped("configs")
    return sorted(
        file.relative_to(configs).with_suffix("").as_posix()
        for file in configs.rglob(f"*{RECIPE_SUFFIX}")
        if file.parent.name != "accelerate"  # settings of another program
    )


def find_preset(name: str) -> str:
    """The folder of a preset; the name itself for any other folder or model of the Hub.

    Args:
        name: "lion-s-base" or, from any folder, "configs/lion-s-base". A folder of that name
            comes first.

    Raises:
        ValueError: if the name is neither, but spelt like a preset.
    """
    if Path(name).exists():
        return name
    names, preset = preset_names(), name.removeprefix(CONFIGS).rstrip("/")
    if preset in names:
        return str(shipped("configs") / preset)
    if name.startswith(CONFIGS) or (preset.startswith(OURS) and "/" not in preset):
        raise ValueError(f"{name!r} is neither a folder nor a preset: {_nearest(preset, names)}")
    return name


def find_recipe(name: str) -> str:
    """The file of a recipe, or the name itself if it is that of a file.

    Args:
        name: "glue", "mlm/lion-s-base" or, from any folder, "configs/glue.yaml". A file of that
            name comes first.

    Raises:
        ValueError: if the name is neither.
    """
    if Path(name).is_file():
        return name
    names, recipe = recipe_names(), name.removeprefix(CONFIGS).removesuffix(RECIPE_SUFFIX)
    if recipe in names:
        return str(shipped("configs") / f"{recipe}{RECIPE_SUFFIX}")
    raise ValueError(f"{name!r} is neither a file nor a recipe: {_nearest(recipe, names)}")


def _nearest(name: str, names: list[str]) -> str:
    """What to expect in place of a name: those nearest to it, or all if none is near."""
    return f"expected {', '.join(difflib.get_close_matches(name, names, n=3) or names)}"
