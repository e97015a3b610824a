"""Classifies images of any height and width.

    python examples/classify_any_size.py [MODEL IMAGE...]

MODEL is a LION image classifier: a folder, or a name on the Hub. Without one, a small model with
random weights shows the steps; its answers mean nothing.
"""

import sys

import torch
from PIL import Image
from transformers import AutoModelForImageClassification

import lion_hf
from lion_hf.auto import image_processor

if len(sys.argv) > 2:
    model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
    images = [Image.open(file).convert("RGB") for file in sys.argv[2:]]
else:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = lion_hf.LionConfig(modality="image", mask_type="decay", patch_order="snake", **sizes)
    model = AutoModelForImageClassification.from_config(config)
    images = [Image.effect_noise(size, 50).convert("RGB") for size in ((224, 224), (640, 360))]

model.eval()
patch = model.config.patch_size
for image in images:
    # The model takes any sides that the patch size divides. Nothing is squeezed into a square.
    width, height = (max(1, round(side / patch)) * patch for side in image.size)
    inputs = image_processor((height, width), crop=1)(image, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits[0].softmax(-1)
    label = model.config.id2label[probabilities.argmax().item()]
    print(f"{width} x {height} pixels: {label} ({probabilities.max():.0%})")
