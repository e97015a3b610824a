"""Exports a model folder to ONNX, for ONNX Runtime: serving on CPUs without torch.

The folder that is written holds `onnx/model.onnx`, where sentence-transformers and the Hub expect
it, beside configuration, tokenizer or image processor, and modules of sentence-transformers.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ..convert.tokenizer_files import SETTINGS_FILES, WORD_FILES
from ..folders import check_new_folder, has_weights, new_folder
from ..linearize.sentence_modules import find_sentence_modules
from ..modeling import modeling_lion
from ..modeling.configuration_lion import LionConfig
from ..modeling.modeling_lion import LionPreTrainedModel
from .loading import load_model, read_config

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
MODEL_FILE, INT8_FILE = "onnx/model.onnx", "onnx/model_int8.onnx"
HEADS = (
    "LionModel",
    "LionForMaskedLM",
    "LionForSequenceClassification",
    "LionForTokenClassification",
    "LionForQuestionAnswering",
    "LionForImageClassification",
)
TOLERANCE = 1e-3  # of the largest output: more is a fault of the exporter or of the weights
EXAMPLE = (2, 9)  # rows and tokens that are traced: no dimension of 1, which would be fixed
# Batches that are compared with torch: rows, tokens, padding of the first row, its side. For images
# rows, and patches down and across.
TEXTS = ((3, 150, 37, "left"), (2, 64, 9, "right"), (1, 5, 0, "right"))
IMAGES = ((1, 2, 3), (2, 5, 4))
TEXT_AXES = {0: "batch", 1: "sequence"}  # axes that may have any size
IMAGE_AXES = {0: "batch", 2: "height", 3: "width"}
MEGABYTE = 10**6
TRACED = "pkg.torch.onnx.fx_node"  # under which the exporter notes what a node was made of
GATE = "_gate"  # ends the names of the nodes that multiply with a gate's weights


@dataclass(frozen=True)
class OnnxFile:
    """A file that was written.

    Args:
        name: its path inside the folder.
        megabytes: its size, external data included, in units of 10**6 bytes.
        difference: the largest difference between its outputs and those of torch on random
            batches, as a share of the largest output.
    """

    name: str
    megabytes: float
    difference: float


@dataclass(frozen=True)
class OnnxExport:
    """What an export wrote: the folder, the model's class, the files, and the seconds it took."""

    folder: Path
    architecture: str
    mask_type: str
    files: tuple[OnnxFile, ...]
    seconds: float


def export_onnx(
    folder: str | os.PathLike, output: str | os.PathLike, *, int8: bool = False
) -> OnnxExport:
    """Writes a model for ONNX Runtime, which runs it at any batch size, length and image size.

    Inputs are `input_ids`, `attention_mask` and, if the model has more than one token type,
    `token_type_ids`, each (batch, sequence) in int64; padding may be on either side. Images are
    `pixel_values` (batch, channels, height, width) in float32. The outputs have the names of the
    torch model's. The weights are in float32.

    Args:
        folder: a folder of a LION model, or of sentence-transformers with one.
        output: the folder to write; it must not exist, or be empty. It appears only if all went
            well, with the model's folder but for its torch weights.
        int8: whether to also write a file whose matrices and embeddings are integers of 8 bits. The
            gates of LION-S stay in float32.

    Returns:
        The files with their sizes and their differences to torch, and the time.

    Raises:
        ValueError: without the packages of ONNX, for a folder that holds no LION model with a head
            of `HEADS`, weights that cannot be loaded or are not finite, or an output folder that is
            not empty. All but the weights are checked before they are loaded.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--onnx needs {', '.join(missing)}, not installed here: pip install 'lion_hf[onnx]'"
        )
    output = check_new_folder(output)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: expected one with a LION model")
    modules = find_sentence_modules(Path(folder))
    source = modules.transformer_folder
    architecture = _architecture(source)
    start = time.perf_counter()
    network = _load(source, architecture)
    with new_folder(output) as new, torch.no_grad():
        (new / "onnx").mkdir(parents=True)
        _export(network, new / MODEL_FILE)
        files = [_checked(network, new, MODEL_FILE)]
        if not files[0].difference <= TOLERANCE:  # or NaN
            raise ValueError(
                f"{source}: the exported model differs from torch by {files[0].difference:.2g} of"
                f" the largest output: expected at most {TOLERANCE:g}, with finite weights"
            )
        if int8:
            quantize(new / MODEL_FILE, new / INT8_FILE)
            files.append(_checked(network, new, INT8_FILE))
        _copy_settings(source, new)
        modules.copy_to(new)
    mask_type = network.config.mask_type
    seconds = time.perf_counter() - start
    return OnnxExport(output, architecture, mask_type, tuple(files), seconds)


def _load(folder: Path, architecture: str) -> LionPreTrainedModel:
    """The model in a folder, in evaluation. Its pooler, which few use, may be missing."""
    network, _ = load_model(
        getattr(modeling_lion, architecture),
        str(folder),
        dtype=torch.float32,
        attention_form="auto",
        return_dict=True,
        output_attentions=False,
        output_hidden_states=False,
    )
    missing = [name for name in network.missing_weights if not name.startswith("pooler.")]
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}, a weight of {architecture}: train it first")
    return network.eval()


def _architecture(folder: Path) -> str:
    """The class of the model in a folder, after the check that it can be exported."""
    config = read_config(str(folder))
    if not isinstance(config, LionConfig):
        raise ValueError(
            f"{folder} holds a model of type {config.model_type!r}: expected 'lion'"
            " (`lion-hf linearize` makes one of it)"
        )
    found = (config.architectures or ["none"])[0]
    if found not in HEADS:
        raise ValueError(f"{folder}: architectures={found!r}: expected one of {HEADS}")
    if not has_weights(folder):
        raise ValueError(f"{folder} has no weights: expected model.safetensors")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps advice of the exporter and the quantiser, which is not for users, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _text(config: LionConfig, rows: int, length: int, padding: int = 0, side: str = "right"):
    """A random batch of texts, with padding in its first row."""
    if config.use_position_embeddings:
        length = min(length, config.max_position_embeddings)
        padding = min(padding, length - 1)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, slice(length - padding, None) if side == "right" else slice(padding)] = 0
    inputs = {
        "input_ids": torch.randint(config.vocab_size, (rows, length)),
        "attention_mask": mask,
    }
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, (rows, length))
    return inputs


def _image(config: LionConfig, rows: int, down: int, across: int) -> dict[str, torch.Tensor]:
    size = config.patch_size
    return {"pixel_values": torch.randn(rows, config.num_channels, down * size, across * size)}


def _export(network: LionPreTrainedModel, file: Path) -> None:
    if network.config.modality == "text":
        write_onnx(network, _text(network.config, *EXAMPLE), TEXT_AXES, file)
    else:
        write_onnx(network, _image(network.config, 2, 2, 3), IMAGE_AXES, file)


def write_onnx(
    network: torch.nn.Module, inputs: dict[str, torch.Tensor], axes: dict[int, str], file: Path
) -> None:
    """Writes a model of transformers in evaluation as an ONNX file.

    Args:
        network: the model.
        inputs: an example of its inputs, without an axis of size 1.
        axes: the axes of every input that may have any size, with their names.
        file: the file. Weights of more than 2 GB are written beside it.
    """
    unnamed = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)  # torch warns of a name given twice
    first, *rest = inputs
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            network,
            (),
            kwargs=inputs,
            output_names=list(network(**inputs)),
            dynamic_shapes={first: axes, **dict.fromkeys(rest, unnamed)},
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # so it is only without dynamo
        for node in program.model.graph.all_nodes():
            if "_gate_weight" in node.metadata_props.get(TRACED, ""):
                node.name = f"{node.name}{GATE}"
            node.metadata_props.clear()  # it holds paths of this machine
        program.save(file)


def _checked(network: LionPreTrainedModel, folder: Path, name: str) -> OnnxFile:
    """A file, after it has been run beside torch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    config, difference = network.config, 0.0
    text = config.modality == "text"
    for batch in TEXTS if text else IMAGES:
        inputs = _text(config, *batch) if text else _image(config, *batch)
        found = session.run(None, {x.name: inputs[x.name].numpy() for x in session.get_inputs()})
        for x, expected in zip(found, network(**inputs).values()):
            x = torch.from_numpy(x)
            if text and expected.shape[:2] == inputs["attention_mask"].shape:  # one per token
                real = inputs["attention_mask"].bool()
                x, expected = x[real], expected[real]
            error = (x - expected).abs().max() / expected.abs().max()
            difference = max(difference, float(error)) if error.isfinite() else float("nan")
            if difference != difference:
                return OnnxFile(name, megabytes(folder / name), difference)
    return OnnxFile(name, megabytes(folder / name), difference)


def megabytes(file: Path) -> float:
    """The size of a model with its external data."""
    return sum(x.stat().st_size for x in file.parent.glob(f"{file.name}*")) / MEGABYTE


def quantize(file: Path, quantized: Path) -> None:
    """Weights as integers of 8 bits, but for the gates; activations are rounded as they come.

    Seven bits are used, because the products of eight overflow on CPUs without VNNI.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    names = [node.name for node in onnx.load(file, load_external_data=False).graph.node]
    with _quiet():
        quantize_dynamic(
            file,
            quantized,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            nodes_to_exclude=[name for name in names if name.endswith(GATE)],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=file.with_name(f"{file.name}.data").exists(),
        )


def _copy_settings(source: Path, output: Path) -> None:
    """Copies configuration, tokenizer or image processor, and the code of a folder for the Hub."""
    names = ["config.json", *WORD_FILES, *SETTINGS_FILES, *(x.name for x in source.glob("*.py"))]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
