"""What every process of a launch in test_distributed.py runs: small trainings by name.

    torchrun --nproc_per_node 2 tests/support/distributed_worker.py FOLDER BATCH CASE [CASE ...]

FOLDER/CASE-PROCESS.json then holds what the training logged.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import IterableDataset

from lion_hf import LionConfig, LionForImageClassification, LionForMaskedLM
from lion_hf.data.packing import pack
from lion_hf.data.samples import SeededDataset
from lion_hf.training.processes import share_weights, start_processes
from lion_hf.training.run import run
from lion_hf.training.trainer import LionTrainer, LionTrainingArguments

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "initializer_range": 0.2,
}
NO_DROPOUT = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}
ROWS, LENGTH, WORDS = 32, 17, 99  # neither words nor heads can be shared out evenly

# Case -> what trains, and the trainer's arguments.
CASES = {
    "selective": ("selective", {}),
    "decay": ("decay", {"gradient_accumulation_steps": 2}),
    "lit": ("lit", {"weight_decay": 0.1, "dataloader_drop_last": True}),
    "stream": ("selective", {"max_steps": 3, "gradient_accumulation_steps": 2}),
    "snake": ("decay", {}),
    "broken": ("selective", {}),
    "resumed": ("decay", {"save_steps": 3, "max_grad_norm": 0.5}),
    "bf16": ("selective", {"bf16": True, "use_cpu": True}),
    "recomputed": ("selective", {"gradient_checkpointing": True}),
    "packed": ("selective", {"per_device_eval_batch_size": 8}),
}
TEXT_KEYS, IMAGE_KEYS = ("input_ids", "labels", "attention_mask"), ("pixel_values", "labels")


def text(row: dict) -> dict:
    """A row with tokens to predict: a tenth in the first rows, nine tenths in the last."""
    chosen = torch.rand(LENGTH) < 0.1 + 0.8 * row["number"] / ROWS
    mask = (torch.arange(LENGTH) < LENGTH - row["number"] % 5).long()
    return {
        "input_ids": row["ids"],
        "labels": torch.where(chosen & mask.bool(), row["ids"], -100),
        "attention_mask": mask,
    }


def image(row: dict) -> dict:
    return {"pixel_values": torch.rand(3, 16, 16) + row["number"] % 3, "labels": row["number"] % 3}


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows[i % ROWS] for i in range(10 * ROWS))


def make_model(case: str):
    """A model with random weights, which are others in each process: all must take the first's."""
    mask_type = CASES[case][0]
    torch.manual_seed(1 + PartialState().process_index)
    if case == "snake":
        config = LionConfig(
            modality="image",
            mask_type=mask_type,
            patch_order="snake",
            image_size=16,
            patch_size=4,
            num_labels=3,
            **SIZES,
            **NO_DROPOUT,
        )
        return LionForImageClassification(config)
    config = LionConfig(
        modality="text", mask_type=mask_type, vocab_size=WORDS, chunk_size=5, **SIZES, **NO_DROPOUT
    )
    return LionForMaskedLM(config)


def make_trainer(case: str, folder: str | Path, batch: int, **kwargs) -> LionTrainer:
    """A trainer of six steps, in an epoch of four, with rows that were shuffled."""
    generator = torch.Generator().manual_seed(2)
    rows = [
        {"number": i, "ids": torch.randint(5, WORDS, (LENGTH,), generator=generator)}
        for i in range(ROWS)
    ]
    if case == "lit":
        rows = rows[:-1]  # leaves a batch that is not full
    data = SeededDataset(rows, image if case == "snake" else text, seed=4)
    keys = IMAGE_KEYS if case == "snake" else TEXT_KEYS
    options = {"max_steps": 6, "per_device_train_batch_size": batch, **CASES[case][1], **kwargs}
    args = LionTrainingArguments(
        str(folder),
        learning_rate=1e-2,
        logging_steps=1,
        seed=3,
        disable_tqdm=True,
        report_to="none",
        peak_tflops=1.0,
        save_strategy="steps" if "save_steps" in options else "no",
        **options,
    )

    def collate(samples: list[dict]) -> dict:
        inputs = {
            key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in keys
        }
        if (
            case == "broken"
            and trainer.state.global_step == 2
            and args.process_index == args.world_size - 1
        ):
            trainer.model.lion.layers[0].mlp.fc1.register_forward_hook(
                lambda module, inputs, output: output * float("nan")
            )
        return inputs

    trainer = LionTrainer(
        make_model(case),
        args,
        data_collator=collate,
        train_dataset=Stream(data) if case == "stream" else data,
    )
    return trainer


def evaluate(folder: Path) -> dict:
    """Evaluates documents that are packed into rows, whose number differs from batch to batch.

    There are 43 documents in batches of 8, so that the last round has a batch for one process only,
    which is not full.
    """
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(4, 30, (43,), generator=generator).tolist()
    documents = [torch.randint(5, WORDS, (length,), generator=generator) for length in lengths]

    def collate(samples: list[torch.Tensor]) -> dict:
        rows = pack([len(sample) for sample in samples], 40)
        shape = len(rows), 40
        batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "seq_idx")}
        batch |= {"labels": torch.full(shape, -100), "attention_mask": torch.zeros(shape).long()}
        for row, members in enumerate(rows):
            ids = torch.cat([samples[member] for member in members])
            numbers = [torch.full((len(samples[x]),), n) for n, x in enumerate(members)]
            batch["input_ids"][row, : len(ids)], batch["attention_mask"][row, : len(ids)] = ids, 1
            batch["seq_idx"][row] = len(members) - 1
            batch["seq_idx"][row, : len(ids)] = torch.cat(numbers)
            batch["labels"][row, : len(ids) : 3] = ids[::3]
        return batch

    trainer = make_trainer("packed", folder / "packed", 4)
    trainer.data_collator = collate
    trainer.compute_metrics = lambda found: {
        "rows": len(found.label_ids),
        "labels": int((found.label_ids != -100).sum()),
        "sum": float(found.predictions.sum()),
    }
    if trainer.args.world_size > 1:
        share_weights(trainer.model, trainer.args.device)  # training would do so
    found = trainer.predict(documents)
    metrics = {name: found.metrics[f"test_{name}"] for name in ("rows", "labels", "sum", "loss")}
    kind = trainer.accelerator.distributed_type.value
    return {
        "metrics": metrics,
        "predictions": found.predictions[:, :, :2].tolist(),
        "processes": trainer.args.world_size,
        "kind": kind,
    }


def logged(trainer: LionTrainer) -> dict:
    """The losses, the gradients' norms and where it ran."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in steps],
        "norms": [entry["grad_norm"] for entry in steps],
        "processes": trainer.args.world_size,
        "kind": trainer.accelerator.distributed_type.value,
    }


def train(case: str, folder: Path, batch: int) -> dict:
    if case == "packed":
        return evaluate(folder)
    trainer = make_trainer(case, folder / case, batch)
    if case == "broken":
        try:
            trainer.train()
        except FloatingPointError as error:
            return {"error": str(error)}
    elif case == "resumed":
        run(trainer, title=case)
        whole = logged(trainer)
        # the checkpoint is broken now, and passed over
        (folder / case / "checkpoint-6" / "trainer_state.json").unlink(missing_ok=True)
        trainer.accelerator.wait_for_everyone()
        trainer = make_trainer(case, folder / case, batch)
        run(trainer, title=case)
        return whole | {"resumed": logged(trainer)["losses"]}
    else:
        trainer.train()
    return logged(trainer)


if __name__ == "__main__":
    start_processes()
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    for case in sys.argv[3:]:
        result = train(case, folder, batch)
        (folder / f"{case}-{PartialState().process_index}.json").write_text(json.dumps(result))
