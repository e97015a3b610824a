"""Images of different sizes in one row: each gets what it gets alone."""

import pytest
import torch
from accelerate import cpu_offload
from support.models import image_config, model
from torch import nn
from torch.nn.utils import prune

from lion_hf.modeling import lion_torch
from lion_hf.modeling.configuration_lion import (
    CLASSIFIER_POOLINGS,
    CONV_PLACEMENTS,
    FORMS,
    MASK_TYPES,
    PATCH_ORDERS,
)
from lion_hf.modeling.lion_convolution import Grid, LionConvolution, packed_layout
from lion_hf.modeling.lion_layers import drop_path
from lion_hf.modeling.lion_orders import packed_orders, snake_orders

# Rows and columns of patches: one patch, strips, the grid of training, one shape twice.
SHAPES = [(3, 4), (1, 7), (1, 1), (4, 4), (5, 1), (3, 4)]
# More tokens than a chunk, so that the operation lays the images out as rows.
MANY = [*SHAPES, (9, 9), (12, 10), (8, 11), (17, 17)]
HALF = {torch.bfloat16: 0.05, torch.float16: 0.05 / 8}


def pictures(shapes=SHAPES, size: int = 4, dtype=torch.float64) -> list[torch.Tensor]:
    """Random images (3, height, width) of these numbers of patches."""
    return [torch.randn(3, rows * size, columns * size, dtype=dtype) for rows, columns in shapes]


def packed(images: list[torch.Tensor], size: int = 4) -> dict[str, torch.Tensor]:
    """The patches of images, each with the channels of a pixel side by side, and their shapes."""
    patches = [
        image[:, top : top + size, left : left + size].permute(1, 2, 0).flatten()
        for image in images
        for top in range(0, image.shape[1], size)
        for left in range(0, image.shape[2], size)
    ]
    shapes = [[side // size for side in image.shape[1:]] for image in images]
    return {"pixel_values": torch.stack(patches), "spatial_shapes": torch.tensor(shapes)}


def classifier(mask_type: str = "selective", patch_order: str = "snake", **fields) -> nn.Module:
    """In float64, with positions, gates and convolutions that are far from their start."""
    network = model("ImageClassification", image_config(mask_type, patch_order, **fields)).double()
    for name, parameter in network.named_parameters():
        if "_conv" in name or "gate" in name or "position" in name:
            nn.init.normal_(parameter, std=0.5)
    return network


def alone(network: nn.Module, images: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([network(image[None]).logits for image in images])


@pytest.mark.parametrize("pooling", CLASSIFIER_POOLINGS)
@pytest.mark.parametrize("placement", [None, *CONV_PLACEMENTS])
@pytest.mark.parametrize("patch_order", PATCH_ORDERS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_images_in_one_row_get_what_each_gets_alone(mask_type, patch_order, placement, pooling):
    fields = {"classifier_pooling": pooling}
    if placement is not None:
        fields |= {"conv_kernel_size": 3, "conv_placement": placement}
    network, images = classifier(mask_type, patch_order, **fields), pictures()
    expected = alone(network, images).detach()
    assert (
        expected[0] - expected[-1]
    ).abs().max() > 1e-3  # of equal shape, and not of equal pixels
    for form in FORMS:
        network.config.attention_form = form
        logits = network(**packed(images)).logits
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pooling", CLASSIFIER_POOLINGS)
@pytest.mark.parametrize("patch_order", PATCH_ORDERS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_more_images_than_fit_into_a_chunk(mask_type, patch_order, pooling, monkeypatch):
    laid_out, run = [], lion_torch.run_documents
    monkeypatch.setattr(lion_torch, "run_documents", lambda *x: laid_out.append(x) or run(*x))
    fields = {"conv_kernel_size": 3, "classifier_pooling": pooling}
    network, images = classifier(mask_type, patch_order, **fields), pictures(MANY)
    expected = alone(network, images).detach()
    assert not laid_out
    logits = network(**packed(images)).logits
    assert len(laid_out) == network.config.num_hidden_layers
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("placement", CONV_PLACEMENTS)
@pytest.mark.parametrize("patch_order", PATCH_ORDERS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("shapes", (SHAPES, MANY), ids=("few", "many"))
def test_gradients_are_the_sum_of_those_of_each_image(shapes, mask_type, patch_order, placement):
    fields = {"conv_kernel_size": 3, "conv_placement": placement, "classifier_pooling": "mean"}
    network = classifier(mask_type, patch_order, **fields)
    images, labels = pictures(shapes), torch.arange(len(shapes)) % 3
    inputs = packed(images)
    inputs["pixel_values"].requires_grad_()
    network(**inputs, labels=labels, num_items_in_batch=1).loss.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    for image, label in zip(images, labels):
        image.requires_grad_()
        network(image[None], label[None], num_items_in_batch=1).loss.backward()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in network.named_parameters():
        rounding = 1e-7 if "position" in name else 1e-11  # they are interpolated in float32
        error = (gradients[name] - parameter.grad).abs().max()
        assert error < rounding * largest, name
    pixels = packed([image.grad for image in images])["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"].grad, pixels, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype):
    network, images = classifier(conv_kernel_size=3), pictures()
    expected = alone(network, images).detach()
    logits = network.to(dtype)(**packed([x.to(dtype) for x in images])).logits.double()
    assert (logits - expected).norm() < HALF[dtype] * expected.norm()


def test_distillation_head_and_hidden_states_of_each_image():
    network = classifier(distillation_head=True, classifier_pooling="mean")
    images = pictures()
    together, one = network(**packed(images)), [network(image[None]) for image in images]
    for name in ("logits", "distillation_logits"):
        expected = torch.cat([output[name] for output in one])
        torch.testing.assert_close(together[name], expected, rtol=1e-10, atol=1e-10)
    states = network.lion(**packed(images)).last_hidden_state
    expected = torch.cat([network.lion(pixel_values=x[None]).last_hidden_state for x in images], 1)
    torch.testing.assert_close(states, expected, rtol=1e-10, atol=1e-10)


def test_no_image_reaches_another():
    network, images = classifier(conv_kernel_size=3), pictures()
    before = network(**packed(images)).logits
    images[2] = 100 * torch.ones_like(images[2])
    changed = (network(**packed(images)).logits - before).abs().amax(1) > 1e-12  # beyond rounding
    assert changed.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("pooling", CLASSIFIER_POOLINGS)
def test_an_image_that_is_not_finite_spoils_its_own_answer_alone(pooling):
    network, images = classifier(classifier_pooling=pooling), pictures()
    expected = alone(network, images)
    images[1][0, 2, 3] = torch.nan
    logits = network(**packed(images)).logits
    assert logits[1].isnan().all()
    keep = [0, 2, 3, 4, 5]
    torch.testing.assert_close(logits[keep], expected[keep], rtol=1e-10, atol=1e-10)


def test_a_replaced_patch_embedding_is_used():
    class Adapted(nn.Module):  # as adapters wrap a layer
        def __init__(self, base: nn.Conv2d):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(pixels)

    network, images = classifier(), pictures()
    embeddings = network.lion.embeddings
    embeddings.patch_embeddings = Adapted(embeddings.patch_embeddings)
    expected = alone(network, images)
    torch.testing.assert_close(network(**packed(images)).logits, expected, rtol=1e-10, atol=1e-10)


def test_hooks_of_the_patch_embedding_run():
    """Those of pruning, of offloading and of users."""
    network, images = classifier(), pictures()
    module = network.lion.embeddings.patch_embeddings
    prune.l1_unstructured(module, "weight", 0.5)
    with torch.no_grad():
        module.weight_orig.mul_(2)  # the weight follows when the module is called
    given = network(**packed(images)).logits
    torch.testing.assert_close(given, alone(network, images), rtol=1e-10, atol=1e-10)
    network = classifier()
    given = network(**packed(images)).logits
    cpu_offload(network, execution_device="cpu")
    torch.testing.assert_close(network(**packed(images)).logits, given, rtol=1e-10, atol=1e-10)


def test_pixels_beyond_the_range_of_the_weights_spoil_their_own_answer_alone():
    network, images = classifier().half(), pictures(dtype=torch.float32)
    images[1][0, 2, 3] = 1e5
    finite = network(**packed(images)).logits.isfinite().all(1)
    assert finite.tolist() == [True, False, True, True, True, True]


def test_the_curves_of_packed_images_stand_one_behind_the_other():
    order = packed_orders(image_config(patch_order="snake"), [(2, 3), (1, 1), (2, 3)])
    first = snake_orders(2, 3)
    assert order.tolist() == torch.cat([first, snake_orders(1, 1) + 7, first + 9], 1).tolist()
    assert packed_orders(image_config(patch_order="raster"), [(2, 3)]) is None


@pytest.mark.parametrize("width", [1, 3, 5])
def test_convolution_of_packed_images(width):
    convolution = LionConvolution(image_config(conv_kernel_size=width)).double()
    nn.init.normal_(convolution.weight)
    x = torch.randn(1, sum(1 + r * c for r, c in SHAPES), 24, dtype=torch.float64)
    parts = x.split([1 + rows * columns for rows, columns in SHAPES], dim=1)
    expected = [convolution(part, Grid(*shape)) for part, shape in zip(parts, SHAPES)]
    output = convolution(x, packed_layout(width, SHAPES))
    torch.testing.assert_close(output, torch.cat(expected, 1), rtol=1e-12, atol=1e-12)


def test_stochastic_depth_drops_whole_images():
    seq_idx = torch.arange(400).repeat_interleave(3)[None]
    dropped = drop_path(torch.ones(1, 1200, 2), 0.3, True, seq_idx).view(400, 6)
    kept = dropped.unique(dim=1)
    assert kept.shape == (400, 1)  # all of an image, or nothing
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert 0.2 < (kept == 0).float().mean() < 0.4


def test_training_with_checkpointed_gradients():
    network = classifier(conv_kernel_size=3, drop_path_rate=0.0).train()
    inputs = packed(pictures())
    network(**inputs, labels=torch.zeros(6, dtype=torch.long)).loss.backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    network.gradient_checkpointing_enable()
    network(**inputs, labels=torch.zeros(6, dtype=torch.long)).loss.backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spatial_shapes": torch.tensor([[1, 2], [0, 3]])}, "spatial_shapes has 0: expected"),
        ({"spatial_shapes": torch.tensor([[1, 2], [1, 3]])}, "of 5 patches with pixel_values of 6"),
        (
            {"spatial_shapes": torch.tensor([2, 3])},
            r"spatial_shapes \(2,\): expected \(images, 2\)",
        ),
        ({"spatial_shapes": torch.zeros(0, 2).long()}, r"spatial_shapes \(0, 2\): expected"),
        ({"spatial_shapes": torch.tensor([[1.0, 6.0]])}, "expected integers"),
        ({"spatial_shapes": [[1, 6]]}, "spatial_shapes is list: expected a tensor"),
        ({"pixel_values": torch.zeros(6, 47)}, r"\(patches, 48\)"),
        ({"pixel_values": torch.zeros(6, 48).long()}, "expected real numbers"),
        ({"pixel_values": torch.zeros(1, 3, 8, 12)}, r"\(1, 3, 8, 12\) .* with spatial_shapes"),
        ({"spatial_shapes": None}, "or patches with spatial_shapes"),
        ({"bool_masked_pos": torch.ones(1, 6)}, "bool_masked_pos with spatial_shapes"),
    ],
)
def test_what_does_not_fit(change, message):
    inputs = {"pixel_values": torch.zeros(6, 48), "spatial_shapes": torch.tensor([[2, 3]])}
    network = model("ImageClassification", image_config())
    network(**inputs)
    with pytest.raises(ValueError, match=message):
        network(**{**inputs, **change})
