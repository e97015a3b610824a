"""Models inside torch.func's transforms, and on tensors without values.

Nothing may branch on what is not there.
"""

import pytest
import torch
from support.models import image_config, model, text_config, token_ids
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

from lion_hf import lion_attention
from lion_hf.modeling import lion_ops
from lion_hf.modeling.configuration_lion import ATTENTION_FORMS, FORMS, MASK_TYPES
from lion_hf.modeling.lion_numerics import has_values


def per_sample_gradients(network, inputs, labels):
    """Found by vmap of grad, and one sample after the other."""
    parameters = {name: x.detach() for name, x in network.named_parameters()}

    def loss(parameters, label, *row):
        output = functional_call(
            network, parameters, kwargs=dict(zip(inputs, (x[None] for x in row)))
        )
        return F.cross_entropy(output.logits, label[None])

    rows = tuple(inputs.values())
    found = vmap(grad(loss), in_dims=(None, *[0] * (1 + len(rows))))(parameters, labels, *rows)
    network.config.attention_form = "attention"  # the definition
    singly = [grad(loss)(parameters, labels[n], *(x[n] for x in rows)) for n in range(len(labels))]
    return found, {name: torch.stack([one[name] for one in singly]) for name in parameters}


def compare(found, expected):
    assert sum(x.abs().sum() for x in expected.values()) > 1
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], x, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("form", ["auto", "attention", "recurrent", "chunk"])
@pytest.mark.parametrize("dtype", [torch.long, torch.float32, None], ids=str)
def test_per_sample_gradients(mask_type, form, dtype):
    network = model(
        "SequenceClassification",
        text_config(mask_type, attention_form=form, attention_probs_dropout_prob=0),
    )
    inputs = {"input_ids": token_ids(3, 9)}
    if dtype is not None:
        inputs["attention_mask"] = torch.ones(3, 9, dtype=dtype)
        inputs["attention_mask"][1, 5:] = 0
    compare(*per_sample_gradients(network, inputs, torch.tensor([0, 1, 2])))


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_per_sample_gradients_of_images(chunk_size):
    network = model(
        "ImageClassification",
        image_config("selective", "snake", attention_form="chunk", chunk_size=chunk_size),
    )
    compare(
        *per_sample_gradients(
            network, {"pixel_values": torch.randn(3, 3, 16, 16)}, torch.tensor([0, 1, 2])
        )
    )


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_batches_of_batches(mask_type):
    """vmap alone, with padding that "auto" would take out of a plain batch."""
    network = model("SequenceClassification", text_config(mask_type))
    length = 60 if mask_type == "lit" else 80  # lit has 64 positions
    input_ids, attention_mask = token_ids(6, length), torch.ones(6, length)
    attention_mask[::2, 20:] = 0
    with torch.no_grad():
        expected = network(input_ids, attention_mask).logits
        found = vmap(lambda ids, mask: network(ids, mask).logits)(
            *(x.unflatten(0, (2, 3)) for x in (input_ids, attention_mask))
        )
    torch.testing.assert_close(found.flatten(0, 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("feature_map", ("elu_plus_one", "normalized_silu", "sqrt_softmax"))
@pytest.mark.parametrize("form", FORMS)
def test_gradients_from_outside_of_vmap(form, feature_map):
    """Inside it no tensor says that it requires a gradient.

    And yet nothing that is recorded may be written over.
    """
    x = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.full((1, 2, 1), -0.1, dtype=torch.float64)

    def run(x):
        return lion_attention(x, x, x, gates, feature_map=feature_map, form=form)

    found, expected = (
        torch.autograd.grad(y.square().sum(), x)[0]
        for y in (vmap(run)(x), torch.stack([*map(run, x)]))
    )
    torch.testing.assert_close(found, expected)


def test_jacobian_of_the_chunk_form():
    query, key, value = torch.randn(3, 1, 2, 12, 4, dtype=torch.float64)
    gates = F.logsigmoid(torch.randn(1, 2, 12, dtype=torch.float64))
    jacobians = [
        jacrev(
            lambda gates, form=form: lion_attention(
                query, key, value, gates, form=form, chunk_size=5
            )
        )(gates)
        for form in ("attention", "chunk")
    ]
    assert jacobians[0].abs().max() > 0.1
    torch.testing.assert_close(jacobians[1], jacobians[0], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["fake", "meta"])
def test_tensors_without_values(dtype, device):
    """Shapes of a padded batch, as those ask who plan memory before anything is loaded."""
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        network = model("SequenceClassification", text_config())
        inputs = {
            "input_ids": torch.ones(2, 9, dtype=torch.long),
            "attention_mask": torch.ones(2, 9, dtype=dtype),
        }
        inputs["position_ids"] = torch.zeros(2, 9, dtype=torch.long)
        inputs["labels"] = torch.ones(2, dtype=torch.long)
        assert network(**inputs).logits.shape == (2, 3)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_nothing_is_made_on_another_device_than_the_models(mask_type, monkeypatch):
    """On a pretended GPU, which need not be there: padding and documents, in every form."""
    one = {"num_hidden_layers": 1}  # pretending is slow
    table = {key: backend for key, backend in lion_ops.TABLE.items() if key[0] == "torch"}
    monkeypatch.setattr(lion_ops, "TABLE", table)  # kernels ask the GPU what it can do
    with FakeTensorMode():
        with torch.device("cuda:0"):
            network = model("MaskedLM", text_config(mask_type, conv_kernel_size=3, **one))
            ids = torch.ones(2, 9, dtype=torch.long)
        for form in ATTENTION_FORMS:
            network.config.attention_form = form
            for marks in ({"attention_mask": ids}, {"position_ids": ids}, {"seq_idx": ids}):
                assert network(ids, labels=ids, **marks).loss.device == ids.device


@pytest.mark.parametrize("capturing", (False, True))
def test_tensors_that_are_captured_in_a_cuda_graph(capturing, monkeypatch):
    """Looking at values would end the capture."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert has_values(torch.ones(2, 9)) is not capturing


def test_plain_tensors_are_still_looked_at():
    network = model("SequenceClassification", text_config())
    for wrong in (
        {"input_ids": torch.full((2, 9), 99)},
        {"input_ids": token_ids(2, 9), "attention_mask": -torch.ones(2, 9)},
    ):
        with pytest.raises(ValueError, match="expected"):
            network(**wrong)
