"""What a masked language model got right, and what it guessed."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from ..data.samples import SeededDataset
from ..folders import whole_file

GUESSES = 5  # per masked token
NO_TOKEN = -100


@torch.no_grad()
def count_right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums over each row's masked tokens.

    Args:
        logits: (B, L, words), or of the masked tokens only, (masked, words).
        labels: (B, L), -100 where nothing is masked.

    Returns:
        (B, 3): loss in nats, right predictions, and how many there are.
    """
    masked = labels != NO_TOKEN
    logits = _of_masked(logits, masked)
    loss = torch.nn.functional.cross_entropy(logits, labels[masked], reduction="none")
    right = (logits.argmax(-1) == labels[masked]).float()
    counts = logits.new_zeros(*labels.shape, 3)
    counts[masked] = torch.stack([loss, right, torch.ones_like(loss)], dim=-1)
    return counts.sum(1)


@torch.no_grad()
def count_and_guess(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `count_right`, with the most likely tokens and their probabilities, (B, L, 5) each."""
    masked = labels != NO_TOKEN
    chosen = _of_masked(logits, masked)
    best = chosen.softmax(-1).topk(min(GUESSES, chosen.shape[-1]), dim=-1)
    shape = (*labels.shape, best.indices.shape[-1])
    tokens = torch.full(shape, NO_TOKEN, device=labels.device)
    scores = torch.zeros(shape, device=labels.device)
    tokens[masked], scores[masked] = best.indices, best.values
    return count_right(logits, labels), tokens, scores


def _of_masked(logits: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The masked tokens' logits, which are all there are with `sparse_prediction`."""
    return (logits if logits.dim() == 2 else logits[masked]).float()


def masked_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and loss and perplexity as means over all masked tokens.

    Raises:
        ValueError: if no token is masked.
    """
    counts = prediction.predictions
    counts = counts[0] if isinstance(counts, tuple) else counts
    loss, right, count = counts.astype("float64").sum(0)
    if count == 0:
        raise ValueError(
            f"no token of the {len(counts)} rows was masked, so there is nothing to measure:"
            " expected more text, or a larger validation_mask_probability"
        )
    return {
        "masked_accuracy": right / count,
        "exact_loss": loss / count,
        "perplexity": math.exp(min(loss / count, 700.0)),
    }


def write_guesses(
    path: Path,
    rows: SeededDataset,
    tokenizer: PreTrainedTokenizerBase,
    output: PredictionOutput,
) -> None:
    """Writes one line of JSON per row: its text with masks, and the best guesses for each of them.

    Args:
        path: the file.
        rows: the masked rows, with `input_ids`.
        tokenizer: of the rows.
        output: predictions of `count_and_guess` for these rows.
    """
    _, tokens, scores = output.predictions
    with whole_file(path) as file:
        found = zip(output.label_ids, tokens, scores)
        for number, (labels, guesses, shares) in enumerate(found):
            masked = []
            for place in np.flatnonzero(labels != NO_TOKEN).tolist():
                words = tokenizer.convert_ids_to_tokens(guesses[place].tolist())
                best = zip(words, shares[place].tolist())
                masked.append(
                    {
                        "position": place,
                        "token": tokenizer.convert_ids_to_tokens(int(labels[place])),
                        "guesses": [{"token": word, "score": score} for word, score in best],
                    }
                )
            line = {"text": tokenizer.decode(rows[number]["input_ids"]), "masked": masked}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
