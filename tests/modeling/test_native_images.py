"""Images of any size and shape through the image processor and the pipelines."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import noise
from support.models import image_config, model
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from lion_hf import save_for_hub
from lion_hf.auto import image_processor, native_image_processor
from lion_hf.modeling import image_processing_lion as processing
from lion_hf.modeling.image_processing_lion import native_size, patches_of

SIZES = [(16, 8), (20, 18), (4, 30), (9, 40)]  # width and height in pixels


def as_one(processor, image: Image.Image) -> torch.Tensor:
    """The pixels (1, 3, height, width) whose patches the processor gives for an image."""
    inputs = processor(image, return_tensors="pt")
    (rows, columns), size = inputs["spatial_shapes"][0].tolist(), processor.patch_size
    patches = inputs["pixel_values"].view(rows, columns, size, size, 3)
    return patches.permute(4, 0, 2, 1, 3).reshape(1, 3, rows * size, columns * size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A saved classifier with its image processor."""
    folder = tmp_path_factory.mktemp("native")
    network = model("ImageClassification", image_config(patch_order="snake", conv_kernel_size=3))
    save_for_hub(network, folder, processing_class=native_image_processor(4, max_patches=40))
    return str(folder)


@pytest.mark.parametrize(
    ("size", "most", "grid"),
    [
        ((32, 16), None, (1, 2)),  # as it is
        ((16, 48), None, (3, 1)),
        ((39, 25), None, (2, 2)),  # to the nearest multiple
        ((40, 23), None, (1, 3)),
        ((160, 160), 13, (3, 3)),  # scaled down
        ((1600, 160), 350, (6, 58)),
        ((160, 1600), 350, (58, 6)),
        ((48, 16), 3, (1, 3)),
        ((64, 64), 16, (4, 4)),
        ((64, 64), 1, (1, 1)),
        ((4096, 4096), None, (256, 256)),
    ],
)
def test_native_size(size, most, grid):
    assert native_size(*size, 16, most) == grid


def test_native_size_keeps_the_budget_and_the_shape():
    generator = np.random.default_rng(0)
    for _ in range(2000):
        size, most = generator.integers(16, 600, 2).tolist(), int(generator.integers(1, 700))
        if max(size) > most * min(size):
            continue
        rows, columns = native_size(*size, 16, most)
        assert native_size(*size[::-1], 16, most) == (columns, rows)
        assert 1 <= rows * columns <= most
        full = native_size(*size, 16)
        if full[0] * full[1] <= most:
            assert (rows, columns) == full
        else:
            short, long = sorted(size)
            many = max(rows, columns) + 1  # in the longer direction, it would be too many
            too_many = max(1, int(short * many / long + 0.5)) * many > most
            assert too_many or many > max(full)
            assert abs(min(rows, columns) - short * max(rows, columns) / long) <= 0.5


@pytest.mark.parametrize(
    ("size", "most", "message"),
    [
        ((15, 100), None, "image of 15 x 100 pixels: expected at least a patch, 16 x 16"),
        ((1, 100_000), 256, "image of 1 x 100000 pixels: expected at least a patch"),
        (
            (100_000, 16),
            256,
            "image of 100000 x 16 pixels: expected sides of at most 1 to max_patc",
        ),
        ((16, 16), 0, "max_patches=0: expected an integer of at least 1"),
        ((16, 16), 2.5, "max_patches=2.5: expected"),
        ((16, 16), True, "max_patches=True: expected"),
    ],
)
def test_sizes_that_do_not_work(size, most, message):
    with pytest.raises(ValueError, match=message):
        native_size(*size, 16, most)
    with pytest.raises((ValueError, TypeError)):
        native_image_processor(16, most)(Image.new("RGB", size))


def test_patch_sizes_that_do_not_work():
    for size in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match=f"patch_size={size}: expected an integer"):
            native_image_processor(size)


def test_patches_are_the_pixels_of_the_image():
    image = torch.randn(3, 8, 12)
    patches = patches_of(image, 4)
    assert patches.shape == (6, 48)
    for n, patch in enumerate(patches):
        top, left = 4 * (n // 3), 4 * (n % 3)
        expected = image[:, top : top + 4, left : left + 4]
        assert torch.equal(patch.view(4, 4, 3).permute(2, 0, 1), expected)


def test_an_image_of_whole_patches_keeps_every_pixel():
    processor = native_image_processor(4)
    image = noise(0, (12, 20))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std)
    )
    torch.testing.assert_close(as_one(processor, image)[0], (pixels - mean) / std)


def test_without_resizing_only_whole_patches_are_taken():
    processor = native_image_processor(4)
    assert processor(noise(0, (12, 20)), do_resize=False)["spatial_shapes"].tolist() == [[5, 3]]
    with pytest.raises(ValueError, match="do_resize=False with an image of 13 x 20 pixels"):
        processor(noise(0, (13, 20)), do_resize=False)


@pytest.mark.parametrize("value", [1e30, -1e30, 1e9, float("inf"), float("nan")])
def test_pixels_that_would_spoil_other_images_are_refused(value):
    processor, images = native_image_processor(4), np.zeros((2, 3, 8, 12), np.float32)
    assert processor(list(images), input_data_format="channels_first")
    images[1, 2, 3, 5] = value
    with pytest.raises(ValueError, match=r"images\[1\] has pixels of .* expected finite numbers"):
        processor(list(images), input_data_format="channels_first")


@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective"])
def test_the_largest_pixels_leave_other_images_as_they_are(mask_type):
    network = model("ImageClassification", image_config(mask_type=mask_type))
    grids = torch.tensor([(2, 3), (1, 1), (3, 2)])
    patches = torch.randn(13, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(pixel_values=patches, spatial_shapes=grids).logits
        patches[6] = processing.LARGEST_PIXEL
        found = network(pixel_values=patches, spatial_shapes=grids).logits
    assert found.isfinite().all()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=0)


def test_several_images_and_paths(tmp_path):
    processor, images = native_image_processor(4), [noise(n, size) for n, size in enumerate(SIZES)]
    images[1].save(tmp_path / "one.png")
    inputs = processor([images[0], str(tmp_path / "one.png"), *images[2:]], return_tensors="pt")
    one = [processor(image, return_tensors="pt") for image in images]
    for name in ("pixel_values", "spatial_shapes"):
        assert torch.equal(inputs[name], torch.cat([x[name] for x in one]))
    assert inputs["spatial_shapes"].tolist() == [[2, 4], [5, 5], [8, 1], [10, 2]]


def test_large_images_are_not_shrunk(monkeypatch):
    monkeypatch.setattr(processing, "MOST_PIXELS", 100)
    image = noise(0, (16, 16))
    assert native_image_processor(4)(image)["spatial_shapes"].tolist() == [[4, 4]]
    assert native_image_processor(4, 9)(image)["spatial_shapes"].tolist() == [[3, 3]]
    given = image_processor(16)(image, native_resolution=True, patch_size=4)
    assert given["spatial_shapes"].tolist() == [[4, 4]]


def test_without_it_nothing_is_saved_or_changed(tmp_path):
    saved = image_processor(16).to_dict()
    assert not {"native_resolution", "patch_size", "max_patches"} & set(saved)
    pixels = image_processor(16)(noise(0), return_tensors="pt")
    assert set(pixels) == {"pixel_values"} and pixels["pixel_values"].shape == (1, 3, 16, 16)


def test_a_saved_folder_agrees_with_itself(folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    network = AutoModelForImageClassification.from_pretrained(folder)
    assert (processor.patch_size, processor.max_patches) == (4, 40)
    images = [noise(n, size) for n, size in enumerate([*SIZES, (60, 80)])]
    inputs = processor(images, return_tensors="pt")
    assert inputs["spatial_shapes"].prod(1).max() <= 40
    expected = torch.cat([network(as_one(processor, image)).logits for image in images])
    torch.testing.assert_close(network(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pipelines(folder, batch_size):
    classify = pipeline("image-classification", model=folder, device="cpu")
    extract = pipeline("image-feature-extraction", model=folder, device="cpu")
    images = [noise(n, size) for n, size in enumerate([*SIZES, (60, 80)])]
    answers = classify(images, batch_size=batch_size)
    states = extract(images, batch_size=batch_size)
    for image, answer, state in zip(images, answers, states):
        pixels = as_one(classify.image_processor, image)
        scores = classify.model(pixels).logits.softmax(-1)[0]
        for entry in answer:
            number = classify.model.config.label2id[entry["label"]]
            assert entry["score"] == pytest.approx(scores[number].item(), abs=1e-5)
        expected = extract.model(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(torch.tensor(state), expected, rtol=1e-4, atol=1e-4)


def test_a_strip_in_a_pipeline_is_one_clear_line(folder):
    classify = pipeline("image-classification", model=folder, device="cpu")
    with pytest.raises(ValueError, match="image of 1 x 100000 pixels: expected at least a patch"):
        classify(Image.new("RGB", (1, 100_000)))


@pytest.mark.slow
def test_a_saved_folder_works_without_lion_hf(folder, tmp_path):
    images = [noise(n, size) for n, size in enumerate(SIZES)]
    paths = [str(tmp_path / f"{n}.png") for n in range(len(images))]
    for image, path in zip(images, paths):
        image.save(path)
    code = """
import sys
sys.modules["lion_hf"] = None
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
folder, *paths = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
network = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
print(network(**processor(paths, return_tensors="pt")).logits.tolist())
"""
    command = [sys.executable, "-c", code, folder, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    processor = AutoImageProcessor.from_pretrained(folder)
    network = AutoModelForImageClassification.from_pretrained(folder)
    expected = network(**processor(images, return_tensors="pt")).logits
    found = torch.tensor(eval(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_large_image_in_bounded_memory():
    """Of 16,384 patches: no more than a few numbers per patch and channel are held at once."""
    network = model("ImageClassification", image_config(patch_order="snake", conv_kernel_size=3))
    network.config.chunk_size = None
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            found = output if isinstance(output, tuple | list) else [output]
            sizes.extend(x.numel() for x in found if torch.is_tensor(x))
            return output

    inputs = native_image_processor(4)(noise(0, (512, 512)), return_tensors="pt")
    assert inputs["spatial_shapes"].tolist() == [[128, 128]]
    with torch.no_grad(), Sizes():
        logits = network(**inputs).logits
    assert logits.isfinite().all()
    patches = 128 * 128
    assert max(sizes) <= (patches + 1) * 24 * 12 < patches**2 / 50
