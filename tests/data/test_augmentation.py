"""Augmentation, mixing, repeated sampling and distillation of images."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import noise
from support.models import image_config
from torch.nn import functional as F

from lion_hf import LionForImageClassification
from lion_hf.auto import image_processor
from lion_hf.data.augmentation import (
    Augmentation,
    ImageCollator,
    RepeatedSampler,
    TrainingTransform,
    operations,
    posterize,
)
from lion_hf.data.samples import SeededDataset, seeded
from lion_hf.linearize.losses import distillation_loss
from lion_hf.modeling.image_processing_lion import upright_rgb
from lion_hf.tasks.teacher import Teacher

RECIPES = ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "original", "v0r", "augmix-m5-w4", "3a"]
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]


def transform(recipe: str) -> TrainingTransform:
    return TrainingTransform(Augmentation(aa=recipe), 16, image_processor(16))


@pytest.mark.parametrize("recipe", RECIPES[:-1])
@pytest.mark.parametrize("mode", MODES)
def test_every_operation_at_every_magnitude_on_every_mode(recipe, mode):
    """Without noise on the magnitudes, which then are 0, 0.5, ..., 10."""
    image = upright_rgb(noise(1).convert(mode) if mode != "LAB" else Image.new("LAB", (20, 18)))
    found = list(operations(transform(recipe).augment))
    assert len({operation.name for operation in found}) > 5
    for operation in found:
        operation.prob, operation.magnitude_std = 1.0, 0
        for operation.magnitude in np.arange(0, 10.5, 0.5):
            changed = operation(image)
            assert (changed.mode, changed.size) == ("RGB", image.size), operation


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_with_noise_on_their_magnitudes(recipe):
    """Noise may push any magnitude to 10, where the recipe's posterize asked for no bits."""
    augment = transform(recipe)
    for operation in operations(augment.augment):
        operation.magnitude = 9.9
    for seed in range(150):
        with seeded(seed):
            pixels = augment((noise(seed), 0))["pixel_values"]
        assert pixels.shape == (3, 16, 16) and pixels.isfinite().all()


def test_posterize_keeps_at_least_one_bit():
    image = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(3, 0))
    for bits in range(-1, 10):
        kept = len(np.unique(np.asarray(posterize(image, bits))))
        assert kept == 2 ** min(8, max(1, bits))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"three_augment": True},
        {"src": True, "aa": "none"},
        {"aa": "none", "reprob": 1.0, "remode": "const"},
    ],
    ids=["deit", "3-augment", "src", "erasing"],
)
def test_augmentation_depends_on_the_sample_s_seed_only(options):
    images = [(noise(n), n % 3) for n in range(4)]
    transform = TrainingTransform(Augmentation(**options), 16, image_processor(16))
    dataset = SeededDataset(images, transform, seed=5, repeats=2)
    first = [dataset[n]["pixel_values"] for n in range(8)]
    assert all(pixels.shape == (3, 16, 16) and pixels.isfinite().all() for pixels in first)
    torch.manual_seed(99)
    assert all(torch.equal(first[n], dataset[n]["pixel_values"]) for n in reversed(range(8)))
    assert not torch.equal(first[0], first[4])  # another repeat of the same image
    dataset.set_epoch(1)
    assert sum(torch.equal(first[n], dataset[n]["pixel_values"]) for n in range(8)) < 3


def rows(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "pixel_values": torch.rand(3, 8, 8, generator=generator),
            "labels": n % 3,
            "training": True,
            "seed": 100 + n,
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_mixing_does_not_depend_on_the_batch(count):
    collate = ImageCollator(3, Augmentation(smoothing=0.3))
    samples = rows(count)
    batch = collate(samples)
    parts = [collate(samples[first : first + 2]) for first in range(0, count, 2)]
    for name in ("pixel_values", "labels"):
        assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
    torch.testing.assert_close(batch["labels"].sum(-1), torch.ones(count))
    if count % 2:  # the last one has no partner
        assert torch.equal(batch["pixel_values"][-1], samples[-1]["pixel_values"])
        torch.testing.assert_close(batch["labels"][-1].max(), torch.tensor(0.8))


def test_mixup_mixes_pixels_and_labels_alike():
    one, two = rows(2)
    batch = ImageCollator(3, Augmentation(cutmix=0, smoothing=0.0))([one, two])
    share = batch["labels"][0, 0].item()  # of the first image in itself
    assert 0 < share < 1
    expected = share * one["pixel_values"] + (1 - share) * two["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"][0], expected)
    torch.testing.assert_close(
        batch["labels"], torch.tensor([[share, 1 - share, 0], [1 - share, share, 0]])
    )


def test_cutmix_labels_are_the_shares_of_pixels():
    one, two = rows(2)
    batch = ImageCollator(3, Augmentation(mixup=0, smoothing=0.0))([one, two])
    own = (batch["pixel_values"][0] == one["pixel_values"]).float().mean()
    torch.testing.assert_close(batch["labels"][0, 0], own)


def test_repeats():
    dataset = SeededDataset(list(range(100)), lambda n: {"n": n}, seed=1, repeats=3)
    order = list(RepeatedSampler(dataset))
    images = [index % 100 for index in order]
    assert (
        len(order) == len(set(order)) == 100
    )  # every repeat has an index, and so a seed, of its own
    assert sorted({images.count(image) for image in set(images)}) in ([3], [1, 3], [2, 3])
    assert all(one != two for one, two in zip(images[::2], images[1::2]))
    for first in range(0, 72, 24):
        assert len(set(images[first : first + 24])) == 8  # near each other
    assert list(RepeatedSampler(dataset)) == order
    dataset.set_epoch(1)
    assert list(RepeatedSampler(dataset)) != order
    single = SeededDataset(list(range(100)), seed=1, repeats=1)
    assert sorted(RepeatedSampler(single)) == list(range(100))


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_distillation_loss(tau):
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    hard = [-F.log_softmax(student[n], -1)[teacher[n].argmax()] for n in range(5)]
    torch.testing.assert_close(distillation_loss(student, teacher, "hard", tau), torch.stack(hard))
    p, q = (teacher / tau).softmax(-1), (student / tau).softmax(-1)
    torch.testing.assert_close(
        distillation_loss(student, teacher, "soft", tau), tau**2 * (p * (p / q).log()).sum(-1)
    )


def test_distillation_head_votes(tmp_path):
    config = image_config(image_size=8, distillation_head=True, drop_path_rate=0.0)
    model, image = LionForImageClassification(config).eval(), torch.randn(2, 3, 8, 8)
    tokens = model.lion(pixel_values=image).last_hidden_state
    one, two = model.classifier(tokens.mean(1)), model.distiller(tokens[:, 0])
    outputs = model(image)
    torch.testing.assert_close(outputs.logits, (one + two) / 2)
    torch.testing.assert_close(outputs.distillation_logits, two)
    torch.testing.assert_close(model.train()(image).logits, one)
    model.eval().save_pretrained(tmp_path)
    torch.testing.assert_close(
        LionForImageClassification.from_pretrained(tmp_path)(image).logits, outputs.logits
    )


def test_teacher_sees_its_own_normalisation_and_size():
    pixels = torch.rand(2, 3, 8, 8)
    student, seen = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]), []
    model = torch.nn.Module()
    model.forward = lambda x: seen.append(x) or x.mean((2, 3))
    teacher = Teacher(model, [0.1] * 3, [0.6] * 3, None, *student)
    mean, std = (torch.tensor(x)[:, None, None] for x in student)
    teacher((pixels - mean) / std)
    torch.testing.assert_close(seen[0], (pixels - 0.1) / 0.6)
    Teacher(model, [0.1] * 3, [0.6] * 3, (16, 12), *student)(pixels)
    assert seen[1].shape == (2, 3, 16, 12) and not seen[1].requires_grad
