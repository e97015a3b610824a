"""transformers' own common tests, from the source archive of the installed version.

The archive has the tests that all models of transformers share, but not every helper that they
import. This file stands in for what is missing. Nothing of the archive is kept in this repository.
"""

import importlib.abc
import importlib.machinery
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import transformers
from filelock import FileLock
from support.archives import unpack

PACKAGE = "transformers_common_tests"

# Values of the fields that every PreTrainedConfig has, none of them the default.
CONFIG_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["LionModel"],
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "regression",
}


def obtain(cache: Path) -> Path:
    """Downloads the archive into `cache`, once per test run, and returns its tests folder."""
    name = f"transformers-{transformers.__version__}"
    tests = cache / name / "tests"
    with FileLock(cache / "lock"):
        if not tests.is_dir():
            wanted = [
                "--no-deps",
                "--no-binary",
                "transformers",
                "--dest",
                str(cache),
                name.replace("-", "==", 1),
            ]
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", *wanted], check=True
            )
            with tarfile.open(cache / f"{name}.tar.gz") as archive:
                members = [
                    m
                    for m in archive.getmembers()
                    if m.name.startswith(f"{name}/tests/") and m.name.endswith(".py")
                ]
                unpack(archive, cache / "unpacked", members)
            (cache / "unpacked" / name).rename(cache / name)
    return tests


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports files that the archive lacks, as modules in which every name is an empty class.

    These are mixins for generation (LION does not generate), for exporters (`test_export.py`
    exports every class) and for pipelines (`pipelines.py` has what runs instead), and the values
    of the common configuration fields.
    """

    def __init__(self, tests: Path):
        self.tests = tests

    def find_spec(self, name, path=None, target=None):
        package, *parts = name.split(".")
        if (
            package != PACKAGE
            or not parts
            or self.tests.joinpath(*parts).with_suffix(".py").exists()
        ):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def stand_in(name: str) -> type:
            if name.startswith("__"):  # what Python and its tools ask of every module
                raise AttributeError(name)
            return type(name, (), {})

        module.config_common_kwargs = CONFIG_FIELDS
        module.__getattr__ = stand_in


def load(tests: Path, name: str) -> ModuleType:
    """Imports a file of the archive's tests."""
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(tests)]
        sys.modules[PACKAGE] = package
        sys.meta_path.append(StandIns(tests))
        # The archive's tests look for the library here; both must lead to the installed one.
        for init in (tests / "__init__.py", tests.parent / "src" / "transformers" / "__init__.py"):
            init.parent.mkdir(parents=True, exist_ok=True)
            init.touch()
        # The models on the Hub that pipelines are tested with.
        summary = tests / "utils" / "tiny_model_summary.json"
        summary.parent.mkdir(exist_ok=True)
        summary.write_text("{}")
    return importlib.import_module(f"{PACKAGE}.{name}")
