"""The modern block: exact in every form, with padding and packing anywhere, off by default."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.models import TEXT_HEADS, image_config, inputs_of, model, text_config, token_ids
from torch.nn import functional as F

import lion_hf
from lion_hf import LionConfig, LionForMaskedLM
from lion_hf.modeling import lion_convolution
from lion_hf.modeling.configuration_lion import (
    CONV_PLACEMENTS,
    FORMS,
    MASK_TYPES,
    PATCH_ORDERS,
)
from lion_hf.modeling.lion_convolution import Grid, LionConvolution, convolution_layout
from lion_hf.presets import find_preset, preset_names
from lion_hf.training.trainer import LionTrainingArguments

MODERN = {
    "pre_norm": True,
    "conv_kernel_size": 5,
    "gated_mlp": True,
    "scale_output_init": True,
    "feature_map": "sqrt_softmax",
    "normalize_attention": True,
    "attention_norm": True,
    "conv_placement": "inputs",
}
PADDINGS = {
    "left": [0] * 4 + [1] * 13,
    "right": [1] * 13 + [0] * 4,
    "inside": [1] * 3 + [0, 0] + [1] * 9 + [0] + [1] + [0],
    "one token between": [1, 0] * 8 + [1],
}


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """In float64, with convolutions that are far from the identity."""
    for name, parameter in network.double().named_parameters():
        if "_conv" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return network


def modern(
    head: str, mask_type: str = "selective", modality: str = "text", **fields
) -> torch.nn.Module:
    make = text_config if modality == "text" else image_config
    return randomise(model(head, make(mask_type, **{**MODERN, **fields})))


@pytest.fixture(params=["spaced", "neighbours"])
def way(request, monkeypatch) -> str:
    """Both ways of a convolution around padding: with a look at the mask, and without."""
    if request.param == "neighbours":
        monkeypatch.setattr(lion_convolution, "values_known", lambda *_: False)
    return request.param


def convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One document (T, C), token by token."""
    radius, output = weight.shape[-1] // 2, torch.zeros_like(x)
    for t in range(len(x)):
        for offset in range(-radius, radius + 1):
            if 0 <= t + offset < len(x):
                output[t] += x[t + offset] * weight[:, 0, 0, radius + offset]
    return output


@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_convolution_sees_neither_padding_nor_the_next_document(way, width, padding):
    convolution = LionConvolution(text_config(conv_kernel_size=width)).double()
    torch.nn.init.normal_(convolution.weight)
    mask = torch.tensor(PADDINGS[padding])
    seq_idx = torch.arange(17) // 6 % 2  # numbers that return
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    x[:, mask == 0] = float("nan")
    output = convolution(x, convolution_layout(width, (2, 17), mask.expand(2, -1), seq_idx[None]))
    assert_convolved(x, mask, convolution.weight, output, ((0, 6), (6, 12), (12, 17)))


@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_convolution_of_one_document_per_row(way, width, padding):
    """With padding that the rows do not share, and its gradients."""
    convolution = LionConvolution(text_config(conv_kernel_size=width)).double()
    torch.nn.init.normal_(convolution.weight)
    mask = torch.tensor(PADDINGS[padding])
    x = torch.randn(3, 17, 24, dtype=torch.float64)
    x[:, mask == 0] = float("nan")
    x[2, 5:], masks = float("nan"), mask.repeat(3, 1)
    masks[1:, 5:] = 0
    layout = convolution_layout(width, (3, 17), masks, None)
    output = convolution(x.requires_grad_(), layout)
    for row in range(3):
        assert_convolved(x[row : row + 1], masks[row], convolution.weight, output[row : row + 1])
    output.masked_fill(masks[..., None] == 0, 0).square().sum().backward()
    assert (x.grad[masks == 0] == 0).all() and x.grad[masks != 0].abs().min() > 0


def assert_convolved(x, mask, weight, output, documents=((0, 17),)) -> None:
    for row in range(len(x)):
        for first, last in documents:
            real = torch.arange(17)[first:last][mask[first:last] != 0]
            expected = convolved(x[row, real], weight)
            torch.testing.assert_close(output[row, real], expected, atol=1e-12, rtol=0)


def test_an_image_is_convolved_on_its_grid():
    convolution = LionConvolution(image_config(conv_kernel_size=3))
    torch.nn.init.normal_(convolution.weight)
    x = torch.randn(2, 1 + 3 * 5, 24)
    output = convolution(x, Grid(3, 5))
    planes = x[:, 1:].mT.reshape(2, 24, 3, 5)
    expected = F.conv2d(planes, convolution.weight, padding=1, groups=24).flatten(2).mT
    torch.testing.assert_close(output, torch.cat([x[:, :1], expected], dim=1))
    with pytest.raises(ValueError, match="conv_layout=None: expected the Grid"):
        convolution(x)


@pytest.mark.parametrize("placement", CONV_PLACEMENTS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_changes_nothing(way, placement, mask_type, form, padding):
    network = modern("Model", mask_type, conv_placement=placement)
    real = torch.tensor(PADDINGS[padding]) != 0
    ids = token_ids(1, int(real.sum()))
    padded = token_ids(2, len(real))
    padded[:, real] = ids
    network.config.attention_form = form
    expected = network(ids).last_hidden_state
    output = network(padded, attention_mask=real.long().expand(2, -1)).last_hidden_state[:, real]
    torch.testing.assert_close(output, expected.expand_as(output), atol=1e-10, rtol=0)


@pytest.mark.parametrize("placement", CONV_PLACEMENTS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_packing_changes_nothing_and_no_gradient(way, placement, mask_type, form):
    network = modern("MaskedLM", mask_type, conv_placement=placement)
    documents = [token_ids(1, n) for n in (5, 1, 9)]
    network.config.attention_form = form
    packed = torch.cat(documents, dim=1)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        network.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    alone = [network(ids).logits for ids in documents]
    weights = torch.randn_like(torch.cat(alone, dim=1))
    expected = gradients((torch.cat(alone, dim=1) * weights).sum())
    logits = network(packed, cu_seq_lens_q=torch.tensor([0, 5, 6, 15])).logits
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), atol=1e-10, rtol=0)
    for name, gradient in gradients((logits * weights).sum()).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-9, msg=name)
    assert all("_conv" not in name or gradient.any() for name, gradient in expected.items())


@pytest.mark.parametrize("placement", CONV_PLACEMENTS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("patch_order", PATCH_ORDERS)
def test_image_forms_agree(placement, mask_type, patch_order):
    fields = {"patch_order": patch_order, "conv_placement": placement}
    network = modern("ImageClassification", mask_type, "image", **fields)
    pixels, logits = torch.randn(2, 3, 16, 24, dtype=torch.float64), {}
    for form in FORMS:
        network.config.attention_form = form
        logits[form] = network(pixels).logits
    for form in FORMS:
        torch.testing.assert_close(logits[form], logits["recurrent"], atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "modality, head", [*(("text", h) for h in TEXT_HEADS), ("image", "ImageClassification")]
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(modality, head, reentrant):
    network = modern(head, modality=modality).float().train()
    inputs, found = inputs_of(head, network.config), []
    for checkpointing in (False, True):
        if checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": reentrant})
        network.zero_grad()
        torch.manual_seed(3)
        network(**inputs).loss.backward()
        found.append(
            {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiled_without_graph_breaks(form):
    network = modern("MaskedLM").float()
    network.config.attention_form = form
    ids, mask = token_ids(2, 17), torch.tensor([PADDINGS["inside"], PADDINGS["left"]])
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    logits = compiled(ids, attention_mask=mask).logits
    expected = network(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask != 0], expected[mask != 0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="programs are compiled by g++")
def test_trained_by_compiled_programs():
    """By torch's own code generator, which checks how tensors lie in memory."""
    network = modern("MaskedLM").float()
    inputs, found = inputs_of("MaskedLM", network.config), []
    for run in (network, torch.compile(network)):
        network.zero_grad()
        run(**inputs).loss.backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_exported_for_any_length():
    network = modern("MaskedLM").float()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = {"input_ids": token_ids(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    program = torch.export.export(
        network, (), example, dynamic_shapes=dict.fromkeys(example, dynamic)
    )
    inputs = {
        "input_ids": token_ids(3, 17),
        "attention_mask": torch.tensor([PADDINGS["inside"]] * 3),
    }
    found, expected = program.module()(**inputs).logits, network(**inputs).logits
    real = inputs["attention_mask"] != 0
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("modality, head", [("text", "MaskedLM"), ("image", "ImageClassification")])
def test_half_precision(dtype, modality, head):
    network = modern(head, modality=modality).float()
    inputs = {k: v for k, v in inputs_of(head, network.config).items() if k != "labels"}
    expected = network(**inputs).logits
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    logits = network.to(dtype)(**half).logits
    bound = 40 * torch.finfo(dtype).eps
    assert (logits.float() - expected).abs().max() < bound * expected.abs().max()


def test_saved_and_loaded_with_every_weight(tmp_path):
    network = modern("MaskedLM").float()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    network.save_pretrained(tmp_path)
    loaded = LionForMaskedLM.from_pretrained(tmp_path)
    for name, weight in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


REMOTE = """
import sys, torch
sys.modules["lion_hf"] = None
from transformers import AutoModelForMaskedLM
network = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(5, 22)[None]
torch.save(network(ids, attention_mask=(ids != 9).long()).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_remote_code_gives_the_same(tmp_path):
    network = modern("MaskedLM").float()
    lion_hf.save_for_hub(network, tmp_path / "model")
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "model"), str(tmp_path / "logits.pt")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    ids = torch.arange(5, 22)[None]
    expected = network(ids, attention_mask=(ids != 9).long()).logits
    real = ids[0] != 9
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt")[:, real], expected[:, real])


def test_untrained_weights():
    config = text_config(
        hidden_size=192, num_attention_heads=6, **{**MODERN, "initializer_range": 0.1}
    )
    network = lion_hf.LionModel(config)
    layer = network.layers[0]
    assert layer.attention.q_proj.weight.std().item() == pytest.approx(0.1, rel=0.05)
    for output in (layer.attention.o_proj, layer.mlp.fc2):  # two layers
        assert output.weight.std().item() == pytest.approx(0.05, rel=0.05)
    x = torch.randn(1, 7, 192)
    for convolution in (layer.attention_conv, layer.mlp_conv):
        assert torch.equal(convolution(x), x)
    assert layer.attention.q_conv is None
    network = lion_hf.LionModel(text_config(conv_kernel_size=3))
    assert torch.equal(network.layers[0].attention.q_conv(x[..., :24]), x[..., :24])
    assert network.layers[0].attention_conv is None


def test_the_papers_models_have_nothing_of_it():
    for make, head in ((text_config, "MaskedLM"), (image_config, "ImageClassification")):
        network = model(head, make())
        modern = ("_conv", "last_norm")
        assert not any(part in name for part in modern for name in network.state_dict())
        mlp = network.lion.layers[0].mlp
        assert mlp.fc1.out_features == mlp.fc2.in_features


def test_weight_decay_spares_gates_and_convolutions(tmp_path):
    network = modern("MaskedLM")
    trainer = lion_hf.LionTrainer(network, LionTrainingArguments(str(tmp_path), report_to="none"))
    decayed = trainer.get_decay_parameter_names(network)
    assert decayed and not any(
        part in name for part in ("gate", "_conv", "norm") for name in decayed
    )


@pytest.mark.parametrize("width", [0, 2, -3])
def test_kernels_have_a_middle(width):
    with pytest.raises(ValueError, match=f"conv_kernel_size={width}: expected None or an odd"):
        LionConfig(conv_kernel_size=width)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("modern-")])
def test_presets_are_of_the_modern_block(name):
    config = LionConfig.from_pretrained(find_preset(name))
    assert {k: getattr(config, k) for k in MODERN} == {**MODERN, "conv_kernel_size": 3}
    assert config.attention_probs_dropout_prob == 0 and config.hidden_dropout_prob == 0
    assert config.use_position_embeddings == (config.mask_type == "lit")
