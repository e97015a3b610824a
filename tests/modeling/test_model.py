"""LionModel and its heads.

Forms, padding, packing, images, and what transformers expects of a model.
"""

import re

import pytest
import torch
from support.models import (
    IMAGE_FAMILIES,
    IMAGE_HEADS,
    TEXT_HEADS,
    image_config,
    inputs_of,
    model,
    text_config,
    token_ids,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import lion_hf
from lion_hf import AUTO_MODELS, LionConfig, LionForImageClassification, LionForMaskedLM, LionModel
from lion_hf.auto import image_processor
from lion_hf.modeling import lion_layers
from lion_hf.modeling.configuration_lion import (
    CHOICES,
    FEATURE_MAP_NAMES,
    FORMS,
    MASK_TYPES,
)
from lion_hf.modeling.lion_choice import check_score_dropout
from lion_hf.modeling.lion_layers import drop_path
from lion_hf.modeling.lion_loss import check_token_labels, pixel_loss
from lion_hf.modeling.lion_naive import FEATURE_MAPS
from lion_hf.modeling.lion_packing import repad

EVERY_HEAD = [("text", head) for head in ("Model", *TEXT_HEADS)] + [
    ("image", head) for head in ("Model", *IMAGE_HEADS)
]


def config_of(modality: str, **kwargs) -> LionConfig:
    return (
        text_config(**kwargs) if modality == "text" else image_config(patch_order="snake", **kwargs)
    )


@torch.no_grad()
def last_hidden(network, **inputs) -> torch.Tensor:
    return network(**inputs).last_hidden_state


# ---- forms, padding and packing ----


@pytest.mark.parametrize("mask_type, patch_order", IMAGE_FAMILIES)
def test_image_forms_agree(mask_type, patch_order):
    network = model("ImageClassification", image_config(mask_type, patch_order))
    pixel_values = torch.randn(2, 3, 16, 24)  # rectangular, and not the size of training
    logits = {}
    for form in ("auto", *FORMS):
        network.config.attention_form = form
        with torch.no_grad():
            logits[form] = network(pixel_values).logits
    for form in FORMS:
        torch.testing.assert_close(logits[form], logits["auto"], atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits["attention"], logits["recurrent"]), "each form really ran"
    assert not torch.equal(logits["chunk"], logits["recurrent"])


PADDED = {
    "left": [2, 3, 4, 5, 6, 7, 8],
    "right": [0, 1, 2, 3, 4, 5, 6],
    "between": [0, 2, 3, 6, 7, 8, 10],
}


@pytest.mark.parametrize("form", ("auto", *FORMS))
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_padding_changes_nothing(mask_type, form):
    network = model("Model", text_config(mask_type, attention_form=form))
    ids = token_ids(1, 7)
    alone = network(ids)
    for side, places in PADDED.items():
        padded, mask = token_ids(1, 11), torch.zeros(1, 11, dtype=torch.long)
        padded[:, places], mask[:, places] = ids, 1
        found = network(padded, attention_mask=mask)
        torch.testing.assert_close(
            found.last_hidden_state[:, places], alone.last_hidden_state, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(found.pooler_output, alone.pooler_output, atol=1e-5, rtol=0)
        unmasked = network(padded).last_hidden_state[:, places]
        assert (unmasked - alone.last_hidden_state).abs().max() > 1e-3, (
            f"without a mask padding {side} must show"
        )


PACKINGS = {
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 1]])},
    "cu_seq_lens": {
        "cu_seq_lens_q": torch.tensor([0, 4, 9, 10, 12]),
        "cu_seq_lens_k": torch.tensor([0, 4, 9, 10, 12]),
    },
    "seq_idx": {"seq_idx": torch.tensor([[7, 7, 7, 7, 1, 1, 1, 1, 1, 2, 0, 0]])},
}
DOCUMENTS = [slice(0, 4), slice(4, 9), slice(9, 10), slice(10, 12)]


@pytest.mark.parametrize("form", ("auto", *FORMS))
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_packing_changes_nothing(mask_type, packing, form):
    network = model("MaskedLM", text_config(mask_type, attention_form=form))
    ids = token_ids(1, 12)
    with torch.no_grad():
        packed = network(ids, **PACKINGS[packing]).logits
        for tokens in DOCUMENTS:
            alone = network(ids[:, tokens]).logits
            torch.testing.assert_close(packed[:, tokens], alone, atol=1e-5, rtol=0)
        assert (network(ids).logits - packed).abs().max() > 1e-2, (
            "without boundaries documents must leak"
        )


def padded_batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Four rows, half of them padding, and where the tokens are.

    Padding is on every side, and one row is all padding.
    """
    mask = torch.tensor(
        [[1] * 12, [0] * 6 + [1] * 6, [1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0], [0] * 12]
    )
    return {"input_ids": token_ids(4, 12), "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize("packed", (False, True), ids=("single", "packed"))
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_auto_takes_padding_out_of_the_layers(mask_type, packed):
    """The layers see only tokens; outputs and gradients are those of the padded batch."""
    inputs, real = padded_batch()
    if packed:
        inputs["seq_idx"] = torch.tensor([[0] * 4 + [1] * 8, [0] * 8 + [1] * 4, [0] * 12, [0] * 12])
    seen, results = [], {}
    for form in ("auto", "chunk"):
        network = model("Model", text_config(mask_type, attention_form=form))
        network.layers[0].register_forward_hook(
            lambda module, args, output: seen.append(tuple(output.shape))
        )
        output = network(**inputs)
        pooled = output.pooler_output[:3]  # the last row has no token
        (output.last_hidden_state[real].square().sum() + pooled.sin().sum()).backward()
        gradients = {name: x.grad for name, x in network.named_parameters() if x.grad is not None}
        results[form] = {"hidden": output.last_hidden_state[real], "pooled": pooled, **gradients}
    assert seen == [(1, 23, 24), (4, 12, 24)]
    for name, expected in results["chunk"].items():
        torch.testing.assert_close(
            results["auto"][name],
            expected,
            atol=1e-4,
            rtol=1e-4,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize(
    "options, config",
    [
        ({"output_attentions": True}, {}),
        ({"output_hidden_states": True}, {}),
        ({}, {"attention_form": "recurrent"}),
        ({}, {"training": True, "attention_probs_dropout_prob": 0.1}),
        ({"attention_mask": torch.tensor([[1] * 12] * 3 + [[1] * 11 + [0]])}, {}),
    ],
    ids=("maps", "hidden states", "a form is set", "score dropout", "too little padding"),
)
def test_padding_stays_where_the_layers_are_looked_at_or_it_does_not_pay(options, config):
    training = config.pop("training", False)
    network = model("Model", text_config(**config)).train(training)
    seen = []
    network.layers[0].register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.shape))
    )
    output = network(**{**padded_batch()[0], **options})
    assert seen == [(4, 12, 24)]
    for x in (output.hidden_states or ()) + (output.last_hidden_state,):
        assert x.shape == (4, 12, 24)


def test_sparse_prediction_computes_only_labelled_tokens():
    inputs, real = padded_batch()
    labels = inputs["input_ids"].masked_fill((torch.rand(4, 12) < 0.5) | ~real, -100)
    labelled = labels != -100
    dense, sparse = (model("MaskedLM", text_config(sparse_prediction=x)) for x in (False, True))
    full, few = dense(**inputs, labels=labels), sparse(**inputs, labels=labels)
    assert few.logits.shape == (labelled.sum(), 99)
    torch.testing.assert_close(few.logits, full.logits[labelled])
    torch.testing.assert_close(few.loss, full.loss)
    counted = sparse(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(counted, full.loss * labelled.sum() / 7)
    full.loss.backward()
    few.loss.backward()
    for (name, a), b in zip(sparse.named_parameters(), dense.parameters()):
        torch.testing.assert_close(
            a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert sparse(**inputs).logits.shape == (4, 12, 99), "without labels every token is answered"


def test_packing_and_padding_together():
    """Two documents with padding inside and between them, positions told by position_ids."""
    network = model("Model", text_config("lit"))
    ids = token_ids(1, 10)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1, 0, 1]])
    positions = torch.tensor([[0, 0, 1, 0, 2, 9, 0, 1, 0, 2]])
    found = last_hidden(network, input_ids=ids, attention_mask=mask, position_ids=positions)
    for places in ([1, 2, 4], [6, 7, 9]):
        torch.testing.assert_close(
            found[:, places], last_hidden(network, input_ids=ids[:, places]), atol=1e-5, rtol=0
        )


def test_unpacked_position_ids_cut_nothing():
    network = model("Model", text_config())
    ids = token_ids(2, 8)
    ranged = last_hidden(network, input_ids=ids, position_ids=torch.arange(8)[None])
    torch.testing.assert_close(ranged, last_hidden(network, input_ids=ids))


@pytest.mark.parametrize("pooling", ("cls", "mean"))
def test_classifier_with_padding_on_any_side(pooling):
    network = model("SequenceClassification", text_config(classifier_pooling=pooling))
    ids, pad = token_ids(2, 6), torch.zeros(2, 3, dtype=torch.long)
    ones = torch.ones_like(ids)
    alone = network(ids).logits
    left = network(torch.cat([pad, ids], 1), attention_mask=torch.cat([pad, ones], 1)).logits
    right = network(torch.cat([ids, pad], 1), attention_mask=torch.cat([ones, pad], 1)).logits
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", ({}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}), ids=str
)
def test_the_flattening_collator_of_transformers(options):
    """DataCollatorWithFlattening's row of documents gives what they give alone."""
    network = model("TokenClassification", text_config())
    documents = [torch.randint(5, 99, (n,)).tolist() for n in (5, 1, 8)]
    features = [{"input_ids": ids, "labels": [0] * len(ids)} for ids in documents]
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)(features)
    packed = network(**batch).logits
    alone = torch.cat([network(torch.tensor([ids])).logits for ids in documents], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_padding_and_packing_change_no_gradient(mask_type, form):
    """Every parameter's gradient, in float64.

    Two documents in one padded row give the same as the two alone.
    """
    options = {
        "attention_form": form,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    network = model("MaskedLM", text_config(mask_type, **options)).double()
    one, two = token_ids(1, 5), token_ids(1, 4)

    def gradients(rows):
        network.zero_grad()
        for ids, places, kwargs in rows:
            network(ids, **kwargs).logits[:, places].square().sum().backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    row = torch.full((1, 12), 7)
    row[:, [1, 2, 4, 5, 6]], row[:, 7:11] = one, two
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0]])
    seq_idx = torch.tensor([[0] * 7 + [1] * 5])
    packed = gradients(
        [(row, [1, 2, 4, 5, 6, 7, 8, 9, 10], {"attention_mask": mask, "seq_idx": seq_idx})]
    )
    alone = gradients([(one, slice(None), {}), (two, slice(None), {})])
    for name in alone:
        torch.testing.assert_close(packed[name], alone[name], atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_left_padded_position_ids_as_transformers_makes_them(mask_type):
    network = model("Model", text_config(mask_type))
    ids = token_ids(1, 6)
    positions, mask = (
        torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5]]),
        torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]),
    )
    padded = last_hidden(
        network,
        input_ids=torch.cat([ids[:, :2], ids], 1),
        attention_mask=mask,
        position_ids=positions,
    )
    torch.testing.assert_close(
        padded[:, 2:], last_hidden(network, input_ids=ids), atol=1e-5, rtol=0
    )
    classifier = model("SequenceClassification", text_config(mask_type))
    classifier(torch.cat([ids[:, :2], ids], 1), attention_mask=mask, position_ids=positions)


def test_dropout_of_scores_needs_the_attention_form():
    network = model("Model", text_config(attention_probs_dropout_prob=0.1)).train()
    network(token_ids(1, 6))
    network.config.attention_form = "chunk"
    with pytest.raises(ValueError, match="attention_probs_dropout_prob"):
        network(token_ids(1, 6))


# ---- images ----


def test_position_embeddings_are_interpolated_for_any_grid():
    """A constant over the image stays constant, and the class token's stays as it is."""
    embeddings = LionModel(image_config(image_size=[16, 24])).embeddings
    assert embeddings.grid == (4, 6)
    with torch.no_grad():
        embeddings.position_embeddings[:, 1:] = 3.0
    grown = embeddings.positions(7, 3)
    assert grown.shape == (1, 22, 24)
    torch.testing.assert_close(grown[:, 1:], torch.full((1, 21, 24), 3.0))
    torch.testing.assert_close(grown[:, :1], embeddings.position_embeddings[:, :1])
    ramp = torch.arange(4.0)[:, None, None].expand(4, 6, 24).reshape(1, 24, 24)
    with torch.no_grad():
        embeddings.position_embeddings[:, 1:] = ramp
    rows = embeddings.positions(8, 6)[:, 1:].view(8, 6, 24)
    assert (rows[1:, 0, 0] > rows[:-1, 0, 0]).all(), "rows stay rows"
    torch.testing.assert_close(rows, rows[:, :1].expand(-1, 6, -1))


def test_image_forms_without_position_embeddings():
    network = model("Model", image_config(use_position_embeddings=False))
    assert network.embeddings.position_embeddings is None
    assert last_hidden(network, pixel_values=torch.randn(1, 3, 8, 32)).shape == (1, 17, 24)


def test_snake_order_sees_what_raster_does_not():
    pixels = torch.randn(1, 3, 16, 16)
    raster, snake = (model("Model", image_config("decay", order)) for order in ("raster", "snake"))
    state = raster.state_dict()
    snake.load_state_dict(
        {k: v.repeat(2) if k.endswith("gate.bias") else v for k, v in state.items()}
    )
    assert (
        last_hidden(raster, pixel_values=pixels) - last_hidden(snake, pixel_values=pixels)
    ).abs().max() > 1e-3


def test_transposed_image_in_snake_order():
    """Transposing the image swaps the two curves.

    With their gates swapped and a symmetric patch the class logits stay.
    """
    config = image_config("decay", "snake", use_position_embeddings=False)
    network = model("ImageClassification", config)
    weight = network.lion.embeddings.patch_embeddings.weight.data
    weight.copy_((weight + weight.mT) / 2)
    for layer in network.lion.layers:
        layer.attention.gate.bias.data.normal_()
    pixels = torch.randn(1, 3, 16, 24)
    logits = network(pixels).logits
    assert (network(pixels.mT).logits - logits).abs().max() > 1e-4
    for layer in network.lion.layers:
        layer.attention.gate.bias.data = (
            layer.attention.gate.bias.data.view(2, -1).flip(0).flatten()
        )
    torch.testing.assert_close(network(pixels.mT).logits, logits, atol=1e-5, rtol=1e-5)


def test_masked_image_modeling_reconstructs_rectangles():
    network = model("MaskedImageModeling", image_config())
    pixels, mask = torch.randn(2, 3, 8, 24), torch.rand(2, 12) < 0.5
    mask[0, 0] = True
    outputs = network(pixels, bool_masked_pos=mask)
    assert outputs.reconstruction.shape == pixels.shape
    patches = (
        (outputs.reconstruction - pixels)
        .abs()
        .unfold(2, 4, 4)
        .unfold(3, 4, 4)
        .mean((1, 4, 5))
        .flatten(1)
    )
    torch.testing.assert_close(outputs.loss, patches[mask].mean())


def test_drop_path_drops_whole_samples():
    dropped = drop_path(torch.ones(1000, 2, 2), 0.3, training=True)
    assert sorted(set(dropped.flatten(1).sum(1).tolist())) == pytest.approx([0.0, 4 / 0.7])
    assert abs(dropped.mean() - 1) < 0.1
    assert drop_path(dropped, 0.3, training=False) is dropped
    rates = [
        layer.drop_path_rate
        for layer in LionModel(image_config(num_hidden_layers=3, drop_path_rate=0.2)).layers
    ]
    assert rates == [0.0, 0.1, 0.2]


# ---- outputs ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("modality", ("text", "image"))
def test_attentions_and_hidden_states(modality, form):
    """The maps are the true mixing matrices: they reproduce a layer's attention output."""
    network = model("Model", config_of(modality, attention_form=form))
    inputs = {k: v for k, v in inputs_of("Model", network.config).items() if k != "labels"}
    outputs = network(**inputs, output_attentions=True, output_hidden_states=True)
    length = outputs.last_hidden_state.shape[1]
    assert len(outputs.attentions) == 2 and outputs.attentions[0].shape == (2, 3, length, length)
    assert len(outputs.hidden_states) == 3
    attention, hidden = network.layers[1].attention, outputs.hidden_states[1]
    hidden = hidden if modality == "text" else network.layers[1].attention_norm(hidden)
    value = attention.v_proj(hidden).unflatten(-1, (3, 8)).transpose(1, 2)
    mixed = (outputs.attentions[1] @ value).transpose(1, 2).flatten(2)
    order = None if modality == "text" else lion_hf.snake_orders(4, 4)
    torch.testing.assert_close(
        attention(hidden, order=order)[0], attention.o_proj(mixed), atol=1e-5, rtol=1e-5
    )
    if modality == "text":
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    else:
        torch.testing.assert_close(
            network.norm(outputs.hidden_states[-1]), outputs.last_hidden_state
        )
    plain = network(**inputs)
    assert plain.attentions is None and plain.hidden_states is None
    torch.testing.assert_close(
        plain.last_hidden_state, outputs.last_hidden_state, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("tied", (None, False))
@pytest.mark.parametrize("pre_norm", (False, True))
@pytest.mark.parametrize("head", ("Model", "MaskedLM"))
def test_texts_end_with_the_last_norm(head, pre_norm, tied):
    """As ModernBERT's hidden states do: many take the last of them for the embeddings."""
    network = model(head, text_config(pre_norm=pre_norm))
    network.config.tie_last_hidden_states = tied
    ids = token_ids(2, 7)
    expected = getattr(network, "lion", network)(ids).last_hidden_state
    outputs = network(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    same = torch.allclose(outputs.hidden_states[-1], expected, atol=1e-5)
    assert same == (tied is None or not pre_norm)
    for x, y in zip(network(ids, output_hidden_states=True, return_dict=False)[-1], outputs[-1]):
        assert torch.equal(x, y)


@pytest.mark.parametrize("modality, head", EVERY_HEAD)
def test_tuples(modality, head):
    network = model(head, config_of(modality))
    inputs = inputs_of(head, network.config)
    outputs = network(**inputs)
    as_tuple = network(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(outputs.to_tuple())
    for a, b in zip(as_tuple, outputs.to_tuple()):
        torch.testing.assert_close(a, b)


# ---- what transformers expects ----


@pytest.mark.parametrize("head", TEXT_HEADS)
def test_a_subclass_of_any_name_has_the_same_loss(head):
    """transformers chooses losses by the names of classes."""
    network = model(head, text_config())
    inputs = inputs_of(head, network.config)
    subclass = type("Renamed", (type(network),), {})(network.config).eval()
    subclass.load_state_dict(network.state_dict())
    torch.testing.assert_close(subclass(**inputs).loss, network(**inputs).loss)


@pytest.mark.parametrize("modality, head", EVERY_HEAD)
def test_save_and_load(modality, head, tmp_path):
    network = model(head, config_of(modality))
    network.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, info = type(network).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = inputs_of(head, network.config)
    for a, b in zip(network(**inputs).to_tuple(), loaded(**inputs).to_tuple()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("auto_name, name", AUTO_MODELS.items())
def test_auto_classes(auto_name, name, tmp_path):
    """An encoder's checkpoint opens with every head of its modality.

    The folder's name alone is enough.
    """
    import transformers

    modality = "image" if "Image" in name else "text"
    model("Model", config_of(modality)).save_pretrained(tmp_path)
    loaded = getattr(transformers, auto_name).from_pretrained(tmp_path, attention_form="chunk")
    assert type(loaded) is getattr(lion_hf, name) and loaded.config.attention_form == "chunk"
    assert type(getattr(transformers, auto_name).from_config(loaded.config)) is type(loaded)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LionConfig


def test_auto_tokenizer_and_image_processor(tmp_path):
    text_config().save_pretrained(tmp_path / "text")
    vocabulary = {
        word: n
        for n, word in enumerate(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lion", "##s", "run"]
        )
    }
    from transformers import BertTokenizer

    BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    assert tokenizer("Lions run").input_ids == [2, 5, 6, 7, 3]
    image_config().save_pretrained(tmp_path / "image")
    image_processor(16).save_pretrained(tmp_path / "image")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "image")
    pixels = processor(
        torch.randint(0, 255, (3, 40, 30), dtype=torch.uint8), return_tensors="pt"
    ).pixel_values
    assert pixels.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("modality, head", EVERY_HEAD)
def test_gradient_checkpointing_gives_the_same_gradients(modality, head):
    network = model(
        head,
        config_of(
            modality, drop_path_rate=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ),
    )
    inputs = inputs_of(head, network.config)

    def gradients():
        network.zero_grad()
        outputs = network.train()(**inputs)
        (outputs.last_hidden_state.square().mean() if head == "Model" else outputs.loss).backward()
        return {
            name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None
        }

    plain = gradients()
    network.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], msg=name)
    unused = {name for name, _ in network.named_parameters()} - plain.keys()
    assert not {name for name in unused if "pooler" not in name}, (
        "parameters without gradient break DDP"
    )


@pytest.mark.parametrize("mask_type", ("decay", "selective"))
def test_gates_are_trained(mask_type):
    """LION-S's image gate gets a gradient (the original detached it)."""
    network = model("ImageClassification", image_config(mask_type, "snake")).train()
    network(**inputs_of("ImageClassification", network.config)).loss.backward()
    for name, parameter in network.named_parameters():
        if "gate" in name:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_initial_gates_have_spread_half_lives(dtype):
    for mask_type in ("decay", "selective"):
        config = text_config(mask_type, num_attention_heads=4)
        attention = AutoModel.from_config(config, dtype=dtype).layers[0].attention
        log_decay = attention.log_decay(torch.zeros(1, 1, 24)).flatten()
        half_lives = torch.log(torch.tensor(0.5)) / log_decay
        torch.testing.assert_close(
            half_lives, torch.tensor([2.0, 8.0, 32.0, 128.0]), rtol=1e-3, atol=0
        )


def test_trainer_predicts_the_logits_of_two_heads_together(tmp_path):
    """`logits` is their mean, and metrics take one array."""
    network = model("ImageClassification", image_config(distillation_head=True))
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": n} for n in range(3)]
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    found = Trainer(network, arguments).predict(rows).predictions
    with torch.no_grad():
        expected = network(torch.stack([row["pixel_values"] for row in rows])).logits
    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_resize_token_embeddings_keeps_the_decoder_tied(tmp_path):
    network = model("MaskedLM", text_config())
    assert network.decoder.weight is network.lion.embeddings.word_embeddings.weight
    network.resize_token_embeddings(120)
    assert network(token_ids(1, 4)).logits.shape[-1] == 120 == network.config.vocab_size
    network.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.decoder.weight is loaded.lion.embeddings.word_embeddings.weight
    assert loaded.decoder.weight.shape == (120, 24)
    untied = model("MaskedLM", text_config(tie_word_embeddings=False))
    assert untied.decoder.weight is not untied.lion.embeddings.word_embeddings.weight


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("modality", ("text", "image"))
def test_half_precision_loading(modality, dtype, tmp_path):
    """Weights load in half precision, gates stay in float32, and the numbers stay near."""
    head = "SequenceClassification" if modality == "text" else "ImageClassification"
    network = model(head, config_of(modality))
    network.save_pretrained(tmp_path)
    half = type(network).from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for n, p in half.named_parameters() if "gate" in n} == {torch.float32}
    assert {p.dtype for n, p in half.named_parameters() if "gate" not in n} == {dtype}
    inputs = inputs_of(head, network.config)
    for form in FORMS:
        half.config.attention_form = form
        outputs = half(**inputs)
        torch.testing.assert_close(
            outputs.logits.float(), network(**inputs).logits, atol=0.1, rtol=0.1
        )
        assert outputs.loss.dtype == torch.float32
    pure = model(head, config_of(modality)).to(dtype)  # gates too
    assert torch.isfinite(pure(**inputs).logits).all()


@pytest.mark.parametrize("modality, head", EVERY_HEAD)
def test_autocast(modality, head):
    network = model(head, config_of(modality))
    inputs = inputs_of(head, network.config)
    expected = network(**inputs).to_tuple()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(**inputs).to_tuple()
    for a, b in zip(found, expected):
        assert (a.float() - b).norm() < 0.1 * b.norm()
    if head != "Model":
        found[0].backward()
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_autocast_casts_a_layers_input_once(mask_type):
    """And its gradient: not once for each of the three projections.

    That would be a tenth of a layer's memory traffic.
    """

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape == x.shape:
                shapes.append((args[0].dtype, kwargs["dtype"]))
            return function(*args, **kwargs or {})

    attention, shapes = (
        lion_layers.LionAttention(text_config(mask_type, attention_form="attention")),
        [],
    )
    x = (
        torch.randn(2, 9, attention.config.hidden_size, requires_grad=True) * 1
    )  # autocast remembers what it made of a leaf
    with torch.autocast("cpu", dtype=torch.bfloat16), Casts():
        output = attention(x)[0]
    with Casts():
        output.sum().backward()
    assert shapes == [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_another_default_type(mask_type, dtype):
    """Padding and documents of a model that was made under torch.set_default_dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        network = model("MaskedLM", text_config(mask_type)).train()
        ids, mask = token_ids(2, 9), torch.ones(2, 9).long()
        mask[0, 4:] = 0
        positions = torch.arange(9)[None] % 5
        for loss in (
            network(ids, attention_mask=mask, labels=ids).loss,
            network(ids, position_ids=positions, labels=ids).loss,
        ):
            loss.backward()
            assert loss.isfinite()
    finally:
        torch.set_default_dtype(before)


def test_float64_stays_float64():
    network = model("Model", text_config()).double()
    ids = token_ids(1, 9)
    outputs = []
    for form in FORMS:
        network.config.attention_form = form
        outputs.append(last_hidden(network, input_ids=ids))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=1e-12, rtol=1e-12)


def test_parts_of_a_model_on_several_gpus():
    """What the first layer's device knows of the tokens is needed on the last layer's device."""
    with FakeTensorMode():
        hidden_states = torch.empty(1, 6, 8, device="cuda:1")
        places = torch.empty(6, dtype=torch.long, device="cuda:0")
        assert repad(hidden_states, places, (2, 5)).device == hidden_states.device
        labels = torch.empty(1, 6, dtype=torch.long, device="cuda:0")
        labels, _ = check_token_labels(labels, hidden_states, 3, {})
        assert labels.device == hidden_states.device
        images = torch.empty(1, 3, 4, 4, device="cuda:0")
        mask = torch.empty(1, 2, 2, dtype=torch.bool, device="cuda:0")
        assert pixel_loss(images.to("cuda:1"), images, mask).device == hidden_states.device


def test_device_map_and_meta_loading(tmp_path):
    """Loading goes through the meta device.

    Nothing computed at construction may be lost on the way.
    """
    network = model("ImageClassification", image_config("decay", "snake"))
    network.save_pretrained(tmp_path)
    loaded = LionForImageClassification.from_pretrained(tmp_path, device_map="cpu")
    assert not [n for n, t in (*loaded.named_parameters(), *loaded.named_buffers()) if t.is_meta]
    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(pixels).logits, network(pixels).logits)


def test_loading_an_encoder_into_a_head_initialises_only_the_head(tmp_path):
    encoder = model("Model", text_config())
    encoder.save_pretrained(tmp_path)
    loaded, info = LionForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"dense", "norm", "decoder"}
    for name, parameter in loaded.lion.named_parameters():
        assert torch.equal(parameter, encoder.get_parameter(name)), name
    assert loaded.dense.weight.std() < 1 and (loaded.norm.weight == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("modality", ("text", "image"))
def test_compile_without_graph_breaks(modality, form):
    head = "MaskedLM" if modality == "text" else "ImageClassification"
    network = model(head, config_of(modality, attention_form=form, num_hidden_layers=1))
    inputs = inputs_of(head, network.config, length=6)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs).logits, network(**inputs).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("mask_type, patch_order", IMAGE_FAMILIES)
def test_export_images_of_any_batch(mask_type, patch_order):
    network = model("ImageClassification", image_config(mask_type, patch_order))
    example = (torch.randn(2, 3, 16, 16),)
    program = torch.export.export(
        network, example, dynamic_shapes={"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    )
    pixels = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(
        program.module()(pixels).logits, network(pixels).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "head", ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
)
def test_export_texts_of_any_batch_and_length(head):
    network = model(head, text_config())
    example = {
        "input_ids": token_ids(2, 9),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
    }
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(network, (), example, dynamic_shapes=dict.fromkeys(example, axes))
    other = {"input_ids": token_ids(3, 14), "attention_mask": torch.ones(3, 14, dtype=torch.long)}
    for inputs in (example, other):
        real = inputs["attention_mask"].bool()
        for a, b in zip(program.module()(**inputs).to_tuple(), network(**inputs).to_tuple()):
            if head != "SequenceClassification":  # the outputs at padding mean nothing
                a, b = a[real], b[real]
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ---- mistakes ----


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_checked_at_once_and_on_assignment(name):
    message = re.escape(f"{name}='chnk': expected one of {CHOICES[name]}")
    with pytest.raises(ValueError, match=message):
        LionConfig(**{name: "chnk"})
    with pytest.raises(ValueError, match=message):
        setattr(LionConfig(), name, "chnk")


def test_fields_given_to_from_pretrained_are_resolved_and_checked(tmp_path):
    """Another family brings its own choices along.

    It does not where the folder's were not the family's. Nonsense raises.
    """
    text_config("selective", layer_norm_eps=1e-5).save_pretrained(tmp_path)
    lit = LionConfig.from_pretrained(tmp_path, mask_type="lit", hidden_dropout_prob=0.3)
    assert (lit.attention_norm, lit.use_position_embeddings) == (True, True)
    assert (lit.hidden_dropout_prob, lit.layer_norm_eps) == (0.3, 1e-5)
    image_config("selective").save_pretrained(tmp_path)
    assert LionConfig.from_pretrained(tmp_path, mask_type="lit").feature_map == "elu_plus_one"
    assert LionConfig.from_pretrained(tmp_path, mask_type="decay").feature_map == "normalized_silu"
    for change in (
        {"num_attention_heads": 5},
        {"image_size": 18},
        {"mask_type": "lyt"},
        {"chunk_size": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            LionConfig.from_pretrained(tmp_path, **change)
    _, unused = LionConfig.from_pretrained(
        tmp_path, chunk_size=3, other=1, return_unused_kwargs=True
    )
    assert unused == {"other": 1}


def test_a_config_changed_after_its_checks_makes_no_model():
    config = text_config()
    config.num_attention_heads = 5
    with pytest.raises(
        ValueError, match="hidden_size=24 is not a multiple of num_attention_heads=5"
    ):
        LionModel(config)


@pytest.mark.parametrize("autocast", (False, True), ids=("float32", "autocast"))
def test_an_mlp_in_pieces_gives_the_same(autocast, monkeypatch):
    """Without gradients it takes some tokens at a time; value and type are those of all at once."""
    monkeypatch.setattr(lion_layers, "MLP_TOKENS", 7)
    mlp, x = lion_layers.LionMLP(text_config()), torch.randn(3, 5, 24)
    with torch.autocast("cpu", enabled=autocast):
        expected = mlp(x)
        with torch.no_grad():
            output = mlp(x)
    assert output.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(output, expected)
    with torch.no_grad():  # an input of other strides
        torch.testing.assert_close(mlp(x.transpose(0, 1)), mlp(x).transpose(0, 1))


def test_train_an_exported_program():
    """It keeps no states for the backward pass, which then computes them again.

    In several chunks and in one.
    """
    network = model("MaskedLM", text_config())  # chunks of 5
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        network, (), {"input_ids": token_ids(2, 9)}, dynamic_shapes={"input_ids": axes}
    )
    for length in (4, 13):
        inputs = {"input_ids": token_ids(3, length)}
        found, expected = program.module(), network
        for one in (found, expected):
            one.zero_grad()
            one(**inputs).logits.square().mean().backward()
        gradients = dict(found.named_parameters())
        for name, parameter in expected.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(
                    gradients[name].grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name
                )


def test_every_named_feature_map_exists():
    assert tuple(FEATURE_MAPS) == FEATURE_MAP_NAMES


@pytest.mark.parametrize(
    "name, definition",
    [
        ("elu_plus_one", lambda x: F.elu(x) + 1),
        ("normalized_silu", lambda x: F.normalize(F.silu(x) + 0.5, dim=-1)),
        ("sqrt_softmax", lambda x: F.normalize((x / 2).exp(), dim=-1)),
        ("exponential", lambda x: torch.stack([x, -x], 1).exp().flatten(1) / 16),
    ],
)
def test_feature_maps(name, definition):
    """The same numbers and gradients with and without autograd, and the input is left as it was."""
    x = torch.cat([torch.randn(5, 8) * 3, torch.zeros(1, 8)]).double().requires_grad_()
    before, expected = x.detach().clone(), definition(x)
    torch.testing.assert_close(FEATURE_MAPS[name](x), expected)
    torch.testing.assert_close(FEATURE_MAPS[name](x.detach()), expected.detach())
    assert torch.equal(x, before)
    weight = torch.randn_like(expected)
    found, right = (
        torch.autograd.grad((y * weight).sum(), x)[0] for y in (FEATURE_MAPS[name](x), expected)
    )
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk_size": 0}, "chunk_size=0: expected None or an integer of at least 1"),
        ({"hidden_size": 100}, "hidden_size=100 is not a multiple of num_attention_heads=12"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: expected an integer of at least 1"),
        ({"num_attention_heads": -3}, "num_attention_heads=-3: expected an integer of at least 1"),
        ({"hidden_size": -12}, "hidden_size=-12: expected an integer of at least 1"),
        ({"intermediate_size": 0}, "intermediate_size=0: expected an integer of at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1: expected an integer of at least 0"),
        ({"hidden_size": 12.0}, "hidden_size=12.0: expected int"),
        ({"num_attention_heads": "4"}, "num_attention_heads='4': expected int"),
        ({"chunk_size": 2.5}, "chunk_size=2.5: expected int | None"),
        ({"qkv_bias": "no"}, "qkv_bias='no': expected bool"),
        ({"modality": None}, "modality=None: expected str"),
        (
            {"modality": "image", "image_size": 30},
            "image_size=30: expected multiples of patch_size=16",
        ),
        (
            {"modality": "image", "image_size": [32, 40]},
            "image_size=[32, 40]: expected multiples of patch_size=16",
        ),
        (
            {"modality": "image", "image_size": [32]},
            "image_size=[32]: expected one integer or a pair (height, width)",
        ),
        ({"patch_order": "snake"}, "patch_order='snake' with modality='text': expected 'raster'"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob=1.5: expected a probability in [0, 1)"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0: expected a probability in [0, 1)"),
        ({"hidden_act": "foo"}, "hidden_act='foo': expected one of ['gelu'"),
    ],
)
def test_configs_that_make_no_model(change, message):
    """One line that begins with the field and its value."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LionConfig(**change)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_field_that_is_assigned_another_type():
    config = text_config()
    with pytest.raises(ValueError, match="^hidden_size='x': expected int$"):
        config.hidden_size = "x"


@pytest.mark.parametrize("form", ("recurrent", "chunk"))
def test_score_dropout_needs_a_form_with_scores(form):
    check_score_dropout(text_config(attention_form=form, attention_probs_dropout_prob=0))
    check_score_dropout(text_config(attention_form="auto", attention_probs_dropout_prob=0.1))
    check_score_dropout(BertConfig())  # one without our fields
    message = (
        f"attention_probs_dropout_prob=0.1 with attention_form='{form}': this form stores no scores"
    )
    with pytest.raises(ValueError, match=message):
        check_score_dropout(text_config(attention_form=form, attention_probs_dropout_prob=0.1))


@pytest.mark.parametrize(
    "head, change, message",
    [
        (
            "Model",
            {"pixel_values": torch.ones(1, 3, 16, 16)},
            "a text model takes either input_ids or inputs_embeds",
        ),
        ("Model", {"input_ids": None}, "a text model takes either input_ids or inputs_embeds"),
        (
            "Model",
            {"attention_mask": torch.ones(2, 10)},
            "attention_mask (2, 10): expected (batch, length) = (2, 11)",
        ),
        (
            "Model",
            {"attention_mask": torch.ones(2, 1, 11, 11)},
            "attention_mask (2, 1, 11, 11): expected (batch, length)",
        ),
        ("Model", {"cu_seq_lens_q": torch.tensor([0, 11])}, "cu_seq_lens_q with a batch of 2 rows"),
        (
            "SequenceClassification",
            {"seq_idx": torch.arange(11)[None] // 6},
            "seq_idx with LionForSequenceClassification: it pools one",
        ),
        (
            "SequenceClassification",
            {"position_ids": torch.arange(11)[None] % 6},
            "position_ids that restart with LionFor",
        ),
        (
            "MultipleChoice",
            {"position_ids": (torch.arange(11) % 6).expand(2, 4, -1)},
            "position_ids that restart with LionFor",
        ),
        (
            "MultipleChoice",
            {"input_ids": torch.ones(2, 11)},
            "input_ids (2, 11): expected (batch, choices, length)",
        ),
        (
            "Model",
            {"position_ids": torch.arange(7)[None]},
            "position_ids (1, 7): expected (batch or 1, length) = (2, 11)",
        ),
        (
            "Model",
            {"seq_idx": torch.ones(11)},
            "seq_idx (11,): expected (batch or 1, length) = (2, 11)",
        ),
        (
            "Model",
            {"attention_mask": torch.full((2, 11), -1e9)},
            "attention_mask has negative entries: expected 1 for tokens",
        ),
        (
            "Model",
            {"input_ids": torch.ones(2, 0, dtype=torch.long), "attention_mask": None},
            "expected at least one token",
        ),
    ],
)
def test_text_inputs_that_fit_no_model(head, change, message):
    network = model(head, text_config())
    with pytest.raises(ValueError, match=re.escape(message)):
        network(**inputs_of(head, network.config) | change)


@pytest.mark.parametrize("offsets", ([4, 7], [0, 20], [0, 8, 4], []), ids=str)
def test_offsets_that_are_no_offsets(offsets):
    with pytest.raises(ValueError, match="cu_seq_lens_q .*: expected offsets"):
        model("Model", text_config())(
            token_ids(1, 11), cu_seq_lens_q=torch.tensor(offsets, dtype=torch.int32)
        )


def test_text_above_the_longest_position():
    network = model("Model", text_config("lit"))
    with pytest.raises(
        ValueError,
        match="positions from 0 to 64: expected 0 to 63, because max_position_embeddings=64",
    ):
        network(token_ids(1, 65))
    with pytest.raises(ValueError, match="positions from 0 to 70"):
        network(token_ids(1, 3), position_ids=torch.tensor([[0, 1, 70]]))
    padded = torch.cat([torch.zeros(1, 10), torch.ones(1, 60)], dim=1)
    assert last_hidden(network, input_ids=token_ids(1, 70), attention_mask=padded).shape == (
        1,
        70,
        24,
    )
    assert last_hidden(model("Model", text_config("decay")), input_ids=token_ids(1, 200)).shape == (
        1,
        200,
        24,
    )


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 16, 18), "image of 16 x 18 pixels: expected multiples of patch_size=4"),
        ((1, 3, 0, 16), "image of 0 x 16 pixels: expected multiples of patch_size=4"),
        ((1, 1, 16, 16), "pixel_values (1, 1, 16, 16): expected (batch, 3, height, width)"),
        ((3, 16, 16), "pixel_values (3, 16, 16): expected (batch, 3, height, width)"),
    ],
)
def test_images_that_fit_no_model(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model("Model", image_config())(pixel_values=torch.ones(shape))
    with pytest.raises(ValueError, match="an image model takes pixel_values"):
        model("Model", image_config())(input_ids=token_ids(1, 4))
    with pytest.raises(
        ValueError, match=re.escape("bool_masked_pos (1, 9): expected (batch, patches) = (1, 16)")
    ):
        model("MaskedImageModeling", image_config())(
            torch.ones(1, 3, 16, 16), bool_masked_pos=torch.ones(1, 9)
        )
    with pytest.raises(ValueError, match="without mask token"):
        model("Model", image_config())(
            pixel_values=torch.ones(1, 3, 16, 16), bool_masked_pos=torch.ones(1, 16)
        )


@pytest.mark.parametrize(
    "name", ("attention_mask", "token_type_ids", "position_ids", "seq_idx", "cu_seq_lens_q")
)
@pytest.mark.parametrize("head", ("Model", "ImageClassification"))
def test_inputs_of_texts_are_not_ignored_by_image_models(head, name):
    network = model(head, image_config())
    with pytest.raises(ValueError, match=re.escape(f"takes pixel_values (and no {name})")):
        network(pixel_values=torch.ones(1, 3, 16, 16), **{name: torch.ones(1, 17).long()})


def test_inputs_of_images_are_not_ignored_by_text_models():
    with pytest.raises(ValueError, match=re.escape("inputs_embeds (and no bool_masked_pos)")):
        model("Model", text_config())(token_ids(1, 4), bool_masked_pos=torch.ones(1, 4))


def test_heads_refuse_the_other_modality():
    with pytest.raises(
        ValueError,
        match=re.escape("LionForMaskedLM with modality='image': expected one of ('text',)"),
    ):
        LionForMaskedLM(image_config())
    with pytest.raises(
        ValueError, match=re.escape("LionForImageClassification with modality='text'")
    ):
        LionForImageClassification(text_config())


def test_registration_can_be_repeated():
    lion_hf.auto.register()
    assert type(AutoModel.from_config(text_config())) is LionModel
    assert isinstance(
        AutoModel.from_config(text_config()).eval()(token_ids(1, 3)), BaseModelOutputWithPooling
    )
