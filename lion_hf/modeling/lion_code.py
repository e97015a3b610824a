"""The code that travels with saved models, so that they can be opened without lion_hf."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedConfig

# Auto class -> class in modeling_lion.py; for registration, and for the `auto_map` of saved models.
AUTO_MODELS = {
    "AutoModel": "LionModel",
    "AutoModelForMaskedLM": "LionForMaskedLM",
    "AutoModelForSequenceClassification": "LionForSequenceClassification",
    "AutoModelForTokenClassification": "LionForTokenClassification",
    "AutoModelForQuestionAnswering": "LionForQuestionAnswering",
    "AutoModelForMultipleChoice": "LionForMultipleChoice",
    "AutoModelForImageClassification": "LionForImageClassification",
    "AutoModelForMaskedImageModeling": "LionForMaskedImageModeling",
}
AUTO_MAP = {
    "AutoConfig": "configuration_lion.LionConfig",
    **{auto_name: f"modeling_lion.{name}" for auto_name, name in AUTO_MODELS.items()},
}
CODE = Path(__file__).resolve().parent


def save_code(folder: Path) -> None:
    """Copies LION's code files into a folder, which is made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(CODE.glob("*.py")):
        if file.name != "__init__.py" and folder.resolve() != CODE:
            shutil.copyfile(file, folder / file.name)


def in_folder(folder: Path, auto_map: Mapping[str, str]) -> dict[str, str]:
    """The entries of an `auto_map` whose code is in the folder.

    The code of an entry `owner/name--file.Class` is in another repository.
    """
    return {
        auto_name: code
        for auto_name, code in auto_map.items()
        if isinstance(code, str) and (folder / f"{code.split('.')[0]}.py").is_file()
    }


@contextlib.contextmanager
def code_goes_along(config: PreTrainedConfig) -> Iterator[None]:
    """Within it, saving the configuration also saves LION's code and an `auto_map` of all heads."""
    own = config.__dict__.get("auto_map")
    config.auto_map = {**AUTO_MAP, **(own or {})}
    try:
        yield
    finally:
        config.auto_map = own
        if own is None:
            del config.auto_map


class PushesCode:
    """A mixin for subclasses of `PreTrainedModel`: LION's code goes to the Hub with the model."""

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As in `PushToHubMixin`; LION's code goes along."""
        with code_goes_along(self.config):
            return super().push_to_hub(repo_id, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in `PreTrainedModel`; with `push_to_hub=True`, LION's code goes along."""
        pushes = kwargs.get("push_to_hub", False)
        with code_goes_along(self.config) if pushes else contextlib.nullcontext():
            super().save_pretrained(save_directory, *args, **kwargs)
