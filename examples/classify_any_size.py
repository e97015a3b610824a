"""Classifies images of any height and width, several at once.

    python examples/classify_any_size.py [MODEL IMAGE...]

MODEL is a LION image classifier: a folder, or a name on the Hub. Without one, a small model with
random weights shows the steps; its answers mean nothing.
"""

import sys

import torch
from PIL import Image
from transformers import AutoModelForImageClassification

import lion_hf
from lion_hf.auto import native_image_processor

if len(sys.argv) > 2:
    model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
    images = [Image.open(file) for file in sys.argv[2:]]
else:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = lion_hf.LionConfig(modality="image", mask_type="decay", patch_order="snake", **sizes)
    model = AutoModelForImageClassification.from_config(config)
    images = [Image.effect_noise(size, 50) for size in ((224, 224), (640, 360))]

model.eval()
# All images in one row, each as it is: nothing is cropped, squeezed into a square, or padded.
processor = native_image_processor(model.config.patch_size)
inputs = processor(images, return_tensors="pt")
with torch.no_grad():
    probabilities = model(**inputs).logits.softmax(-1)
for image, grid, row in zip(images, inputs["spatial_shapes"].tolist(), probabilities):
    label = model.config.id2label[row.argmax().item()]
    patches = f"{grid[0]} x {grid[1]} patches"
    print(f"{image.width} x {image.height} pixels, {patches}: {label} ({row.max():.0%})")
