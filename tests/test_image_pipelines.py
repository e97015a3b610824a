"""The image pipelines of LION's models; those of other families stay as they are."""

import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import noise
from support.models import image_config, model
from transformers import (
    BitImageProcessor,
    ImageClassificationPipeline,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from lion_hf.auto import image_processor, register
from lion_hf.image_pipelines import PIPELINES, open_picture
from lion_hf.modeling import image_processing_lion


def grey16() -> Image.Image:
    return Image.fromarray(np.arange(0, 65_536, 256, dtype=np.uint16).reshape(16, 16))


@pytest.fixture(scope="module")
def lion(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("lion")
    model("ImageClassification", image_config()).save_pretrained(folder)
    image_processor(16).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def address():
    """The address of a picture on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            file = io.BytesIO()
            grey16().save(file, "PNG")
            self.send_response(200 if self.path == "/image.png" else 404)
            self.end_headers()
            self.wfile.write(file.getvalue())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/image.png"
        server.shutdown()


def test_an_address(lion, address):
    classify = pipeline("image-classification", model=lion, device="cpu")
    assert isinstance(classify, PIPELINES["image-classification"])
    expected = image_processor(16)(grey16(), return_tensors="pt")["pixel_values"]
    assert torch.equal(classify.preprocess(address)["pixel_values"], expected)
    assert classify(address, timeout=20)[0]["score"] > 1 / 3
    with pytest.raises(OSError, match="404"):
        open_picture(address.replace("image", "none"))


def test_options_of_the_processor_come_before_its_own(lion, monkeypatch):
    extract = pipeline("image-feature-extraction", model=lion, device="cpu")
    extract.image_processor.max_bytes = 100
    with pytest.raises(ValueError, match="raise the limit"):
        extract.preprocess(noise(0))
    assert extract.preprocess(noise(0), max_bytes=10**8)["pixel_values"].shape[0] == 1
    extract.image_processor.max_bytes = 10**8
    monkeypatch.setattr(image_processing_lion, "MOST_PIXELS", 100)
    native = {"native_resolution": True, "patch_size": 4}
    expected = extract.image_processor(noise(0), return_tensors="pt", **native)
    found = extract.preprocess(noise(0), **native)
    assert torch.equal(found["spatial_shapes"], expected["spatial_shapes"])


def test_what_is_not_an_image(tmp_path):
    for wrong in ("no such file.png", "data:image/png;base64,AAAA", ""):
        with pytest.raises(ValueError, match="expected a path, an http"):
            open_picture(wrong)
    with pytest.raises(TypeError, match="image is a int"):
        open_picture(3)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(OSError, match="cannot identify"):
        open_picture(str(tmp_path / "text.png"))


def test_arrays_and_older_processors(lion, tmp_path):
    classify = pipeline("image-classification", model=lion, device="cpu")
    array = np.asarray(noise(0))
    one = classify.preprocess(array)["pixel_values"]
    assert torch.equal(one, classify.preprocess(noise(0))["pixel_values"])
    older = BitImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16})
    classify.image_processor = older
    pixels = classify.preprocess(grey16())["pixel_values"]
    assert len(pixels.unique()) > 100, "16 bits are not clipped to white"


def test_other_families_stay_as_they_are(tmp_path):
    register()
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                       patch_size=4, intermediate_size=24, num_labels=3)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    ours = pipeline("image-classification", model=str(tmp_path), device="cpu")
    stock = ImageClassificationPipeline(model=ours.model, image_processor=ours.image_processor)
    for image in (noise(0), grey16()):
        one, two = (pipe.preprocess(image)["pixel_values"] for pipe in (ours, stock))
        assert torch.equal(one, two)
    assert isinstance(ours, ImageClassificationPipeline)


def test_a_softmax_model_of_the_command_reads_as_it_was_trained(tmp_path):
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                       patch_size=4, intermediate_size=24, num_labels=3)  # fmt: skip
    processor = image_processor(16)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = processor(grey16(), return_tensors="pt")["pixel_values"]
    for trusted in (False, True):
        classify = pipeline(
            "image-classification", model=str(tmp_path), device="cpu", trust_remote_code=trusted
        )
        assert torch.equal(classify.preprocess(grey16())["pixel_values"], expected)
