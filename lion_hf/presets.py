"""Presets and recipes by name: the folder configs/ of a clone, which an installed package holds as data."""

from pathlib import Path

PACKAGE = Path(__file__).parent
RECIPE_SUFFIX = ".yaml"


def shipped(name: str) -> Path:
    """A folder that ships with the package, in an installed package or in a clone: "configs" or "model_cards"."""
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
    """The folder of a preset; any other name (a folder, a name on the Hub) as it is.

    Args:
        name: "lion-s-base" or, from any folder, "configs/lion-s-base". A folder of that name comes first.
    """
    preset = name.removeprefix("configs/").rstrip("/")
    if not Path(name).exists() and preset in preset_names():
        return str(shipped("configs") / preset)
    return name


def find_recipe(name: str) -> str:
    """The file of a recipe; any other name as it is.

    Args:
        name: "glue", "mlm/lion-s-base" or, from any folder, "configs/glue.yaml". A file of that name comes first.
    """
    recipe = name.removeprefix("configs/").removesuffix(RECIPE_SUFFIX)
    if not Path(name).is_file() and recipe in recipe_names():
        return str(shipped("configs") / f"{recipe}{RECIPE_SUFFIX}")
    return name
