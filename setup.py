"""The packages, among them two folders of data beside lion_hf/; all else is in pyproject.toml."""

from setuptools import find_packages, setup

DATA = {"lion_hf.configs": "configs", "lion_hf.model_cards": "model_cards"}

setup(
    packages=[*find_packages(include=["lion_hf", "lion_hf.*"]), *DATA],
    package_dir=DATA,
    include_package_data=False,  # only what is named here, in a clone as in a source archive
    package_data={
        "lion_hf": ["py.typed"],
        "lion_hf.configs": ["**/*.json", "**/*.yaml"],
        "lion_hf.model_cards": ["*.md"],
    },
)
