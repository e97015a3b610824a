"""What the pipeline tests of transformers take from elsewhere: tests of each task, small models."""

import string
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import BertTokenizer, PreTrainedModel, pipeline
from transformers.pipelines import Pipeline

from lion_hf.auto import image_processor

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    ".",
    *string.ascii_lowercase,
    *("##" + c for c in string.ascii_lowercase),
]
TEXTS = ["a lion sleeps", "the quick brown fox jumps over the lazy dog", "dog"]
IMAGES = [
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (20 + n, 30, 3), dtype=np.uint8))
    for n in range(3)
]


class TaskTest:
    """Makes a pipeline with examples, and checks its answers one by one."""

    task: str
    examples: list = TEXTS
    options: dict = {}

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer=None, image_processor=None, dtype="float32", **_
    ):
        parts = {"tokenizer": tokenizer, "image_processor": image_processor}
        return pipeline(self.task, model=model, dtype=dtype, **parts, **self.options), self.examples

    def run_pipeline_test(self, pipe: Pipeline, examples: list) -> None:
        assert pipe.model.config.model_type == "lion"
        for example, together in zip(examples, pipe(examples), strict=True):
            self.check(pipe, pipe(example))
            self.check(pipe, together)

    def check_scores(self, answers: list[dict], label: str, number: int) -> None:
        assert len(answers) == number
        assert all(
            isinstance(answer[label], str) and 0 <= answer["score"] <= 1 for answer in answers
        )


class FillMask(TaskTest):
    task, examples, options = "fill-mask", [f"{text} [MASK] ." for text in TEXTS], {"top_k": 4}

    def check(self, pipe, answer):
        self.check_scores(answer, "sequence", 4)


class TextClassification(TaskTest):
    task = "text-classification"

    def check(self, pipe, answer):
        self.check_scores(answer if isinstance(answer, list) else [answer], "label", 1)


class TokenClassification(TaskTest):
    task = "token-classification"

    def check(self, pipe, answer):
        assert answer
        self.check_scores(answer, "entity", len(answer))


class ZeroShot(TaskTest):
    task, options = "zero-shot-classification", {"candidate_labels": ["cat", "dog"]}

    def check(self, pipe, answer):
        assert sorted(answer["labels"]) == ["cat", "dog"]
        assert abs(sum(answer["scores"]) - 1) < 1e-3


class FeatureExtraction(TaskTest):
    task = "feature-extraction"

    def check(self, pipe, answer):
        assert np.isfinite(answer).all()
        assert np.shape(answer)[2] == pipe.model.config.hidden_size


class ImageClassification(TaskTest):
    task, examples, options = "image-classification", IMAGES, {"top_k": 2}

    def check(self, pipe, answer):
        self.check_scores(answer, "label", 2)


class ImageFeatureExtraction(TaskTest):
    task, examples, options = "image-feature-extraction", IMAGES, {"pool": True}

    def check(self, pipe, answer):
        assert np.shape(answer) == (1, pipe.model.config.hidden_size)


PIPELINE_TESTS = {
    # as the table of tasks in transformers names them
    "zero-shot" if test is ZeroShot else test.task: test
    for test in TaskTest.__subclasses__()
}


def save_with_processor(model: PreTrainedModel, folder: Path) -> dict[str, list[str]]:
    """Writes a model where the pipeline tests look for it; returns the names of its processors."""
    folder = folder / model.config.model_type / type(model).__name__
    model.save_pretrained(folder)
    if model.config.modality == "text":
        BertTokenizer(vocab={word: n for n, word in enumerate(VOCABULARY)}).save_pretrained(folder)
        return {"tokenizer_classes": ["BertTokenizer"], "processor_classes": []}
    image_processor(model.config.image_size).save_pretrained(folder)
    return {"tokenizer_classes": [], "processor_classes": ["AutoImageProcessor"]}
