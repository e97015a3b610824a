"""Arguments of a run of `lion-hf glue`."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..training.arguments import LionTrainingArguments
from .glue_settings import RECIPE, GlueRunOptions, check_seed


@dataclass
class GlueTrainingArguments(GlueRunOptions, LionTrainingArguments):
    """LionTrainingArguments with GLUE's defaults. Those that are None are each task's own."""

    own_options: ClassVar[type] = GlueRunOptions

    def __post_init__(self):
        self.given = {
            name: getattr(self, name) for name in RECIPE if getattr(self, name) is not None
        }
        if "seed" in self.given:
            check_seed("seed", self.given["seed"])
        defaults = {f.name: f.default for f in dataclasses.fields(LionTrainingArguments)}
        defaults["per_device_train_batch_size"] = 1
        for name in RECIPE:
            setattr(self, name, self.given.get(name, defaults[name]))
        steps = self.gradient_accumulation_steps
        super().__post_init__()
        if "per_device_train_batch_size" not in self.given:
            self.gradient_accumulation_steps = steps  # as given: `arguments_of` divides the batch
