"""LION's image processor, and the one definition of the pixels that a picture has."""

import base64
import binascii
import io
import math
import os
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, BitImageProcessor
from transformers.image_utils import ImageInput, SizeDict
from transformers.processing_utils import ImagesKwargs

MAX_BYTES = 380_000_000  # that decoding may take; enough for a photograph of 90 megapixels
MOST_PIXELS = 1 << 23  # of a picture after reading; larger ones are shrunk by a whole factor
LONGEST_SIDE = 1 << 15
LONGEST_RATIO = 32  # of the sides; more of a strip is never inside the centre crop
# Runs Ghostscript, or may hold pictures that are larger than the header says.
REFUSED_FORMATS = ("EPS", "ICO", "ICNS")
# Bytes per pixel that a decoder needs beside the picture itself.
DECODER_BYTES = {"JPEG2000": 16, "AVIF": 8, "WEBP": 10}
MOST_SCANS = 64  # of a progressive JPEG; each passes over the whole picture, and may cost 60 bytes
ORIENTATION = 0x0112  # the EXIF tag; its values say how to turn what was stored
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRIP = 1 << 20  # pixels converted at a time
PATCH_SIZE = 16  # in pixels, if none is given
LARGEST_PIXEL = 1e6  # after normalising; far larger ones would overflow beside other pictures


def open_picture(source: str | Image.Image, timeout: float | None = None) -> Image.Image:
    """Opens what the image processor and the pipelines take, without decoding it.

    Args:
        source: a PIL image, a path, an http(s) address, or an image in base64 (or its data URL).
        timeout: seconds to wait for an address.

    Raises:
        ValueError: if a text is none of these.
        TypeError: for another type.
        OSError: if the bytes are not an image, or an address cannot be read.
    """
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str):
        raise TypeError(
            f"image is a {type(source).__name__}: expected a PIL image, path, address or base64"
        )
    if source.startswith(("http://", "https://")):
        with urllib.request.urlopen(source, timeout=timeout) as answer:
            return Image.open(io.BytesIO(answer.read()))
    if os.path.isfile(source):
        return Image.open(source)
    encoded = source.split(",", 1)[-1] if source.startswith("data:image/") else source
    try:
        return Image.open(io.BytesIO(base64.b64decode(encoded)))
    except (binascii.Error, ValueError, OSError) as error:
        raise ValueError(
            f"{source[:80]!r} is not an image: expected a path, an http(s) address or base64"
        ) from error


def upright_rgb(image: Image.Image, max_bytes: int = MAX_BYTES, whole: bool = False) -> Image.Image:
    """Returns the picture as training, evaluation, image processor and pipelines see it.

    - It is turned upright by its EXIF orientation.
    - Integers of 16 and 32 bits (modes I;16 and I) count as 16 bits, of which the upper 8 are kept,
      as Pillow does for 16-bit colour. Floats (mode F) are clipped to 0..255.
    - Everything else is what Pillow's conversion to RGB makes of it: transparency is dropped and
      colour profiles are ignored. Of an animation it is the current frame, which is the first.
    - More than `MOST_PIXELS` pixels, or a side above `LONGEST_SIDE`, are shrunk by a whole factor,
      unless `whole`.

    Args:
        image: a picture of any mode; it may be opened and not yet decoded. It is not changed.
        max_bytes: memory that decoding may take, estimated from the header before it starts.
        whole: whether the picture keeps its pixels, however many they are.

    Returns:
        A picture of mode RGB; the same object if nothing had to change.

    Raises:
        ValueError: if the picture would need more memory, has no pixels, or cannot be converted.
        OSError: if the file is broken.
    """
    _check_header(image)
    _check_memory(image, decoding_bytes(image), max_bytes)
    image.load()
    turn = _turn(image)  # after loading, because a PNG may say so at its end
    if turn is not None:
        _check_memory(image, decoding_bytes(image) + _copy_bytes(image, 4), max_bytes)
    rgb = _to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
        rgb.info = {}  # its EXIF would turn it once more
    if whole:
        return rgb
    factor = max(
        math.ceil(math.sqrt(rgb.width * rgb.height / MOST_PIXELS)),
        math.ceil(max(rgb.size) / LONGEST_SIDE),
    )
    return rgb.reduce(factor) if factor > 1 else rgb


def decoding_bytes(image: Image.Image) -> int:
    """Estimates the memory that decoding and conversion to RGB need, from the header alone."""
    per_pixel = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;") else 4)
    if image.mode != "RGB":
        per_pixel += 4
    if image.info.get("progressive"):  # JPEG: all coefficients, in 16 bits
        per_pixel += 2 * len(image.getbands())
    return _copy_bytes(image, per_pixel + DECODER_BYTES.get(image.format or "", 0))


def _copy_bytes(image: Image.Image, per_pixel: int) -> int:
    return per_pixel * image.width * image.height + 24 * max(image.size)  # a pointer per row


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How a picture has to be turned. One whose EXIF is broken stays as it is stored."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises many kinds
        return None


def _check_header(image: Image.Image) -> None:
    if image.format in REFUSED_FORMATS:
        raise ValueError(f"image format {image.format}: convert it to PNG or JPEG first")
    scans = _count_scans(image)
    if scans > MOST_SCANS:
        raise ValueError(f"JPEG of {scans} scans: expected at most {MOST_SCANS}; save it again")
    if min(image.size) < 1:
        raise ValueError(f"image of {image.width} x {image.height} pixels: expected at least 1 x 1")


def _count_scans(image: Image.Image) -> int:
    file = getattr(image, "fp", None)
    if not image.info.get("progressive") or file is None:  # not progressive, or decoded already
        return 0
    place = file.tell()
    file.seek(0)
    scans = file.read().count(b"\xff\xda")  # the marker; inside a scan it cannot occur
    file.seek(place)
    return scans


def _check_memory(image: Image.Image, needed: int, max_bytes: int) -> None:
    if needed > max_bytes:
        raise ValueError(
            f"image of {image.width} x {image.height} pixels (mode {image.mode}) needs about"
            f" {needed / 1e6:,.0f} MB to decode; the limit max_bytes is {max_bytes / 1e6:,.0f} MB:"
            " make it smaller, or raise the limit"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;"):
        return _high_bytes(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_bytes(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits, strip by strip, because a whole array would need 13 bytes a pixel."""
    grey = Image.new("L", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        upper = np.asarray(strip).astype(np.int32).clip(0, 65535) >> 8
        grey.paste(Image.fromarray(upper.astype(np.uint8)), (0, top))
    return grey


def reading_limits(processor: Any, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of `upright_rgb` with which an image processor of any kind reads pictures.

    Args:
        processor: the image processor.
        options: of a call, which come before its own.
    """
    limit, whole = (
        getattr(processor, name, None) if (given := (options or {}).get(name)) is None else given
        for name in ("max_bytes", "native_resolution")
    )
    return {"max_bytes": limit or MAX_BYTES, "whole": bool(whole)}


def native_size(
    width: int, height: int, patch_size: int, max_patches: int | None = None
) -> tuple[int, int]:
    """Rows and columns of patches of a picture that keeps its size and shape.

    Each side goes to the nearest whole number of patches. A picture of more than `max_patches`
    patches is scaled down first, so that its longer side has as many as fit.

    Args:
        width: pixels.
        height: pixels.
        patch_size: height and width of a patch in pixels.
        max_patches: the most patches of a picture; None for any number.

    Raises:
        ValueError: if a side is smaller than a patch, or so much longer than the other that the
            picture cannot keep its shape with `max_patches`.
    """
    check_patches(patch_size, max_patches)
    short, long = sorted((width, height))
    if short < patch_size:
        raise ValueError(
            f"image of {width} x {height} pixels: expected at least a patch, {patch_size} x"
            f" {patch_size}"
        )
    few, many = _nearest(short / patch_size), _nearest(long / patch_size)
    if max_patches is not None and few * many > max_patches:
        if long > max_patches * short:
            raise ValueError(
                f"image of {width} x {height} pixels: expected sides of at most 1 to"
                f" max_patches={max_patches}, or a larger max_patches"
            )
        ratio = short / long
        most = (0.5 + math.sqrt(0.25 + 4 * ratio * max_patches)) / (2 * ratio)
        many = min(many, math.floor(most) + 1)
        while (few := _nearest(short * many / long)) * many > max_patches:
            many -= 1
    return (few, many) if height <= width else (many, few)


def native_limits(processor: Any) -> tuple[int, int | None] | None:
    """Arguments of `native_size` for an image processor of any kind; None if it makes squares."""
    if not getattr(processor, "native_resolution", None):
        return None
    size = processor.patch_size
    return PATCH_SIZE if size is None else size, processor.max_patches


def check_patches(patch_size: int, max_patches: int | None) -> None:
    """Raises ValueError for numbers that `native_size` cannot compute with."""
    for name, value in (("patch_size", patch_size), ("max_patches", max_patches)):
        legal = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not legal and (value is not None or name == "patch_size"):
            raise ValueError(f"{name}={value!r}: expected an integer of at least 1")


def _nearest(patches: float) -> int:
    return max(1, math.floor(patches + 0.5))


def check_pixels(image: torch.Tensor, number: int) -> None:
    """Raises ValueError if a normalised image could spoil others, which share a row with it.

    Args:
        image: the pixels.
        number: its place among the images, for the message.
    """
    largest = image.abs().amax().item()
    if not largest <= LARGEST_PIXEL:
        raise ValueError(
            f"images[{number}] has pixels of {largest:.3g} after normalising: expected finite"
            f" numbers of at most {LARGEST_PIXEL:.0e} in magnitude"
        )


def patches_of(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The patches of an image (channels, height, width), row by row, as SigLIP2 and NaFlex have.

    Returns:
        (patches, patch_size * patch_size * channels), with the channels of a pixel side by side.
    """
    patches = image.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))
    return patches.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


class LionImageKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    max_bytes (`int`, *optional*):
        Memory that decoding a picture may take, in bytes.
    native_resolution (`bool`, *optional*):
        Whether pictures keep their size and shape, but for rounding to whole patches. They then
        come as `pixel_values`, the patches of all pictures (patches, patch_size * patch_size *
        channels), and `spatial_shapes`, rows and columns of patches of each (pictures, 2).
    patch_size (`int`, *optional*):
        Height and width of these patches, those of the model; 16 if none.
    max_patches (`int`, *optional*):
        The most patches of a picture. A larger one is scaled down and keeps its shape.
    """

    max_bytes: int
    native_resolution: bool
    patch_size: int
    max_patches: int


class LionImageProcessor(BitImageProcessor):
    """Resizes, crops and normalises pictures for LION's image models; see `upright_rgb`.

    It differs from `BitImageProcessor` in what it does with PIL images: it turns them by their EXIF
    orientation, keeps the upper bits of deep ones, and refuses those that need too much memory. Of
    long strips only the middle is resized. With `native_resolution` no picture is cropped, and none
    is resized by more than `native_size` says.
    """

    valid_kwargs = LionImageKwargs
    max_bytes = MAX_BYTES
    native_resolution: bool | None = None
    patch_size: int | None = None
    max_patches: int | None = None
    _auto_class = "AutoImageProcessor"  # saved folders carry this file, for remote code

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths, addresses and images in base64; transformers would clip deep ones."""
        if isinstance(image_url_or_urls, str):
            return open_picture(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(
        self,
        image: ImageInput,
        max_bytes: int | None = None,
        native_resolution: bool | None = None,
        **kwargs,
    ):
        if isinstance(image, Image.Image):
            image = upright_rgb(image, max_bytes or self.max_bytes, bool(native_resolution))
        elif isinstance(image, np.ndarray) and image.dtype == np.uint16:
            image = (image >> 8).astype(np.uint8)
        elif isinstance(image, torch.Tensor) and image.dtype == torch.uint16:
            image = (image.int() >> 8).to(torch.uint8)
        return super().process_image(image, **kwargs)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        *args,
        native_resolution: bool | None = None,
        patch_size: int | None = None,
        max_patches: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        if not native_resolution:
            return super()._preprocess(images, *args, **kwargs)
        if not images:
            raise ValueError("images is empty: expected at least one")
        patch_size = PATCH_SIZE if patch_size is None else patch_size
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        numbers = {name: kwargs[name] for name in names}
        grids: list[tuple[int, int]] = []
        patches = []
        for image in images:
            rows, columns = native_size(image.shape[-1], image.shape[-2], patch_size, max_patches)
            size = SizeDict(height=rows * patch_size, width=columns * patch_size)
            if tuple(image.shape[-2:]) != (size.height, size.width):
                if not kwargs["do_resize"]:
                    raise ValueError(
                        f"do_resize=False with an image of {image.shape[-1]} x {image.shape[-2]}"
                        f" pixels: expected whole patches of {patch_size}, at most max_patches"
                    )
                image = self.resize(image, size, resample=kwargs["resample"])
            image = self.rescale_and_normalize(image, **numbers)
            check_pixels(image, len(grids))
            grids.append((rows, columns))
            patches.append(patches_of(image, patch_size))
        data = {"pixel_values": torch.cat(patches), "spatial_shapes": torch.tensor(grids)}
        return BatchFeature(data, tensor_type=kwargs["return_tensors"])

    def resize(self, image, size: SizeDict, **kwargs):
        if size.shortest_edge:
            image = self._without_ends(image)
        return super().resize(image, size, **kwargs)

    @staticmethod
    def _without_ends(image):
        """Cuts the ends of images (..., height, width) whose sides differ too much."""
        height, width = image.shape[-2:]
        longest = LONGEST_RATIO * min(height, width)
        top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
        return image[..., top : top + longest, left : left + longest]
