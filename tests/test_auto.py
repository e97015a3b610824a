"""LION in the Auto classes: the processors and length limits that other libraries find."""

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoProcessor, AutoTokenizer, BertTokenizer

import lion_hf
from lion_hf.auto import image_processor

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lion", "reads")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def text_model(**options) -> lion_hf.LionModel:
    return lion_hf.LionModel(lion_hf.LionConfig(vocab_size=len(WORDS), **SIZES, **options)).eval()


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


@pytest.fixture
def image_folder(tmp_path) -> str:
    config = lion_hf.LionConfig(modality="image", image_size=32, patch_size=8, **SIZES)
    folder = tmp_path / "images"
    lion_hf.save_for_hub(lion_hf.LionModel(config), folder, processing_class=image_processor(32))
    return str(folder)


class TestProcessors:
    def test_of_an_image_model(self, image_folder):
        assert type(AutoProcessor.from_pretrained(image_folder)).__name__ == "LionImageProcessor"

    def test_of_a_text_model(self, tmp_path):
        lion_hf.save_for_hub(text_model(), tmp_path, processing_class=tokenizer())
        assert isinstance(AutoProcessor.from_pretrained(tmp_path), BertTokenizer)

    def test_no_tokenizer_is_made_up(self, image_folder, tmp_path):
        with pytest.raises(OSError, match="has no tokenizer"):
            AutoTokenizer.from_pretrained(image_folder)
        text_model().save_pretrained(tmp_path)
        with pytest.raises(OSError, match="has no tokenizer"):
            AutoTokenizer.from_pretrained(tmp_path)

    def test_a_bare_vocabulary_is_a_tokenizer(self, tmp_path):
        text_model().save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, ""]))
        assert AutoTokenizer.from_pretrained(tmp_path)("lion reads")["input_ids"] == [2, 5, 6, 3]

    def test_sentence_transformers_takes_images(self, image_folder):
        image = Image.effect_noise((40, 50), 64).convert("RGB")
        encoder = SentenceTransformer(modules=[Transformer(image_folder), Pooling(32)])
        assert encoder.encode([image]).shape == (1, 32)


class TestLengths:
    """LION-D and LION-S have no limit; LION-lit has as many positions as it was made with."""

    @pytest.mark.parametrize("mask_type", ["decay", "selective"])
    def test_sentence_transformers_cuts_nothing_that_the_model_takes(self, tmp_path, mask_type):
        text_model(mask_type=mask_type).save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        encoder = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(32)])
        long = "lion " * 700
        features = encoder.preprocess([long])
        assert features["input_ids"].shape == (1, 702)
        assert torch.tensor(encoder.encode(long) - encoder.encode(long + "reads")).abs().max() > 0

    def test_sentence_transformers_cuts_at_the_positions(self, tmp_path):
        text_model(mask_type="lit", max_position_embeddings=16).save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        encoder = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(32)])
        assert encoder.max_seq_length == 16
        assert encoder.encode("lion " * 700).shape == (32,)

    @pytest.mark.parametrize("given", [16, 512, 1_000_000])
    def test_configuration(self, given, tmp_path):
        options = {"vocab_size": len(WORDS), "max_position_embeddings": given, **SIZES}
        for mask_type, longest in (("lit", given), ("decay", 1_000_000), ("selective", 1_000_000)):
            config = lion_hf.LionConfig(mask_type=mask_type, **options)
            config.save_pretrained(tmp_path)
            again = lion_hf.LionConfig.from_pretrained(tmp_path)
            assert config.max_position_embeddings == longest == again.max_position_embeddings

    def test_positions_that_are_added_later_have_a_bound(self, tmp_path):
        text_model(mask_type="decay").save_pretrained(tmp_path)
        for options in ({"use_position_embeddings": True}, {"mask_type": "lit"}):
            config = lion_hf.LionConfig.from_pretrained(tmp_path, **options)
            assert config.use_position_embeddings and config.max_position_embeddings == 512
        config = lion_hf.LionConfig.from_pretrained(tmp_path)
        config.use_position_embeddings = True
        assert config.max_position_embeddings == 512

    def test_older_configurations_are_read_so(self, tmp_path):
        config = lion_hf.LionConfig(**SIZES).to_dict() | {"max_position_embeddings": 512}
        assert lion_hf.LionConfig.from_dict(config).max_position_embeddings == 1_000_000
