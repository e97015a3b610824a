"""Folders of sentence-transformers keep all of their modules.

With softmax in place of LION's mixing, the answers are the source's.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import Bomb
from support.softmax_models import softmax_model
from transformers import BertTokenizer, RobertaTokenizer

from lion_hf.convert.errors import ConversionError
from lion_hf.linearize.checkpoint import linearize_checkpoint
from lion_hf.linearize.sentence_modules import KEPT_MODULES

sentence_transformers = pytest.importorskip("sentence_transformers")
dense_modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
sparse_modules = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
CrossEncoder, SentenceTransformer, SparseEncoder = (
    getattr(sentence_transformers, name)
    for name in ("CrossEncoder", "SentenceTransformer", "SparseEncoder")
)

pytest_plugins = ["support.softmax_models"]  # its fixtures

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijkl", "query", ":"]
TEXTS = ["a b c", "d", "a a f g h i j k l b c d e", "k l ?"]
COPY = {
    "sharpness": 1.0,
    "feature_map": "identity",
    "attention_form": "attention",
    "conv_kernel_size": 0,  # CNN modules read padding, which a convolution leaves empty
}
POOLINGS = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def backbone(folder: Path, architecture: str = "BertModel", **config) -> str:
    """A folder with a random model and its tokenizer."""
    if architecture.startswith("Bert"):
        tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)})
    else:
        words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefghijkl"]
        tokenizer = RobertaTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[])
    softmax_model(architecture, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def pooling(mode: str = "mean"):
    return dense_modules.Pooling(24, pooling_mode=mode)


def dense():
    return randomized(dense_modules.Dense(24, 10, activation_function=torch.nn.Tanh()))


# Name -> what follows the transformer
PIPELINES = {
    **{f"pooling by {mode}": lambda mode=mode: [pooling(mode)] for mode in POOLINGS},
    "two poolings": lambda: [pooling(("cls", "mean"))],
    "dense": lambda: [pooling("cls"), dense()],
    "normalize": lambda: [pooling(), dense_modules.Normalize()],
    "layer norm": lambda: [pooling(), randomized(dense_modules.LayerNorm(24))],
    "dropout": lambda: [pooling(), dense_modules.Dropout(0.3)],
    "word weights": lambda: [
        dense_modules.WordWeights(WORDS, {word: 0.1 * n for n, word in enumerate(WORDS)}),
        pooling(),
    ],
    "cnn": lambda: [dense_modules.CNN(24, 8, kernel_sizes=[1, 3]), dense_modules.Pooling(16)],
    "three": lambda: [pooling("max"), dense(), dense_modules.Normalize()],
}


def same(found, expected) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=2e-5, rtol=1e-4)


class TestSentenceEncoders:
    @pytest.mark.parametrize("pipeline", PIPELINES)
    def test_every_module_is_kept(self, tmp_path, softmax, pipeline):
        torch.manual_seed(0)
        transformer = dense_modules.Transformer(backbone(tmp_path / "backbone"))
        modules = [transformer, *PIPELINES[pipeline]()]
        source = SentenceTransformer(modules=modules, device="cpu")
        source.save(str(tmp_path / "source"))
        made = linearize_checkpoint(tmp_path / "source", tmp_path / "lion", **COPY)
        ours = SentenceTransformer(str(made.folder), device="cpu")
        assert [type(module) for module in ours] == [type(module) for module in source]
        assert type(ours[0].model).__name__ == "LionModel"
        same(ours.encode(TEXTS), source.encode(TEXTS))

    def test_more_positions_are_for_longer_texts(self, tmp_path):
        transformer = dense_modules.Transformer(backbone(tmp_path / "backbone"), max_seq_length=7)
        source = SentenceTransformer(modules=[transformer, pooling()], device="cpu")
        source.save(str(tmp_path / "source"))
        made = linearize_checkpoint(
            tmp_path / "source", tmp_path / "lion", max_position_embeddings=50
        )
        ours = SentenceTransformer(str(made.folder), device="cpu")
        assert ours.max_seq_length == 50 and ours.tokenizer.model_max_length == 50
        text = "a b c d " * 20
        assert ours.tokenize([text])["input_ids"].shape == (1, 50)
        assert np.isfinite(ours.encode(text)).all()
        positions = ours[0].auto_model.embeddings.position_embeddings.weight
        assert torch.equal(positions[11:16], positions[1:6])  # the window of seven tokens
        assert not torch.equal(positions[6:11], positions[1:6])

    def test_with_its_own_mixing_it_is_another_model(self, tmp_path):
        modules = [dense_modules.Transformer(backbone(tmp_path / "backbone")), pooling()]
        source = SentenceTransformer(modules=modules, device="cpu")
        source.save(str(tmp_path / "source"))
        made = linearize_checkpoint(tmp_path / "source", tmp_path / "lion")
        ours = SentenceTransformer(str(made.folder), device="cpu")
        assert np.abs(ours.encode(TEXTS) - source.encode(TEXTS)).max() > 0.01

    @pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel"])
    def test_prompts_lengths_and_similarity(self, tmp_path, softmax, architecture):
        transformer = dense_modules.Transformer(
            backbone(tmp_path / "backbone", architecture), max_seq_length=7, do_lower_case=True
        )
        source = SentenceTransformer(
            modules=[transformer, pooling("cls")],
            device="cpu",
            prompts={"query": "query: ", "passage": "a b "},
            default_prompt_name="passage",
            similarity_fn_name="euclidean",
        )
        source.save(str(tmp_path / "source"))
        made = linearize_checkpoint(tmp_path / "source", tmp_path / "lion", **COPY)
        ours = SentenceTransformer(str(made.folder), device="cpu")
        settings = ("prompts", "default_prompt_name", "similarity_fn_name", "max_seq_length")
        for name in settings:
            assert getattr(ours, name) == getattr(source, name)
        assert ours.max_seq_length == 7 and ours.similarity_fn_name == "euclidean"
        same(ours.encode(TEXTS), source.encode(TEXTS))
        same(ours.encode(TEXTS, prompt_name="query"), source.encode(TEXTS, prompt_name="query"))
        assert np.abs(ours.encode(TEXTS, prompt="") - source.encode(TEXTS)).max() > 0.01

    def test_pooling_over_layers(self, tmp_path, softmax):
        folder = backbone(tmp_path / "backbone", output_hidden_states=True)
        layers = randomized(
            dense_modules.WeightedLayerPooling(24, num_hidden_layers=2, layer_start=1)
        )
        modules = [dense_modules.Transformer(folder), layers, pooling()]
        source = SentenceTransformer(modules=modules, device="cpu")
        source.save(str(tmp_path / "source"))
        made = linearize_checkpoint(tmp_path / "source", tmp_path / "lion", **COPY)
        same(
            SentenceTransformer(str(made.folder), device="cpu").encode(TEXTS), source.encode(TEXTS)
        )

    def test_folders_of_old_versions(self, tmp_path, softmax):
        """A folder for the transformer, pickled weights of a module, old names."""
        folder = tmp_path / "source"
        modules = [dense_modules.Transformer(backbone(tmp_path / "backbone")), pooling(), dense()]
        source = SentenceTransformer(modules=modules, device="cpu")
        source.save(str(folder))
        inner = folder / "0_Transformer"
        inner.mkdir()
        for file in [x for x in folder.iterdir() if x.is_file() and x.name != "modules.json"]:
            shutil.move(file, inner / file.name)
        (inner / "sentence_bert_config.json").unlink()
        (inner / "sentence_roberta_config.json").write_text(
            '{"max_seq_length": 9, "do_lower_case": false, "model_args":'
            ' {"add_pooling_layer": false, "attn_implementation": "sdpa"}}'
        )
        entries = json.loads((folder / "modules.json").read_text())
        for entry in entries:
            entry["type"] = f"sentence_transformers.models.{entry['type'].rpartition('.')[2]}"
        entries[0]["path"] = "0_Transformer"
        (folder / "modules.json").write_text(json.dumps(entries))
        (folder / "2_Dense" / "model.safetensors").unlink()
        torch.save(modules[2].state_dict(), folder / "2_Dense" / "pytorch_model.bin")
        made = linearize_checkpoint(folder, tmp_path / "lion", **COPY)
        ours = SentenceTransformer(str(made.folder), device="cpu")
        assert ours.max_seq_length == 9
        assert not [*made.folder.rglob("*.bin")]
        source.max_seq_length = 9
        same(ours.encode(TEXTS), source.encode(TEXTS))

    def test_a_folder_without_modules_stays_one(self, tmp_path, softmax):
        source = backbone(tmp_path / "source")
        made = linearize_checkpoint(source, tmp_path / "lion", **COPY)
        assert not [*made.folder.glob("*sentence*")] and not (made.folder / "modules.json").exists()
        ours, theirs = (SentenceTransformer(str(x), device="cpu") for x in (made.folder, source))
        same(ours.encode(TEXTS), theirs.encode(TEXTS))


class TestOtherPipelines:
    @pytest.mark.parametrize("labels", [1, 3])
    def test_cross_encoders(self, tmp_path, softmax, labels):
        folder = backbone(tmp_path / "backbone", "BertForSequenceClassification", num_labels=labels)
        source = CrossEncoder(
            folder, device="cpu", activation_fn=torch.nn.Tanh(), prompts={"p": "a "}, max_length=11
        )
        source.save_pretrained(str(tmp_path / "source"))
        made = linearize_checkpoint(tmp_path / "source", tmp_path / "lion", **COPY)
        ours = CrossEncoder(str(made.folder), device="cpu")
        pairs = [(a, b) for a in TEXTS for b in TEXTS[:2]]
        assert made.architecture == "LionForSequenceClassification"
        assert isinstance(ours.activation_fn, torch.nn.Tanh) and ours.max_seq_length == 11
        assert ours.prompts == source.prompts
        same(ours.predict(pairs), source.predict(pairs))

    @pytest.mark.parametrize(
        "stored",
        [
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}},
            {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"},
        ],
        ids=lambda stored: next(iter(stored)),
    )
    def test_cross_encoders_of_old_versions(self, tmp_path, softmax, stored):
        folder = Path(backbone(tmp_path / "source", "BertForSequenceClassification", num_labels=1))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | stored))
        made = linearize_checkpoint(folder, tmp_path / "lion", **COPY)
        ours, source = (CrossEncoder(str(x), device="cpu") for x in (made.folder, folder))
        assert isinstance(ours.activation_fn, torch.nn.Tanh)
        pairs = [(a, b) for a in TEXTS for b in TEXTS[:2]]
        same(ours.predict(pairs), source.predict(pairs))

    @pytest.mark.parametrize("kind", ["splade", "autoencoder"])
    def test_sparse_encoders(self, tmp_path, softmax, kind):
        torch.manual_seed(0)
        if kind == "splade":
            folder = backbone(tmp_path / "backbone", "BertForMaskedLM")
            modules = [sparse_modules.MLMTransformer(folder), sparse_modules.SpladePooling("max")]
        else:
            folder = backbone(tmp_path / "backbone")
            encoder = sparse_modules.SparseAutoEncoder(input_dim=24, hidden_dim=40, k=6)
            modules = [dense_modules.Transformer(folder), pooling(), encoder]
        source = SparseEncoder(modules=modules, device="cpu")
        source.save_pretrained(str(tmp_path / "source"))
        made = linearize_checkpoint(tmp_path / "source", tmp_path / "lion", **COPY)
        ours = SparseEncoder(str(made.folder), device="cpu")
        found, expected = (x.encode(TEXTS).to_dense() for x in (ours, source))
        assert [type(x).__name__ for x in ours] == [type(x).__name__ for x in source]
        assert (expected != 0).any()
        same(found, expected)


class TestRefusals:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        modules = [dense_modules.Transformer(backbone(tmp_path / "backbone")), pooling(), dense()]
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "source"))
        return tmp_path / "source"

    def refused(self, source: Path, match: str) -> None:
        output = source.parent / "outputs" / "lion"
        with pytest.raises(ConversionError, match=match):
            linearize_checkpoint(source, output)
        assert not output.parent.exists()

    @pytest.mark.parametrize(
        ("number", "change", "match"),
        [
            (
                1,
                {"type": "sentence_transformers.models.Router"},
                "module 1 is .*Router.*expected one",
            ),
            (1, {"type": "custom_code.Pooling"}, "module 1 is 'custom_code.Pooling'"),
            (
                0,
                {"type": "sentence_transformers.models.StaticEmbedding"},
                "module 0 is .*StaticEmb",
            ),
            (0, {"type": "sentence_transformers.models.CLIPModel"}, "module 0 is .*CLIPModel"),
            (1, {"path": "../elsewhere"}, "path='../elsewhere'"),
            (1, {"path": ""}, "path=''"),
            (1, {"path": "2_Dense"}, "two modules have one path"),
            (1, {"path": "9_Lost"}, "has no configuration of Pooling"),
            (1, {"path": None}, "expected a list of modules"),
        ],
    )
    def test_modules(self, source, number, change, match):
        entries = json.loads((source / "modules.json").read_text())
        entries[number] |= change
        (source / "modules.json").write_text(json.dumps(entries))
        self.refused(source, match)

    @pytest.mark.parametrize(
        ("file", "content", "match"),
        [
            ("modules.json", "[", "cannot be read as JSON"),
            ("modules.json", "[]", "expected a list of modules"),
            (
                "config_sentence_transformers.json",
                '{"model_type": "MultiVectorEncoder"}',
                "MultiVector",
            ),
            ("config_sentence_transformers.json", "no", "cannot be read as JSON"),
            ("sentence_bert_config.json", "[1]", "expected an object"),
            ("1_Pooling/config.json", "{", "cannot be read as JSON"),
            ("2_Dense/model.safetensors", "x", "cannot be loaded"),
        ],
    )
    def test_files(self, source, file, content, match):
        (source / file).write_text(content)
        self.refused(source, match)

    def test_weights_of_a_module_that_are_code(self, source, tmp_path):
        (source / "2_Dense" / "model.safetensors").unlink()
        torch.save({"bomb": Bomb(tmp_path / "made")}, source / "2_Dense" / "pytorch_model.bin")
        self.refused(source, r"holds (posix|nt)\.mkdir")
        assert not (tmp_path / "made").exists()


def test_every_kept_module_is_tested():
    built = {type(module).__name__ for make in PIPELINES.values() for module in make()}
    assert built | {"WeightedLayerPooling", "SpladePooling", "SparseAutoEncoder"} == {*KEPT_MODULES}
