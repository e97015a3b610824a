"""The tests that every model of transformers has to pass, on every LION class and family."""

import contextlib
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import archive
import pytest
import torch
from pipelines import PIPELINE_TESTS, VOCABULARY, save_with_processor
from skips import accepted
from torch import nn

import lion_hf
from lion_hf import LionConfig
from lion_hf.modeling.configuration_lion import MASK_TYPES, PATCH_ORDERS

pytestmark = pytest.mark.hf_suite

tests = archive.obtain(Path(__file__).parents[2] / ".pytest_cache" / "hf_suite")
common = archive.load(tests, "test_modeling_common")
configuration = archive.load(tests, "test_configuration_common")
training = archive.load(tests, "test_training_mixin")
pipelines = archive.load(tests, "test_pipeline_mixin")
# Before transformers 5.2x the table held the class itself.
by_name = isinstance(pipelines.pipeline_test_mapping["fill-mask"]["test"], str)
for task, test in PIPELINE_TESTS.items():
    pipelines.pipeline_test_mapping[task] = {
        "test": f"{test.__module__}.{test.__name__}" if by_name else test
    }

# From these tables of transformers the tests know which labels a class takes.
BASE_CLASS = {"MODEL": lion_hf.LionModel}
TEXT_CLASSES = {
    "MODEL_FOR_MASKED_LM": lion_hf.LionForMaskedLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": lion_hf.LionForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION": lion_hf.LionForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING": lion_hf.LionForQuestionAnswering,
    "MODEL_FOR_MULTIPLE_CHOICE": lion_hf.LionForMultipleChoice,
}
IMAGE_CLASSES = {
    "MODEL_FOR_IMAGE_CLASSIFICATION": lion_hf.LionForImageClassification,
    "MODEL_FOR_MASKED_IMAGE_MODELING": lion_hf.LionForMaskedImageModeling,
}
for task, model_class in {**BASE_CLASS, **TEXT_CLASSES, **IMAGE_CLASSES}.items():
    table = f"{task}_MAPPING_NAMES"
    setattr(common, table, {**getattr(common, table), "lion": model_class.__name__})


class ModelTester:
    """A small model and a batch, as the common tests ask for them."""

    base_model_class = lion_hf.LionModel
    # For the training test, which takes any class whose labels are the tokens.
    causal_lm_class = lion_hf.LionForMaskedLM
    is_training = True
    batch_size, num_choices, num_labels = 3, 4, 3
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 32, 2, 4, 37
    vocab_size, max_position_embeddings = len(VOCABULARY), 64
    image_size, patch_size, num_channels = 16, 4, 3

    def __init__(self, modality: str, mask_type: str, patch_order: str):
        self.family = {"modality": modality, "mask_type": mask_type, "patch_order": patch_order}
        self.seq_length = 7 if modality == "text" else (self.image_size // self.patch_size) ** 2 + 1

    def get_config(self) -> LionConfig:
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "num_labels",
        )
        names += ("vocab_size", "max_position_embeddings", "image_size", "patch_size")
        return LionConfig(**self.family, **{name: getattr(self, name) for name in names})

    def prepare_config_and_inputs_for_common(self) -> tuple[LionConfig, dict[str, torch.Tensor]]:
        if self.family["modality"] == "image":
            shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
            return self.get_config(), {"pixel_values": torch.rand(shape)}
        input_ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        attention_mask = torch.ones_like(input_ids)
        attention_mask[1:, -2:] = 0
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class CommonTests(common.ModelTesterMixin, pipelines.PipelineTesterMixin):
    """The tests for one family; subclasses set modality, mask_type, patch_order and the classes."""

    model_tester = None
    test_can_init_all_missing_weights_before_2023 = True

    @classmethod
    def setUpClass(cls):
        cls.model_tester = ModelTester(cls.modality, cls.mask_type, cls.patch_order)
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(pipelines, "TRANSFORMERS_TINY_MODEL_PATH", folder))
        config = cls.model_tester.get_config()
        summary = {
            c.__name__: save_with_processor(c(config), Path(folder)) for c in cls.all_model_classes
        }
        stack.enter_context(mock.patch.dict(pipelines.tiny_model_summary, summary))

    @contextlib.contextmanager
    def subTest(self, msg=None, **params):
        """Ends the test at the first failure.

        With `-n 2`, reporting 15,000 subtests from process to process would take minutes.
        """
        try:
            yield
        except unittest.SkipTest as skip:
            assert accepted(str(skip)), (
                f"{msg} {params}: skipped without an accepted reason: {skip}"
            )

    def test_config(self):
        text = self.modality == "text"
        configuration.ConfigTester(
            self, LionConfig, has_text_modality=text, **self.model_tester.family
        ).run_common_tests()


class TextTests(CommonTests, training.TrainingTesterMixin):
    modality = "text"
    all_model_classes = (*BASE_CLASS.values(), *TEXT_CLASSES.values())
    pipeline_model_mapping = {
        "feature-extraction": lion_hf.LionModel,
        "fill-mask": lion_hf.LionForMaskedLM,
        "text-classification": lion_hf.LionForSequenceClassification,
        "token-classification": lion_hf.LionForTokenClassification,
        "zero-shot": lion_hf.LionForSequenceClassification,
    }
    _torch_compile_train_cls = lion_hf.LionForMaskedLM


class ImageTests(CommonTests):
    modality = "image"
    all_model_classes = (*BASE_CLASS.values(), *IMAGE_CLASSES.values())
    pipeline_model_mapping = {
        "image-classification": lion_hf.LionForImageClassification,
        "image-feature-extraction": lion_hf.LionModel,
    }
    test_resize_embeddings = False

    def test_inputs_embeds(self):
        self.skipTest("image models take pixel_values, not embeddings")

    def test_inputs_embeds_matches_input_ids(self):
        self.skipTest("image models take pixel_values, not embeddings")

    def test_model_get_set_embeddings(self):
        """As transformers' own for ViT: the input embeddings are the projection of patches."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), nn.Conv2d)
            replacement = nn.Conv2d(3, 32, 4, 4)
            model.set_input_embeddings(replacement)
            self.assertIs(model.get_input_embeddings(), replacement)
            self.assertIsNone(model.get_output_embeddings())


def add_family(tests: type, mask_type: str, patch_order: str) -> None:
    """Adds the tests of one family, slow unless it is the richest of its modality."""
    name = f"{mask_type}_{tests.modality}_{patch_order}".title().replace("_", "") + "Test"
    family = type(
        name, (tests, unittest.TestCase), {"mask_type": mask_type, "patch_order": patch_order}
    )
    quick = mask_type == "selective" and (tests.modality == "text" or patch_order == "snake")
    globals()[name] = family if quick else pytest.mark.slow(family)


for mask_type in MASK_TYPES:
    add_family(TextTests, mask_type, "raster")
    for patch_order in PATCH_ORDERS[:1] if mask_type == "lit" else PATCH_ORDERS:
        add_family(ImageTests, mask_type, patch_order)
