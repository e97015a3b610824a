"""LION in timm's registry: equal to transformers' classes, and usable by timm's own scripts."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from support.models import IMAGE_FAMILIES, SIZES
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from lion_hf import LionForImageClassification
from lion_hf.timm_models import GLOBAL_POOLS, LION_FIELDS

SMALL = {**SIZES, "img_size": (8, 12), "patch_size": 4, "num_classes": 5, "drop_path_rate": 0.0}


def create(name: str = "lion_tiny_patch16_224", **kwargs):
    torch.manual_seed(1)
    return timm.create_model(name, **(SMALL | kwargs)).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 8, 12)


@pytest.mark.parametrize(
    "size, width, heads", [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)]
)
def test_registered_sizes(size, width, heads):
    with torch.device("meta"):
        model = timm.create_model(f"lion_{size}_patch16_224")
    assert (model.num_features, model.config.num_attention_heads, len(model.lion.layers)) == (
        width,
        heads,
        12,
    )
    assert (model.config.intermediate_size, model.num_classes, model.lion.embeddings.grid) == (
        4 * width,
        1000,
        (14, 14),
    )
    data = resolve_model_data_config(model)
    assert (data["input_size"], data["interpolation"], data["crop_pct"]) == (
        (3, 224, 224),
        "bicubic",
        0.875,
    )


@pytest.mark.slow
def test_import_of_lion_hf_registers():
    code = "import lion_hf, timm; assert 'lion_base_patch16_224' in timm.list_models('lion_*')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("mask_type, patch_order", IMAGE_FAMILIES)
@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_same_numbers_as_transformers(mask_type, patch_order, global_pool, pixels):
    model = create(mask_type=mask_type, patch_order=patch_order, global_pool=global_pool)
    ours = LionForImageClassification(model.config).eval()
    assert model.config.classifier_pooling == GLOBAL_POOLS[global_pool]
    assert not torch.equal(ours(pixels).logits, model(pixels))
    ours.load_state_dict(model.state_dict())  # all names are the same
    assert torch.equal(ours(pixels).logits, model(pixels))
    assert torch.equal(model.forward_head(model.forward_features(pixels)), model(pixels))


def test_to_transformers_and_back(tmp_path, pixels):
    model = create(mask_type="decay")
    shared = model.to_transformers()
    assert shared.classifier.weight is model.classifier.weight and not shared.training
    shared.save_pretrained(tmp_path)
    assert shared.config.architectures == ["LionForImageClassification"]
    loaded = LionForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels).logits, model(pixels))
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
    again = create(mask_type="decay", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(again(pixels), model(pixels))
    with pytest.raises(ValueError, match="num_classes=0"):
        create(num_classes=0).to_transformers()


def test_a_model_without_its_last_layers_is_saved_without_them(tmp_path, pixels):
    model = create(num_classes=5)
    model.prune_intermediate_layers([0], prune_head=False)
    model.to_transformers().save_pretrained(tmp_path)
    loaded = LionForImageClassification.from_pretrained(tmp_path)
    assert len(loaded.lion.layers) == 1 and torch.equal(loaded(pixels).logits, model(pixels))
    model.prune_intermediate_layers([0], prune_norm=True, prune_head=False)
    with pytest.raises(ValueError, match="the last norm was removed"):
        model.to_transformers()


def test_weights_of_another_image_size(tmp_path):
    small, file = create(img_size=8), tmp_path / "weights.pth"
    torch.save(small.state_dict(), file)
    large = create(
        img_size=16, pretrained=True, pretrained_cfg_overlay={"file": str(file), "num_classes": 5}
    )
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(large(image), small(image))  # which interpolates in every call
    small.set_input_size(16)
    assert (
        small.lion.embeddings.position_embeddings.shape[1] == 17 and small.config.image_size == 16
    )
    torch.testing.assert_close(large(image), small(image))
    with pytest.raises(ValueError, match="multiples of patch_size=4"):
        small.set_input_size((16, 18))


@pytest.mark.parametrize("mask_type, patch_order", IMAGE_FAMILIES)
def test_forward_intermediates(mask_type, patch_order, pixels):
    model = create(mask_type=mask_type, patch_order=patch_order, num_hidden_layers=3)
    states = model.lion(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
    final, layers = model.forward_intermediates(pixels)
    assert torch.equal(final, model.forward_features(pixels)) and len(layers) == len(states) == 3
    for layer, state in zip(layers, states):
        assert layer.shape == (2, 24, 2, 3)
        assert torch.equal(layer.flatten(2).mT, state[:, 1:])
    pairs = model.forward_intermediates(
        pixels,
        indices=[1],
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
        stop_early=True,
    )
    patches, prefix = pairs[0]
    assert (
        torch.equal(torch.cat([prefix, patches], dim=1), model.lion.norm(states[1]))
        and len(pairs) == 1
    )
    answer = model.forward_intermediates(
        pixels, indices=2, output_dict=True, return_prefix_tokens=True
    )
    assert answer.keys() == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    assert torch.equal(answer["image_intermediates"][1], layers[2])
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(pixels, output_fmt="NHWC")


def test_features_only(pixels):
    full = create(num_hidden_layers=4)
    features = create(num_hidden_layers=4, features_only=True, out_indices=(0, 2)).eval()
    assert features.feature_info.channels() == [24, 24] and features.feature_info.reduction() == [
        4,
        4,
    ]
    expected = full.forward_intermediates(pixels, intermediates_only=True)
    for got, index in zip(features(pixels), (0, 2)):
        assert torch.equal(got, expected[index])
    assert len(features.model.lion.layers) == 3  # those that nobody looks at are gone
    assert len(create(num_hidden_layers=4, features_only=True)(pixels)) == 3


def test_classifier(pixels):
    model = create()
    tokens = model.forward_features(pixels)
    assert model.get_classifier() is model.classifier
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens.mean(1))
    model.reset_classifier(7, "token")
    assert model(pixels).shape == (2, 7) and model.config.num_labels == 7
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert torch.equal(model.to_transformers()(pixels).logits, model(pixels))
    model.reset_classifier(0)
    assert torch.equal(model(pixels), tokens[:, 0])
    model.reset_classifier(0, "")
    assert torch.equal(model(pixels), tokens)
    assert create(num_classes=0)(pixels).shape == (2, 24)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_optimizer_groups(layer_decay):
    model = create(mask_type="selective", patch_order="snake")
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=layer_decay
    )
    group_of = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    decayed = {
        name
        for name, parameter in model.named_parameters()
        if group_of[id(parameter)]["weight_decay"] > 0
    }
    assert len(group_of) == len(list(model.parameters()))
    assert "lion.layers.0.attention.gate.weight" in decayed and "classifier.weight" in decayed
    assert not any(
        name.endswith((".bias", "cls_token", "position_embeddings")) or "norm" in name
        for name in decayed
    )
    if layer_decay:
        scale = {
            name: group_of[id(parameter)]["lr_scale"]
            for name, parameter in model.named_parameters()
        }
        names = (
            "lion.embeddings.cls_token",
            "lion.layers.0.mlp.fc1.weight",
            "lion.layers.1.mlp.fc1.weight",
            "lion.norm.weight",
        )
        assert [scale[name] for name in (*names, "classifier.weight")] == [
            0.125,
            0.25,
            0.5,
            0.5,
            1.0,
        ]


def test_training_step_as_in_timms_script(pixels):
    model = create(
        mask_type="selective", drop_rate=0.1, drop_path_rate=0.1, in_chans=3, scriptable=False
    ).train()
    average, labels = ModelEmaV3(model, decay=0.5), torch.tensor([0, 3])
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    torch.nn.functional.cross_entropy(model(pixels), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    average.update(model)
    name = "lion.layers.0.attention.gate.weight"
    torch.testing.assert_close(
        average.module.state_dict()[name], (before[name] + model.state_dict()[name]) / 2
    )


def test_gradient_checkpointing(pixels):
    model = create(mask_type="decay").train()
    gradients = []
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        assert model.is_gradient_checkpointing == enable
        model.zero_grad()
        model(pixels).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"mask_typ": "lit"}, "unknown argument mask_typ: expected one of"),
        ({"image_size": 8}, "unknown argument image_size: expected img_size"),
        ({"mask_type": "Lit"}, "mask_type='Lit'"),
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"drop_rate": 1.0}, "drop_rate=1.0"),
        ({"img_size": 9}, "multiples of patch_size=4"),
        ({"pretrained": True}, "No pretrained weights exist"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(kwargs, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        create(**kwargs)
    assert "mask_type" in LION_FIELDS and "num_labels" not in LION_FIELDS
