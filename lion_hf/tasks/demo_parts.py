"""What the two trainings of the demo share."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BertTokenizer, TrainingArguments, ViTImageProcessor

from .. import plots
from ..training.trainer import LionTrainer

FORMS = ("attention", "recurrent", "chunk")
LARGEST_DIFFERENCE = 1e-3  # between the logits of two forms, in float32


@dataclass
class Result:
    """A row of the final table."""

    task: str
    parameters: int
    metric: str
    target: str
    seconds: float
    passed: bool


def heading(text: str) -> None:
    """Prints an underlined heading."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def training_arguments(folder: Path, seed: int, **settings) -> TrainingArguments:
    """Warm-up and cosine, AdamW, no checkpoints in between, no reports to services."""
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
    """Trains, then writes the model, the processor and the table of the curves."""
    trainer.train()
    trainer.save_model(str(folder))
    processor.save_pretrained(folder)
    plots.save_history(trainer.state.log_history, folder / "curves.csv")


@torch.no_grad()
def compare_forms(pipe, inputs: list) -> list[torch.Tensor]:
    """Runs a pipeline's model in all forms, and prints how far their logits differ.

    Returns:
        The logits of the attention form.

    Raises:
        SystemExit: if the forms differ by more than rounding.
    """
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
