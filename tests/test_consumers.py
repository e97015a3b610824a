"""Small LION models in the libraries around transformers.

These are sentence-transformers, PEFT, accelerate, datasets and captum.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.state import AcceleratorState
from datasets import Dataset
from packaging.version import Version
from support.models import image_config, inputs_of, model, text_config, token_ids
from transformers import BertTokenizer, DataCollatorWithFlattening, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from lion_hf.modeling import lion_encoder, lion_long, lion_long_files
from lion_hf.modeling.configuration_lion import MASK_TYPES

DOCS = Path(__file__).parents[1] / "docs" / "consumers.md"
# Sentences that say the same
PAIRS = [
    ("The train was late because of the snow.", "Snow delayed the train."),
    ("She bought three apples at the market.", "Three apples are what she bought at the market."),
    ("Nobody answered the door.", "The door was answered by nobody."),
    ("The children sleep.", "All of the children are asleep."),
    ("He closed the window.", "The window was closed by him."),
    ("It rains.", "Rain is falling."),
    (
        "The cat chased a mouse through the garden.",
        "A mouse was chased through the garden by the cat.",
    ),
    ("We arrived before noon.", "Before noon we were there."),
]
SENTENCES = [pair[0] for pair in PAIRS] + [pair[1] for pair in PAIRS]
WORDS = sorted(
    {word for sentence in SENTENCES for word in re.findall(r"\w+|[^\w\s]", sentence.lower())}
)
VOCABULARY = {
    word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
}


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab=VOCABULARY, model_max_length=64)


def save(head: str, mask_type: str, folder, **kwargs):
    """A text model and its tokenizer in a folder."""
    network = model(head, text_config(mask_type, vocab_size=len(VOCABULARY), **kwargs))
    network.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return network


def logits(network, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return network(**inputs).logits


@pytest.fixture(params=MASK_TYPES)
def encoder(request, tmp_path):
    """A sentence encoder with mean pooling, and the model it was made of."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    network = save("Model", request.param, tmp_path / "model")
    pooling = modules.Pooling(network.config.hidden_size, "mean")
    return SentenceTransformer(
        modules=[Transformer(str(tmp_path / "model")), pooling], device="cpu"
    ), network


def encode(encoder, batch_size: int = 16) -> torch.Tensor:
    return encoder.encode(SENTENCES, batch_size=batch_size, convert_to_tensor=True)


def test_embeddings_are_means_for_any_batch_and_padding(encoder, tmp_path):
    encoder, network = encoder
    with torch.no_grad():
        alone = [
            network(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in SENTENCES
        ]
    expected = torch.stack(alone)
    assert (expected[0] - expected[2]).abs().max() > 0.1
    for side in ("right", "left"):
        encoder.tokenizer.padding_side = side
        for batch_size in (1, 5, len(SENTENCES)):
            torch.testing.assert_close(encode(encoder, batch_size), expected, atol=1e-5, rtol=1e-5)
    encoder.save(str(tmp_path / "saved"))
    from sentence_transformers import SentenceTransformer

    torch.testing.assert_close(
        encode(SentenceTransformer(str(tmp_path / "saved"), device="cpu")),
        expected,
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_long_text_goes_through_in_pieces(encoder, monkeypatch):
    encoder, _ = encoder
    text, rows = " ".join(SENTENCES), []
    expected = encoder.encode(text, convert_to_tensor=True)
    encode_row = lion_encoder.encode_row
    monkeypatch.setattr(lion_long, "LONGEST_WHOLE", 20)
    monkeypatch.setattr(lion_long, "PIECE", 16)
    monkeypatch.setattr(lion_long_files, "LARGEST_IN_MEMORY", 0)
    monkeypatch.setattr(
        lion_encoder, "encode_row", lambda *args: rows.append(args[1].shape) or encode_row(*args)
    )
    found = encoder.encode([text, "It rains."], batch_size=1, convert_to_tensor=True)
    assert rows == [(1, 64)]
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_flattened_inputs_of_sentence_transformers(encoder):
    """All texts in one row, as sentence-transformers packs them for flash attention."""
    encoder, _ = encoder
    expected = encode(encoder)
    transformer = encoder[0]
    assert transformer.can_flatten_inputs is False
    transformer.data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    transformer._flatten_position_offset = transformer._infer_flatten_position_offset()
    transformer.can_flatten_inputs = True
    features = encoder.preprocess(SENTENCES)
    assert (
        features["input_ids"].shape[0] == 1 and len(features["cu_seq_lens_q"]) == len(SENTENCES) + 1
    )
    assert "attention_mask" not in features
    torch.testing.assert_close(encode(encoder), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_train_a_sentence_encoder(encoder, tmp_path):
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    encoder, _ = encoder
    before = encode(encoder)
    rows = Dataset.from_dict(
        {"anchor": SENTENCES[: len(PAIRS)], "positive": SENTENCES[len(PAIRS) :]}
    )
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=8,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        encoder, arguments, train_dataset=rows, loss=MultipleNegativesRankingLoss(encoder)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    assert (encode(encoder) - before).abs().max() > 0.01


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_cross_encoder(mask_type, tmp_path):
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    network = save("SequenceClassification", mask_type, tmp_path / "model", num_labels=1)
    scorer = cross_encoder(str(tmp_path / "model"), device="cpu")
    scores = torch.from_numpy(scorer.predict(PAIRS, batch_size=3))
    with torch.no_grad():
        expected = [
            network(**tokenizer()(*pair, return_tensors="pt")).logits.sigmoid()[0, 0]
            for pair in PAIRS
        ]
    assert scores.std() > 1e-3
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-5, rtol=1e-5)
    scorer.save_pretrained(str(tmp_path / "saved"))
    again = cross_encoder(str(tmp_path / "saved"), device="cpu").predict(PAIRS)
    torch.testing.assert_close(torch.from_numpy(again), scores, atol=1e-5, rtol=1e-5)


# family -> what LoRA adapts, and what is trained as a whole
ADAPTERS = {
    "lit": (["q_proj", "k_proj", "v_proj"], ["classifier"]),
    "decay": (["q_proj", "k_proj", "v_proj"], ["classifier", "gate"]),
    "selective": (["q_proj", "k_proj", "v_proj", "gate"], ["classifier"]),
    "selective, all": ("all-linear", ["classifier"]),
}


def adapted(name: str, network):
    peft = pytest.importorskip("peft")
    targets, whole = ADAPTERS[name]
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=targets, modules_to_save=whole
    )
    return peft.get_peft_model(network, config)


@pytest.mark.parametrize("name", ADAPTERS)
def test_lora(name, tmp_path):
    """Only the adapters learn; merged, saved and loaded they give the same logits."""
    from peft import PeftModel

    base = model("SequenceClassification", text_config(name.split(",")[0]))
    network = adapted(name, copy.deepcopy(base))
    inputs = inputs_of("SequenceClassification", base.config)
    before = {key: value.clone() for key, value in network.named_parameters()}
    torch.testing.assert_close(logits(network, inputs), logits(base, inputs))
    optimizer = torch.optim.AdamW([x for x in network.parameters() if x.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        losses.append(network(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    changed = {
        key for key, value in network.named_parameters() if not torch.equal(value, before[key])
    }
    assert changed == {key for key in before if "lora_" in key or "modules_to_save" in key}
    for part in ("gate", "classifier") if name != "lit" else ("classifier",):
        assert any(f"{part}." in key for key in changed)

    tuned = logits(network, inputs)
    assert (tuned - logits(base, inputs)).abs().max() > 0.1
    network.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, inputs), tuned)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, inputs), logits(base, inputs))
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base) and merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(merged, inputs), tuned, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ("word", "token_type", "position"))
def test_lora_adapts_any_embeddings(name):
    peft = pytest.importorskip("peft")
    base = model("SequenceClassification", text_config("lit"))
    inputs = inputs_of("SequenceClassification", base.config)
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    expected = logits(base, inputs)
    config = peft.LoraConfig(r=2, target_modules=[f"{name}_embeddings"])
    network = peft.get_peft_model(base, config).eval()
    torch.testing.assert_close(logits(network, inputs), expected)
    network(**inputs).loss.backward()
    assert all(x.grad is not None for x in network.parameters() if x.requires_grad)


def test_lora_cannot_adapt_the_decays_of_lion_d():
    """A vector has no low-rank form; `modules_to_save` trains the decays as a whole."""
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="LionDecay"):
        peft.get_peft_model(
            model("Model", text_config("decay")), peft.LoraConfig(target_modules=["q_proj", "gate"])
        )


OFFLOADED = [
    *(("SequenceClassification", text_config(m)) for m in MASK_TYPES),
    ("MaskedLM", text_config("lit")),
    *(("ImageClassification", image_config(m, "snake")) for m in ("decay", "selective")),
]


@pytest.mark.parametrize(
    "head, config",
    OFFLOADED,
    ids=lambda x: getattr(x, "mask_type", x if isinstance(x, str) else ""),
)
def test_offloading_changes_nothing(head, config, tmp_path):
    network, inputs = model(head, config), inputs_of(head, config)
    expected = logits(network, inputs)
    network.save_pretrained(tmp_path / "model")
    kind = type(network)

    def check(loaded, offloaded: bool) -> None:
        assert any(parameter.is_meta for parameter in loaded.parameters()) == offloaded
        assert torch.equal(logits(loaded.eval(), inputs), expected)

    check(kind.from_pretrained(tmp_path / "model", device_map={"": "cpu"}), False)
    check(kind.from_pretrained(tmp_path / "model", device_map="auto"), False)
    options = {
        "device_map": "auto",
        "max_memory": {"cpu": 38_000},
        "offload_folder": tmp_path / "auto",
    }
    check(kind.from_pretrained(tmp_path / "model", **options), True)
    for offload in (cpu_offload, lambda x, **kwargs: disk_offload(x, tmp_path / "disk", **kwargs)):
        offloaded = copy.deepcopy(network)
        offload(offloaded, execution_device=torch.device("cpu"))
        check(offloaded, True)
    with init_empty_weights():
        empty = kind(config)
    empty.tie_weights()
    memory, whole = {"cpu": 38_000, "disk": 10**9}, kind._no_split_modules
    device_map = infer_auto_device_map(empty, memory, no_split_module_classes=whole)
    assert set(device_map.values()) == {"cpu", "disk"}
    assert not any(re.match(r"lion\.(layers\.\d+|embeddings)\.", name) for name in device_map), (
        device_map
    )
    dispatched = load_checkpoint_and_dispatch(
        empty, tmp_path / "model", device_map, offload_folder=tmp_path / "dispatch"
    )
    check(dispatched, True)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_a_plain_accelerate_loop(mask_type):
    """The losses are those of the same loop without accelerate."""

    def losses(accelerator: Accelerator | None) -> list[float]:
        network = model(
            "SequenceClassification",
            text_config(mask_type, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        )
        torch.manual_seed(2)
        rows = [
            {"input_ids": ids, "labels": torch.tensor(n % 3)}
            for n, ids in enumerate(token_ids(12, 7))
        ]
        loader = torch.utils.data.DataLoader(rows, batch_size=4)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        if accelerator is not None:
            network, optimizer, loader = accelerator.prepare(network.train(), optimizer, loader)
        found = []
        for batch in [batch for _ in range(3) for batch in loader]:
            loss = network(**batch).loss
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    plain = losses(None)
    assert plain[-1] < plain[0]
    # accelerate keeps its first settings for the whole process: bf16 after a Trainer in bf16
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses(Accelerator(cpu=True)) == pytest.approx(plain, rel=1e-5)


def test_batch_inference_over_a_dataset(tmp_path):
    """`Dataset.map` and a pipeline over a column give what every text gives alone."""
    network = save("SequenceClassification", "selective", tmp_path)
    rows, words = Dataset.from_dict({"text": SENTENCES}), tokenizer()

    def predict(batch: dict) -> dict:
        return {
            "logits": logits(
                network, words(batch["text"], padding=True, return_tensors="pt")
            ).tolist()
        }

    alone = torch.stack(
        [logits(network, words(text, return_tensors="pt"))[0] for text in SENTENCES]
    )
    assert alone.std(0).min() > 1e-3
    mapped = rows.map(predict, batched=True, batch_size=5)
    torch.testing.assert_close(torch.tensor(list(mapped["logits"])), alone, atol=1e-5, rtol=1e-5)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None)
    for answer, row in zip(classify(KeyDataset(rows, "text"), batch_size=5), alone.softmax(1)):
        scores = {x["label"]: x["score"] for x in answer}
        assert [scores[f"LABEL_{n}"] for n in range(3)] == pytest.approx(row.tolist(), abs=1e-5)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_attributions_to_tokens_are_complete(mask_type):
    """They add up to what the text changes in the output, to 1 %, and padding gets none."""
    attr = pytest.importorskip("captum.attr")
    network = model("SequenceClassification", text_config(mask_type))
    ids, mask = token_ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[0, 8:] = 0

    def output(ids, mask):
        return network(input_ids=ids, attention_mask=mask).logits[:, 1]

    method, baseline = (
        attr.LayerIntegratedGradients(output, network.lion.embeddings.word_embeddings),
        torch.zeros_like(ids),
    )
    parts = method.attribute(ids, baseline, additional_forward_args=(mask,), n_steps=50)
    change = output(ids, mask) - output(baseline, mask)
    assert change.abs().min() > 0.01
    torch.testing.assert_close(parts.sum((1, 2)).to(change.dtype), change, atol=1e-4, rtol=0.01)
    assert (parts[0, 8:] == 0).all() and parts[0, :8].abs().min() > 0


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_attributions_to_pixels_are_complete(mask_type):
    attr = pytest.importorskip("captum.attr")
    network = model("ImageClassification", image_config(mask_type, "snake"))
    pixels = torch.randn(2, 3, 16, 16)

    def output(pixels):
        return network(pixel_values=pixels).logits[:, 1]

    parts = attr.IntegratedGradients(output).attribute(pixels, torch.zeros_like(pixels), n_steps=50)
    change = output(pixels) - output(torch.zeros_like(pixels))
    assert change.abs().min() > 0.01
    torch.testing.assert_close(parts.sum((1, 2, 3)).to(change.dtype), change, atol=1e-4, rtol=0.01)


def test_the_table_names_what_is_tested_here():
    """The tests import each library of docs/consumers.md; pyproject.toml allows its version."""
    rows = re.findall(
        r"^\| ([\w.-]+) \| (\d[\d.]*) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE
    )
    sources = "".join(
        file.read_text(encoding="utf-8") for file in Path(__file__).parent.rglob("test_*.py")
    )
    least = dict(
        re.findall(
            r'"([\w.-]+)>=([\d.]+)"',
            DOCS.parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"),
        )
    )
    assert (
        len(rows) >= 10
        and {"torch", "transformers", "timm"} <= {name for name, _ in rows} & least.keys()
    )
    for name, version in rows:
        assert re.search(rf"(import|importorskip\(\"|from) ?{name.replace('-', '_')}\b", sources), (
            f"no test imports {name}"
        )
        assert Version(version) >= Version(least.get(name, "0")), (
            f"{name} {version} is below {least[name]}"
        )
