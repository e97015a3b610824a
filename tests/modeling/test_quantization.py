"""Integer weights by torchao and torch: a classifier keeps its answers, gates stay in float."""

import copy

import pytest
import torch
from support.models import image_config, inputs_of, model, text_config

from lion_hf import LionForImageClassification, LionForSequenceClassification
from lion_hf.modeling.lion_layers import LionGate

torchao = pytest.importorskip("torchao.quantization")
datasets = pytest.importorskip("sklearn.datasets")

FAMILIES = [("lit", "raster"), ("decay", "snake"), ("selective", "snake")]
CONFIGS = {
    "weights": torchao.Int8WeightOnlyConfig,
    "activations too": torchao.Int8DynamicActivationInt8WeightConfig,
}


def leaves_gates(module: torch.nn.Module, name: str) -> bool:
    """For `quantize_`, which knows nothing of what a model wants kept."""
    return isinstance(module, torch.nn.Linear) and not isinstance(module, LionGate)


def linears(network) -> dict[str, torch.nn.Module]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def is_float(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.nn.Parameter


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def trained(request):
    """A trained classifier of digits, with 497 held-out images and its logits for them."""
    torch.manual_seed(0)
    digits = datasets.load_digits()
    pixels, labels = (
        torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1,
        torch.tensor(digits.target),
    )
    shuffled = torch.randperm(len(pixels))
    train, held_out = shuffled[:1300], shuffled[1300:]
    sizes = {
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
    }
    options = {"intermediate_size": 64, "num_labels": 10, "drop_path_rate": 0.0, "chunk_size": None}
    network = model("ImageClassification", image_config(*request.param, **sizes, **options)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(6):
        for rows in train[torch.randperm(len(train))].split(64):
            network(pixels[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    network.eval()
    with torch.no_grad():
        logits = network(pixels[held_out]).logits
    assert (logits.argmax(1) == labels[held_out]).float().mean() > 0.85, (
        "a model that knows nothing cannot lose anything"
    )
    return network, pixels[held_out], labels[held_out], logits


def agrees(quantised, trained) -> None:
    """Accuracy within 1 %, nearly all answers the same, but not the very same numbers."""
    _, pixels, labels, expected = trained
    with torch.no_grad():
        logits = quantised(pixels).logits
    assert not torch.equal(logits, expected)
    accuracy, before = ((x.argmax(1) == labels).float().mean() for x in (logits, expected))
    assert abs(accuracy - before) <= 0.01
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_torchao_keeps_the_accuracy(trained, kind, tmp_path):
    network = copy.deepcopy(trained[0])
    torchao.quantize_(network, CONFIGS[kind](), filter_fn=leaves_gates)
    assert {is_float(x.weight) for x in linears(network).values() if isinstance(x, LionGate)} <= {
        True
    }
    assert not any(
        is_float(x.weight) for x in linears(network).values() if not isinstance(x, LionGate)
    )
    agrees(network, trained)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_pretrained_quantises_and_saves(trained, dtype, tmp_path):
    from transformers import TorchAoConfig

    trained[0].save_pretrained(tmp_path / "float")
    options = {"quantization_config": TorchAoConfig(torchao.Int8WeightOnlyConfig()), "dtype": dtype}
    network = LionForImageClassification.from_pretrained(tmp_path / "float", **options)
    assert not is_float(network.lion.layers[0].mlp.fc1.weight)
    agrees(network, trained)
    network.save_pretrained(tmp_path / "int8")
    again = LionForImageClassification.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(again(trained[1]).logits, network(trained[1]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kept", [None, ["classifier"]], ids=str)
def test_gates_stay_float_when_transformers_quantises(dtype, kept, tmp_path):
    """Without being asked to, also where the user names other modules to keep."""
    from transformers import TorchAoConfig

    original = model("SequenceClassification", text_config("selective"))
    original.save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    network = LionForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=config, dtype=dtype
    )
    for name, module in linears(network).items():
        floats = name.endswith("gate") or (kept is not None and name in kept)
        assert floats or not is_float(module.weight) or (kept is None and name == "classifier"), (
            name
        )
        if name.endswith("gate"):
            assert (
                is_float(module.weight)
                and module.weight.dtype == module.bias.dtype == torch.float32
            )
            assert torch.equal(module.weight, original.get_submodule(name).weight)
    inputs = inputs_of("SequenceClassification", original.config)
    with torch.no_grad():
        found, expected = network(**inputs).logits.float(), original(**inputs).logits
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_of_torch(trained):
    """Replaces exact `nn.Linear`s only, which gates are not."""
    quantization = pytest.importorskip("torch.ao.quantization")
    if not hasattr(quantization, "quantize_dynamic"):
        pytest.skip("this torch has no dynamic quantisation any more")
    network = quantization.quantize_dynamic(
        copy.deepcopy(trained[0]), {torch.nn.Linear}, dtype=torch.qint8
    )
    assert all(isinstance(module, LionGate) for module in linears(network).values())
    agrees(network, trained)
