"""The pixels of a picture: training, evaluation, image processor and pipelines see the same."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from support.images import noise
from support.models import image_config, model
from transformers import AutoImageProcessor, pipeline

from lion_hf.auto import image_processor
from lion_hf.data.augmentation import Augmentation, EvaluationTransform, TrainingTransform
from lion_hf.data.images import open_image
from lion_hf.data.samples import SkippedSample
from lion_hf.modeling import image_processing_lion as processing
from lion_hf.modeling.image_processing_lion import ORIENTATION, upright_rgb

SIDE = 16
PLAIN = Augmentation(aa="none", color_jitter=0, hflip=0, reprob=0, src=True, src_padding=0)
GREY16 = (np.arange(SIDE * SIDE, dtype=np.uint16) * 257).reshape(SIDE, SIDE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A saved image classifier with its image processor."""
    folder = tmp_path_factory.mktemp("model")
    model("ImageClassification", image_config(image_size=SIDE)).save_pretrained(folder)
    image_processor(SIDE, crop=1.0).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classify(folder):
    return pipeline("image-classification", model=folder, device="cpu")


@pytest.fixture(scope="module")
def extract(folder):
    return pipeline("image-feature-extraction", model=folder, device="cpu")


def colour(mode: str) -> Image.Image:
    """A picture of a mode with many values, also of transparency."""
    image = noise(0, (SIDE, SIDE))
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image.putalpha(noise(1, (SIDE, SIDE)).convert("L"))
        if mode == "PA":
            return image.convert("RGB").quantize(16).convert("PA")
        return image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
    if mode.startswith("I;16"):
        order = ">" if mode == "I;16B" else "<"
        return Image.frombytes(mode, (SIDE, SIDE), GREY16.astype(f"{order}u2").tobytes())
    if mode == "I":
        return Image.fromarray(GREY16.astype(np.int32))
    if mode == "F":
        return Image.fromarray(np.linspace(-50, 300, SIDE**2, dtype="f4").reshape(SIDE, SIDE))
    if mode == "LAB":
        return Image.frombytes("LAB", (SIDE, SIDE), noise(0, (SIDE, SIDE)).tobytes())
    return image.quantize(16) if mode == "P" else image.convert(mode)


def transparent_palette() -> Image.Image:
    image = colour("P")
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


def profiled() -> Image.Image:
    from PIL import ImageCms

    image = colour("RGB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    image.info["icc_profile"] = profile.tobytes()
    return image


def animation() -> list[Image.Image]:
    return [noise(n, (SIDE, SIDE)).quantize(16) for n in range(3)]


TIFF_MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "F"]
# name -> format, picture or pictures, keyword arguments of save
FILES = {
    **{f"png-{mode}": ("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    **{f"png-{mode}": ("PNG", mode, {}) for mode in ("I;16", "I;16B")},
    **{f"jpeg-{mode}": ("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK", "YCbCr")},
    **{f"tiff-{mode}": ("TIFF", mode, {}) for mode in [*TIFF_MODES, "I;16", "I;16B"]},
    "jpeg-progressive": ("JPEG", "RGB", {"progressive": True}),
    "tiff-deflate": ("TIFF", "I;16", {"compression": "tiff_deflate"}),
    "png-2-bits": ("PNG", "P", {"bits": 4}),
    "png-transparent-palette": ("PNG", transparent_palette, {}),
    "png-transparent-colour": ("PNG", "RGB", {"transparency": (1, 2, 3)}),
    "png-profile": ("PNG", profiled, {}),
    "gif": ("GIF", "RGB", {}),
    "gif-transparent": ("GIF", transparent_palette, {"transparency": 3}),
    "gif-animated": ("GIF", animation, {}),
    "png-animated": ("PNG", animation, {}),
    "webp": ("WEBP", "RGBA", {"lossless": True}),
    "webp-animated": ("WEBP", animation, {"lossless": True}),
    "bmp": ("BMP", "RGB", {}),
    "ppm": ("PPM", "RGB", {}),
    "ppm-I": ("PPM", "I", {}),
    "ppm-F": ("PPM", "F", {}),
    "jpeg2000-I;16": ("JPEG2000", "I;16", {}),
    "avif": ("AVIF", "RGB", {}),
}
MODULES = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}


def encoded(kind: str, what, kwargs: dict) -> bytes:
    if kind in MODULES and not features.check(MODULES[kind]):
        pytest.skip(f"this Pillow cannot write {kind}")
    image = colour(what) if isinstance(what, str) else what()
    file = io.BytesIO()
    if isinstance(image, list):
        image[0].save(file, kind, save_all=True, append_images=image[1:], **kwargs)
    else:
        profile = image.info.get("icc_profile")
        image.save(file, kind, **kwargs, **({"icc_profile": profile} if profile else {}))
    return file.getvalue()


def all_ways(content: bytes, file: Path, folder: str, classify, extract) -> dict:
    """The pixels that each part of the code makes of a file."""
    file.write_bytes(content)
    processor = AutoImageProcessor.from_pretrained(folder)
    text = base64.b64encode(content).decode()
    evaluate = EvaluationTransform(processor)
    return {
        "training": TrainingTransform(PLAIN, SIDE, processor)((str(file), 0))["pixel_values"],
        "evaluation": evaluate((str(file), 0))["pixel_values"],
        "evaluation of a table": evaluate(({"bytes": content, "path": None}, 0))["pixel_values"],
        "pipeline, path": classify.preprocess(str(file))["pixel_values"][0],
        "pipeline, picture": classify.preprocess(Image.open(file))["pixel_values"][0],
        "pipeline, base64": classify.preprocess(text)["pixel_values"][0],
        "pipeline, data URL": classify.preprocess(f"data:image/x;base64,{text}")["pixel_values"][0],
        "features, path": extract.preprocess(str(file))["pixel_values"][0],
        "processor": processor(Image.open(file), return_tensors="pt")["pixel_values"][0],
        "processor, path": processor(str(file), return_tensors="pt")["pixel_values"][0],
    }


@pytest.mark.parametrize("name", FILES)
def test_every_way_gives_the_same_pixels(name, tmp_path, folder, classify, extract):
    ways = all_ways(encoded(*FILES[name]), tmp_path / "picture", folder, classify, extract)
    expected = ways["training"]
    assert expected.shape == (3, SIDE, SIDE) and expected.std() > 0.1
    for way, pixels in ways.items():
        torch.testing.assert_close(pixels, expected, msg=lambda text, way=way: f"{way}: {text}")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(kind, orientation, tmp_path, folder, classify, extract):
    upright = np.zeros((SIDE, SIDE, 3), np.uint8)
    upright[: SIDE // 2, : SIDE // 2, 0], upright[: SIDE // 4, SIDE // 2 :, 1] = 250, 250
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(
        kind, {}
    )
    Image.fromarray(np.ascontiguousarray(stored)).save(file, kind, exif=exif, **lossless)
    ways = all_ways(file.getvalue(), tmp_path / "picture", folder, classify, extract)
    for way, pixels in ways.items():
        torch.testing.assert_close(pixels, ways["training"], msg=way)
    seen = np.asarray(open_image(file.getvalue()))
    assert np.abs(seen.astype(int) - upright).max() < (20 if kind == "JPEG" else 1)
    again = upright_rgb(open_image(file.getvalue()))
    assert np.array_equal(np.asarray(again), seen), "a picture is turned once only"


@pytest.mark.parametrize("exif", [b"Exif\0\0 broken", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
def test_broken_exif_turns_nothing(exif):
    file = io.BytesIO()
    noise(0).save(file, "PNG", exif=exif)
    assert open_image(file.getvalue()).tobytes() == noise(0).tobytes()


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16L", "I;16B"])
def test_the_upper_bits_of_deep_grey_are_kept(mode):
    grey = np.asarray(upright_rgb(colour(mode)))
    assert np.array_equal(grey, np.repeat((GREY16 >> 8)[..., None], 3, -1).astype(np.uint8))
    assert len(np.unique(grey)) == 256


def test_the_upper_bits_of_deep_arrays_are_kept():
    deep = (np.arange(32 * 40 * 3).reshape(32, 40, 3) * 17).astype(np.uint16)
    processor = image_processor(16)
    expected = processor((deep >> 8).astype(np.uint8), return_tensors="pt")["pixel_values"]
    channels_first = torch.from_numpy(deep).permute(2, 0, 1)
    for given in (deep, channels_first):
        assert torch.equal(processor(given, return_tensors="pt")["pixel_values"], expected)


def test_floats_are_clipped():
    grey = np.asarray(upright_rgb(colour("F")))[..., 0].flatten()
    expected = np.linspace(-50, 300, SIDE**2).clip(0, 255)
    assert np.abs(grey - expected).max() <= 1


MODES = [
    *(
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
    ),
    *("I", "F", "I;16", "I;16L", "I;16B", "I;16N"),
]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow(mode, folder):
    image = colour(mode)
    before = image.tobytes()
    rgb = upright_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", (SIDE, SIDE))
    assert (image.mode, image.tobytes()) == (mode, before), "the picture itself stays as it is"
    if mode not in ("La", "I", "F") and not mode.startswith("I;"):
        assert rgb.tobytes() == image.convert("RGB").tobytes()
    processor = AutoImageProcessor.from_pretrained(folder)
    one, two = (processor(x, return_tensors="pt")["pixel_values"] for x in (image, rgb))
    assert torch.equal(one, two)


# Sizes


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 4_000)])
def test_a_long_strip_is_resized_in_its_middle(size, folder, monkeypatch):
    shapes, resize = [], processing.BitImageProcessor.resize

    def spy(self, image, *args, **kwargs):
        shapes.append(resize(self, image, *args, **kwargs).shape)
        return resize(self, image, *args, **kwargs)

    monkeypatch.setattr(processing.BitImageProcessor, "resize", spy)
    processor = image_processor(SIDE)
    pixels = processor(Image.new("RGB", size, "white"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE) and len(pixels[0, 0].unique()) == 1
    assert shapes[0].numel() < 200 * SIDE * SIDE
    training = TrainingTransform(PLAIN, SIDE, processor)
    assert training((Image.new("RGB", size), 0))["pixel_values"].shape == (3, SIDE, SIDE)


def test_large_pictures_are_shrunk_by_a_whole_factor(monkeypatch):
    monkeypatch.setattr(processing, "MOST_PIXELS", 100)
    assert upright_rgb(Image.new("RGB", (10, 10))).size == (10, 10)
    assert upright_rgb(Image.new("RGB", (21, 20))).size == (7, 7)
    assert upright_rgb(Image.new("RGB", (1, 100_000), "red")).size == (1, 3_125)


def png_header(width: int, height: int, depth: int, colour_type: int) -> bytes:
    """A PNG with a header, and nothing behind it that would fill the picture."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size, depth, kind", [((13_000, 13_000), 16, 0), ((11_000, 11_000), 8, 2)])
def test_sizes_are_refused_by_their_header(size, depth, kind, tmp_path, folder, classify):
    content = png_header(*size, depth, kind)
    (tmp_path / "large.png").write_bytes(content)
    message = f"{size[0]} x {size[1]} pixels .* the limit max_bytes is 380 MB"
    with pytest.raises(SkippedSample, match=message):
        open_image(content)
    processor = AutoImageProcessor.from_pretrained(folder)
    for read in (classify.preprocess, lambda path: processor(Image.open(path))):
        with pytest.raises(ValueError, match=message):
            read(str(tmp_path / "large.png"))
    with pytest.raises(OSError):  # decoded only with a higher limit: there are no pixels
        upright_rgb(Image.open(io.BytesIO(content)), max_bytes=10**10)


def test_the_limit_is_saved(tmp_path):
    processor = image_processor(SIDE)
    processor.max_bytes = 1000
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="limit max_bytes is 0 MB"):
        loaded(Image.new("RGB", (50, 50)))


@pytest.mark.parametrize("extra", [0, 100])
def test_a_jpeg_of_many_scans_is_refused(extra):
    """Each passes over the whole picture: 400 scans of 60 bytes would take half a minute."""
    file = io.BytesIO()
    noise(0).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content[content.rfind(b"\xff\xda") : -2]
    content = content[:-2] + extra * last + content[-2:]
    if extra:
        with pytest.raises(SkippedSample, match=r"JPEG of 1\d\d scans: expected at most 64"):
            open_image(content)
    else:
        assert open_image(content).size == (20, 18)


def test_refused_formats():
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "ICO")
    with pytest.raises(SkippedSample, match="image format ICO"):
        open_image(file.getvalue())


MEASURE = """
import pathlib, sys, time
from PIL import Image
from lion_hf.auto import image_processor
from lion_hf.data.augmentation import Augmentation, EvaluationTransform, TrainingTransform
from lion_hf.data.samples import SkippedSample
processor = image_processor(224)
ways = [EvaluationTransform(processor), TrainingTransform(Augmentation(), 224, processor),
        TrainingTransform(Augmentation(src=True), 224, processor),
        lambda sample: processor(Image.open(sample[0]))]
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1000
def read(file, way):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.time()
    try:
        way((file, 0))
    except (SkippedSample, ValueError):
        pass
    return peak(), time.time() - started
honest = [read(sys.argv[1], way) for way in [*ways, *ways]][len(ways):]
for file in sys.argv[2:]:
    for n, way in enumerate(ways):
        megabytes, seconds = read(file, way)
        print(file, n, megabytes - honest[n][0], round(seconds, 1))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of RSS")
def test_hostile_pictures_take_little_memory_and_time(tmp_path):
    made = {
        "strip.png": ("L", (1, 20_000), {}),
        "long-strip.png": ("RGB", (5_000_000, 1), {}),
        "deep.png": ("I;16", (13_000, 13_000), {}),
        "less-deep.png": ("I;16", (7_900, 7_900), {}),
        "wide.png": ("RGB", (9_700, 9_700), {}),
        "clear.png": ("RGBA", (6_880, 6_880), {}),
        "progressive.jpg": ("RGB", (6_150, 6_150), {"progressive": True}),
        "flat.webp": ("RGB", (5_200, 5_200), {}),
    }
    noise(0, (300, 300)).save(tmp_path / "honest.png")
    for name, (mode, size, kwargs) in made.items():
        Image.new(mode, size).save(tmp_path / name, **kwargs)
        assert (tmp_path / name).stat().st_size < 1_000_000
    files = [str(tmp_path / name) for name in ("honest.png", *made)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, check=True
    )
    rows = [line.rsplit(" ", 3) for line in done.stdout.splitlines()]
    assert len(rows) == 4 * len(made)
    print(done.stdout)
    for file, way, megabytes, seconds in rows:
        assert int(megabytes) < 500 and float(seconds) < 10, (file, way, megabytes, seconds)


# Saving


@pytest.mark.slow
def test_a_saved_processor_carries_its_code(tmp_path):
    """It loads where lion_hf is not installed."""
    image_processor(SIDE).save_pretrained(tmp_path)
    assert (tmp_path / "image_processing_lion.py").is_file()
    deep = Image.fromarray(GREY16)
    deep.save(tmp_path / "image.png")
    code = f"""
import sys
sys.modules["lion_hf"] = None
from PIL import Image
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
path = {str(tmp_path / "image.png")!r}
print(type(processor).__name__, *(processor(x, return_tensors="pt")["pixel_values"].sum().item()
    for x in (Image.open(path), path)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pixels = image_processor(SIDE)(upright_rgb(deep), return_tensors="pt")["pixel_values"]
    name, *totals = done.stdout.split()
    assert name == "LionImageProcessor"
    assert [float(total) for total in totals] == pytest.approx([pixels.sum().item()] * 2)


def test_the_processor_opens_paths_as_it_does_pictures(tmp_path):
    """Also in lists; transformers would make 16-bit grey white, and read a picture of any size."""
    processor, deep = image_processor(SIDE), Image.fromarray(GREY16)
    deep.save(tmp_path / "deep.png")
    expected = processor(deep, return_tensors="pt")["pixel_values"]
    assert expected.std() > 0
    for given in (str(tmp_path / "deep.png"), [str(tmp_path / "deep.png")]):
        assert torch.equal(processor(given, return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ValueError, match="the limit max_bytes is 0 MB"):
        processor(str(tmp_path / "deep.png"), max_bytes=10)
    with pytest.raises(ValueError, match="'nowhere.png' is not an image: expected a path"):
        processor("nowhere.png")
