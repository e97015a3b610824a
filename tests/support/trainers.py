"""A small trainer on random rows, whose noise is a choice of each sample."""

from pathlib import Path

import torch
from support.models import model, text_config

from lion_hf.data.samples import SeededDataset
from lion_hf.training.trainer import LionTrainer, LionTrainingArguments


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {
            "input_ids": torch.randint(5, 99, (9,), generator=generator),
            "labels": torch.tensor(index % 3),
        }


def noisy(sample: dict) -> dict:
    """A random token in a random place."""
    sample["input_ids"][torch.randint(9, ())] = torch.randint(5, 99, ())
    return sample


def trainer(
    folder: Path, dataset=None, network=None, eval_dataset=None, cls=LionTrainer, **settings
) -> LionTrainer:
    settings = {
        "max_steps": 12,
        "save_steps": 4,
        "logging_steps": 3,
        "learning_rate": 1e-3,
        **settings,
    }
    args = LionTrainingArguments(
        str(folder),
        report_to="none",
        use_cpu=True,
        per_device_train_batch_size=5,
        disable_tqdm=True,
        **settings,
    )
    network = model("SequenceClassification", text_config()) if network is None else network
    return cls(
        network,
        args,
        train_dataset=SeededDataset(Rows(), noisy) if dataset is None else dataset,
        eval_dataset=eval_dataset,
    )
