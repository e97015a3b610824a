"""Programs made of LION models, for any batch and length.

They are those of torch.export, ONNX on ONNX Runtime, AOTInductor and torch.compile.
"""

import importlib.util

import pytest
import torch
from support.models import image_config, model, text_config, token_ids
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import lion_hf
from lion_hf.modeling.lion_chunkwise import chunkwise
from lion_hf.modeling.lion_portable import PORTABLE_CHUNK_SIZE, chunks_at_once

DYNAMIC = torch.export.Dim.DYNAMIC
ANY_LENGTH = {0: DYNAMIC, 1: DYNAMIC}
ANY_IMAGE = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
LONG = 2 * PORTABLE_CHUNK_SIZE + 7  # three chunks
# batch, length, padding, its side
TEXTS = [
    (2, 9, 3, "right"),
    (3, 14, 4, "left"),
    (1, 1, 0, "right"),
    (2, PORTABLE_CHUNK_SIZE, 0, "left"),
    (4, LONG, 70, "left"),
]
EMPTY = (1, 2, 0, "right")  # [CLS] [SEP]
IMAGES = [
    (2, 24, 32),
    (3, 16, 16),
    (1, 4, 8),
    (1, 36, 64),
]  # 16 is the size of training, 36 x 64 makes 145 tokens
HAS_EXPORTERS = importlib.util.find_spec("transformers.exporters") is not None


def text(batch: int, length: int, padding: int, side: str) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, slice(length - padding, None) if side == "right" else slice(padding)] = 0
    return {"input_ids": token_ids(batch, length), "attention_mask": mask}


def text_model(head: str, mask_type: str, form: str, **kwargs):
    options = {"num_hidden_layers": 1, "max_position_embeddings": 256, "chunk_size": None} | kwargs
    return model(head, text_config(mask_type, attention_form=form, **options))


def all_close(found, network, inputs) -> None:
    """Compares logits where there are tokens.

    Also checks that the expected ones are not all alike.
    """
    with torch.no_grad():
        expected = network(**inputs).logits
    found = torch.as_tensor(found)
    if expected.dim() == 3:
        real = inputs["attention_mask"].bool()
        found, expected = found[real], expected[real]
    assert found.shape == expected.shape and expected.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def onnx_session(network, inputs, axes, path):
    """An inference session of ONNX Runtime on the network's file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(
        network, (), kwargs=inputs, dynamic_shapes=dict.fromkeys(inputs, axes), dynamo=True
    )
    program.save(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def export_portably(network, inputs, axes, strict=False):
    with lion_hf.portable_export():
        return torch.export.export(
            network, (), inputs, dynamic_shapes=dict.fromkeys(inputs, axes), strict=strict
        )


def operators(program) -> set[str]:
    """Names of all operators.

    They include those inside of regions with a setting of their own (no autocast).
    """
    graphs = [
        module.graph
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
    ]
    return {
        str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"
    }


def run(session, inputs):
    return session.run(None, {x.name: inputs[x.name].numpy() for x in session.get_inputs()})[0]


# ---- the chunk form without a loop ----


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 64])
@pytest.mark.parametrize("decays", [(2, 3, None), (1, 3, 1), (1, 1, None)], ids=str)
def test_chunks_at_once_are_the_chunk_form(length, chunk_size, decays):
    query, key = torch.randn(2, 2, 3, length, 5, dtype=torch.float64).requires_grad_().unbind()
    value = torch.randn(2, 3, length, 4, dtype=torch.float64)
    shape = [length if n is None else n for n in decays]
    forward = F.logsigmoid(3 * torch.randn(shape, dtype=torch.float64)).detach().requires_grad_()
    backward = (
        forward if decays[-1] == 1 else F.logsigmoid(3 * torch.randn(shape, dtype=torch.float64))
    )
    with torch.no_grad():
        forward[..., shape[-1] // 2] = -800.0  # a cut edge
    results = []
    for function in (chunkwise, chunks_at_once):
        output = function(query, key, value, forward, backward, 0.5, chunk_size)
        (gradient,) = torch.autograd.grad(output.square().sum(), forward)
        results.append(
            (output, gradient[..., :-1] if length > 1 and decays[-1] is None else gradient)
        )
    torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("gate", [1e-30, 0.5, 1 - 1e-7])
def test_chunks_at_once_keep_float32_exact(gate):
    """Small gates ahead do not spoil the large ones behind, as in the chunk form itself."""
    query, key, value = torch.randn(3, 1, 2, 300, 8)
    gates = torch.full((1, 2, 300), 0.99)
    gates[..., ::7] = gate
    logs = gates.log()
    found, exact = (
        chunks_at_once(*(x.to(t) for x in (query, key, value, logs, logs)), 0.3, None)
        for t in (torch.float32, torch.float64)
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-4)


# ---- torch.export ----


@pytest.mark.parametrize(
    "mask_type, form, strict",
    [
        ("lit", "auto", False),
        ("decay", "chunk", True),
        ("selective", "attention", False),
        ("selective", "auto", False),
        ("selective", "auto", True),
    ],
)
def test_portable_programs_need_no_operators_of_ours(mask_type, form, strict):
    """And serve one chunk or several, whatever the example had."""
    network = text_model("MaskedLM", mask_type, form)
    program = export_portably(network, text(*TEXTS[0]), ANY_LENGTH, strict)
    assert len(operators(program)) > 10 and not any(
        "lion_hf" in name for name in operators(program)
    )
    plain = torch.export.export(
        network, (), text(*TEXTS[0]), dynamic_shapes=dict.fromkeys(text(*TEXTS[0]), ANY_LENGTH)
    )
    ours = any("lion_hf" in name for name in operators(plain))
    assert ours == (mask_type != "lit" and form != "attention"), (
        "outside of portable_export the operator stays"
    )
    run_program = program.module()
    for shape in (TEXTS[1], TEXTS[3], TEXTS[4], EMPTY):
        inputs = text(*shape)
        with torch.no_grad():
            all_close(run_program(**inputs).logits, network, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, strict",
    [((24, 32), True), ((16, 16), False)],
    ids=["another size, strict", "the size of training"],
)
def test_portable_snake_serves_any_image_size(size, strict):
    """Whether or not the example had the size that the position embeddings were trained with."""
    config = image_config(
        "selective", "snake", num_hidden_layers=1, chunk_size=None, use_position_embeddings=True
    )
    network = model("ImageClassification", config)
    example = {"pixel_values": torch.randn(2, 3, *size)}
    program = export_portably(network, example, ANY_IMAGE, strict).module()
    for batch, height, width in ((2, 20, 12), (1, 16, 16), (2, 16, 32), (2, 64, 80)):
        pixels = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(
            program(pixel_values=pixels).logits, network(pixels).logits, atol=1e-5, rtol=1e-5
        )


# ---- ONNX ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "head, mask_type, form",
    [
        ("MaskedLM", "lit", "auto"),
        ("MaskedLM", "selective", "auto"),
        ("SequenceClassification", "decay", "chunk"),
    ],
)
def test_onnx_of_texts(head, mask_type, form, tmp_path):
    """One file serves all batch sizes, lengths and paddings."""
    network = text_model(head, mask_type, form)
    session = onnx_session(network, text(*TEXTS[0]), ANY_LENGTH, tmp_path / "model.onnx")
    for shape in TEXTS:
        inputs = text(*shape)
        all_close(run(session, inputs), network, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask_type, patch_order, form",
    [("decay", "snake", "attention"), ("selective", "snake", "chunk")],
)
def test_onnx_of_images(mask_type, patch_order, form, tmp_path):
    """One file serves all batch and image sizes."""
    config = image_config(
        mask_type,
        patch_order,
        attention_form=form,
        num_hidden_layers=1,
        chunk_size=None,
        initializer_range=0.5,
    )
    network = model("ImageClassification", config)
    batch, height, width = IMAGES[0]
    example = {"pixel_values": torch.randn(batch, 3, height, width)}
    session = onnx_session(network, example, ANY_IMAGE, tmp_path / "model.onnx")
    for batch, height, width in IMAGES:
        inputs = {"pixel_values": torch.randn(batch, 3, height, width)}
        all_close(run(session, inputs), network, inputs)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EXPORTERS, reason="this transformers has no exporters")
def test_the_onnx_exporter_of_transformers(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    network, example = text_model("SequenceClassification", "selective", "auto"), text(*TEXTS[0])
    config = OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(example, ANY_LENGTH))
    with lion_hf.portable_export():
        OnnxExporter().export(network, example, config=config).save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for shape in (TEXTS[1], TEXTS[4]):
        inputs = text(*shape)
        all_close(run(session, inputs), network, inputs)


# ---- compiled programs ----


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    """A package of machine code serves rows of one chunk and of several.

    It checks no shapes.
    """
    network, example = text_model("SequenceClassification", "selective", "chunk"), text(*TEXTS[0])
    program = export_portably(network, example, ANY_LENGTH)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    compiled = torch._inductor.aoti_load_package(package)
    for shape in TEXTS:
        inputs = text(*shape)
        all_close(compiled(**inputs).logits, network, inputs)


@pytest.mark.slow
def test_compiled_once_for_all_lengths():
    """A whole model is compiled once.

    Only a batch or a length of one is compiled anew, as torch.compile does for any model.
    """
    torch._dynamo.reset()
    network, counter = (
        text_model("MaskedLM", "selective", "auto"),
        CompileCounterWithBackend("aot_eager"),
    )
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    with torch.no_grad():
        for shape in (TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[4], (1, 30, 5, "right")):
            inputs = text(*shape)
            all_close(compiled(**inputs).logits, network, inputs)
            counts.append(counter.frame_count)
    assert counts[0] == counts[1] == counts[2] == counts[3] > 0
    assert counts[4] == counts[3] + 1
