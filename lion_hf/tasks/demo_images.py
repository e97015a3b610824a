"""The demo's image classifier: LION-D with both S-curves reads handwritten digits."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import ViTImageProcessor, default_data_collator, pipeline, set_seed

from .. import plots
from ..modeling.configuration_lion import LionConfig
from ..modeling.modeling_lion import LionForImageClassification
from ..training.trainer import LionTrainer
from .demo_parts import Result, compare_forms, heading, train_and_save, training_arguments

TARGET_ACCURACY = 0.95
SHOWN = 24  # held-out digits in the picture, and eight more


@dataclass
class Digits:
    """The handwritten digits, and which of them are held out.

    Attributes:
        grey: the original arrays, 8 x 8.
        images: the same as RGB images.
        pixels: what the model reads, (images, 3, 12, 12).
        labels: class of every image, (images,).
        names: names of the classes.
        train: indices of the images to train on.
        test: indices of the held-out images.
        processor: what makes pixels from images.
    """

    grey: Sequence
    images: list[Image.Image]
    pixels: torch.Tensor
    labels: torch.Tensor
    names: list[str]
    train: Sequence[int]
    test: Sequence[int]
    processor: ViTImageProcessor


def train_image_classifier(folder: Path, seed: int, quick: bool) -> Result:
    """Trains the classifier, saves it, loads it with `pipeline`, and draws what it does.

    Args:
        folder: where model, curves and pictures go.
        seed: seed of the weights, the split and the data order.
        quick: one epoch on few images, to see that everything runs.
    """
    heading("1. Images: LION-D (snake order) on scikit-learn's handwritten digits")
    start = time.perf_counter()
    set_seed(seed)
    digits = read_digits(seed, quick)
    print(
        f"{len(digits.train)} images to train on, {len(digits.test)} held out;"
        " 8 x 8 pixels, enlarged to 12 x 12"
    )
    model = LionForImageClassification(digits_config(digits.names))
    trainer = make_trainer(model, digits, folder, seed, quick)
    train_and_save(trainer, digits.processor, folder)
    accuracy = trainer.evaluate()["eval_accuracy"]

    classify = pipeline("image-classification", model=str(folder))
    print_readings(classify, digits)
    draw_predictions(classify, digits, folder)
    plots.plot_curves(
        trainer.state.log_history,
        folder / "curves.png",
        "LION-D on handwritten digits",
        metric="accuracy",
        metric_levels={"target": TARGET_ACCURACY},
    )
    draw_heads(classify, digits.images[digits.test[0]], folder)
    return Result(
        "digits, LION-D snake",
        model.num_parameters(),
        f"held-out accuracy {accuracy:.1%}",
        f">= {TARGET_ACCURACY:.0%}",
        time.perf_counter() - start,
        accuracy >= TARGET_ACCURACY,
    )


def read_digits(seed: int, quick: bool) -> Digits:
    """Reads the digits and holds out a fifth of them."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = [
        Image.fromarray((grey * 255 / 16).astype("uint8")).convert("RGB") for grey in digits.images
    ]
    processor = ViTImageProcessor(size={"height": 12, "width": 12})
    pixels = processor(images, return_tensors="pt").pixel_values
    train, test = train_test_split(
        range(len(images)), test_size=0.2, random_state=seed, stratify=digits.target
    )
    if quick:
        train, test = train[:320], test[:64]
    names = [str(name) for name in digits.target_names]
    labels = torch.tensor(digits.target)
    return Digits(digits.images, images, pixels, labels, names, train, test, processor)


def digits_config(names: list[str]) -> LionConfig:
    """A LION-D of four layers that reads 6 x 6 patches along both S-curves."""
    return LionConfig(
        modality="image",
        mask_type="decay",
        patch_order="snake",
        image_size=12,
        patch_size=2,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        # The usual 0.02 suits widths near 1,000; 1 / sqrt(width) starts small models faster.
        initializer_range=0.1,
        drop_path_rate=0.05,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )


def make_trainer(
    model: LionForImageClassification, digits: Digits, folder: Path, seed: int, quick: bool
) -> LionTrainer:
    """A trainer that evaluates after each epoch."""
    pixels, labels = digits.pixels, digits.labels
    return LionTrainer(
        model=model,
        args=training_arguments(
            folder,
            seed,
            num_train_epochs=1 if quick else 24,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            eval_strategy="epoch",
            logging_steps=2 if quick else 10,
        ),
        train_dataset=[
            {"pixel_values": pixels[n], "labels": labels[n], "augment": True} for n in digits.train
        ],
        eval_dataset=[{"pixel_values": pixels[n], "labels": labels[n]} for n in digits.test],
        data_collator=collate_images,
        compute_metrics=lambda p: {
            "accuracy": (p.predictions.argmax(-1) == p.label_ids).mean().item()
        },
    )


def collate_images(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of images. Those to train on are turned, scaled and shifted a little."""
    batch = default_data_collator(rows)
    if batch.pop("augment", None) is None:
        return batch
    pixels, count = batch["pixel_values"], len(rows)
    angle, scale = (torch.rand(2, count) * 2 - 1) * torch.tensor([[0.2], [0.1]])
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view(
        count, 2, 2
    )
    shift = (torch.rand(count, 2, 1) * 2 - 1) * 0.15
    grid = F.affine_grid(
        torch.cat([turn * (1 + scale)[:, None, None], shift], dim=-1),
        pixels.shape,
        align_corners=False,
    )
    return batch | {
        "pixel_values": F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    }


def print_readings(classify, digits: Digits) -> None:
    """Compares the forms on eight held-out digits, and prints how they are read."""
    test, names = digits.test, digits.names
    logits = compare_forms(classify, [digits.images[index] for index in test[:8]])
    scores, predictions = torch.stack(logits).softmax(-1).max(-1)
    for index, score, prediction in zip(test, scores.tolist(), predictions.tolist()):
        label = names[digits.labels[index]]
        print(f"  a handwritten {label} is read as {names[prediction]} ({score:.1%})")


def draw_predictions(classify, digits: Digits, folder: Path) -> None:
    """Draws held-out digits with their predictions, and the least certain of the others."""
    test, names = digits.test, digits.names
    images = [digits.images[index] for index in test]
    answers = [answer[0] for answer in classify(images, top_k=1, batch_size=64)]
    unsure = sorted(range(SHOWN, len(test)), key=lambda n: answers[n]["score"])[:8]
    shown = [*range(SHOWN), *unsure]
    plots.plot_predictions(
        [digits.grey[test[n]] for n in shown],
        [answers[n]["label"] for n in shown],
        [answers[n]["score"] for n in shown],
        [names[digits.labels[test[n]]] for n in shown],
        folder / "predictions.png",
        "Held-out digits, label and probability (last row: the least certain of the others)",
    )


@torch.no_grad()
def draw_heads(classify, image: Image.Image, folder: Path) -> None:
    """Draws the half-lives of all gates, and how the first layer mixes the patches of an image."""
    model, config = classify.model, classify.model.config
    heads = [
        f"{curve}, head {head + 1}"
        for curve in ("rows", "columns")
        for head in range(config.num_attention_heads)
    ]
    gates = torch.stack([F.logsigmoid(layer.attention.gate.bias) for layer in model.lion.layers])
    plots.plot_half_lives(
        plots.half_lives(gates),
        folder / "half_lives.png",
        "Learnt half-lives of LION-D's gates",
        [f"layer {number + 1}" for number in range(len(gates))],
        heads,
        "S-curve and head",
    )
    weights = model(
        **classify.preprocess(image).to(model.device), output_attentions=True
    ).attentions[0][0]
    names = [f"layer 1, head {head + 1}" for head in range(len(weights))]
    plots.plot_mixing_matrix(
        weights,
        folder / "mixing_matrix.png",
        "How heads mix the patches of a digit",
        names,
        token_name="token (0: class token)",
    )
