"""Whole models on the fused kernels.

They are interpreted; with `-m gpu`, every head runs on a GPU, compiled, checkpointed.
"""

from functools import partial

import pytest
import torch
from support.models import (
    IMAGE_FAMILIES,
    IMAGE_HEADS,
    TEXT_HEADS,
    image_config,
    inputs_of,
    model,
    text_config,
)

from lion_hf import lion_attention
from lion_hf.modeling import lion_layers
from lion_hf.modeling.configuration_lion import MASK_TYPES

lion_triton = pytest.importorskip("lion_hf.modeling.lion_triton")
CONFIGS = {
    **{f"text {m}": partial(text_config, m) for m in MASK_TYPES},
    **{
        f"image {m} {o}": partial(image_config, m, o)
        for m, o in IMAGE_FAMILIES
        if (m, o) != ("lit", "snake")
    },
}
HEADS = {"text": ("Model", *TEXT_HEADS), "image": ("Model", *IMAGE_HEADS)}


def padded(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, ..., 6:] = 0
    return inputs


def results(network, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output on real tokens, and every parameter's gradient, on the CPU."""
    output = network(**inputs)
    output = (
        output.last_hidden_state
        if "last_hidden_state" in output
        else output[1 if "loss" in output else 0]
    )
    mask = inputs.get("attention_mask")
    if mask is not None and output.shape[:2] == mask.shape:
        output = output * mask.view(*mask.shape, *[1] * (output.dim() - 2))
    network.zero_grad()
    output.float().square().sum().backward()
    found = {name: p.grad.cpu() for name, p in network.named_parameters() if p.grad is not None}
    return {"output": output.detach().cpu(), **found}


def compare(found: dict, expected: dict, tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        error, largest = (found[name].float() - x.float()).abs().max(), x.abs().max()
        assert error <= tolerance * max(largest, 1e-3), (
            f"{name}: error {error:.3g} of entries up to {largest:.3g}"
        )


def on_kernels(network, monkeypatch, device: str):
    monkeypatch.setattr(lion_layers, "lion_attention", partial(lion_attention, backend="triton"))
    return network.to(device)


@pytest.mark.parametrize(
    "kind, attention_form",
    [("text selective", "chunk"), ("image lit raster", "auto"), ("image decay snake", "auto")],
)
def test_models(kind, attention_form, device, monkeypatch):
    """Logits and every gradient are those of the torch forms on the CPU.

    With padding or patch orders.
    """
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    head = "SequenceClassification" if kind.startswith("text") else "ImageClassification"
    network = model(
        head, CONFIGS[kind](attention_form=attention_form, chunk_size=8, num_hidden_layers=1)
    )
    inputs = padded(inputs_of(head, network.config))
    expected = results(network, inputs)
    on_kernels(network, monkeypatch, device)
    compare(results(network, {name: x.to(device) for name, x in inputs.items()}), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, head", [(kind, head) for kind in CONFIGS for head in HEADS[kind.split()[0]]]
)
def test_every_head_on_a_gpu(kind, head, monkeypatch):
    network = model(head, CONFIGS[kind]())
    inputs = padded(inputs_of(head, network.config))
    expected = results(network, inputs)
    on_kernels(network, monkeypatch, "cuda")
    compare(results(network, {name: x.cuda() for name, x in inputs.items()}), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ("compiled", "checkpointed"))
@pytest.mark.parametrize("kind", CONFIGS)
def test_training_on_a_gpu(kind, how, monkeypatch):
    """A step under autocast, as Trainer takes it, chooses the kernels by itself.

    Compiled or checkpointed it gives the same.
    """
    head = "MaskedLM" if kind.startswith("text") else "ImageClassification"
    dropout = 0.1 if how == "checkpointed" else 0.0  # what is computed again must drop the same
    options = {
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "chunk_size": None,
    }
    network = model(head, CONFIGS[kind](**options)).cuda().train()
    inputs = {name: x.cuda() for name, x in padded(inputs_of(head, network.config)).items()}
    found, calls, kernels = [], [], lion_triton.fused_forward
    with monkeypatch.context() as patch:
        patch.setattr(lion_triton, "fused_forward", lambda *args: calls.append(1) or kernels(*args))
        network(**inputs)
    assert len(calls) == network.config.num_hidden_layers
    for changed in (False, True):
        run = network
        if changed and how == "compiled":
            run = torch.compile(network, fullgraph=True)
        elif changed:
            network.gradient_checkpointing_enable()
        network.zero_grad()
        torch.manual_seed(2)
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(**inputs).loss
        loss.backward()
        found.append(
            {"loss": loss.detach().cpu()} | {n: p.grad.cpu() for n, p in network.named_parameters()}
        )
    compare(found[1], found[0], tolerance=0.05 if how == "compiled" else 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind.startswith("image")])
def test_the_host_never_waits_for_the_gpu(kind):
    """Neither for orders nor for checks."""
    network = model("ImageClassification", CONFIGS[kind]()).cuda().train()
    inputs = {
        name: x.cuda() for name, x in inputs_of("ImageClassification", network.config).items()
    }
    network(**inputs).loss.backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        network(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_padded_batch_in_a_cuda_graph(kind):
    """While it is captured nobody looks at the mask, and padding stays."""
    network = model("Model", CONFIGS[kind]()).cuda()
    inputs = {name: x.cuda() for name, x in padded(inputs_of("Model", network.config)).items()}
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    network.config.attention_form = "chunk"  # as while it is captured; this compiles the kernels
    with torch.no_grad():
        expected = network(**inputs).last_hidden_state[real]
        network.config.attention_form = "auto"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = network(**inputs).last_hidden_state
        output.zero_()
        graph.replay()
    torch.testing.assert_close(output[real], expected)
