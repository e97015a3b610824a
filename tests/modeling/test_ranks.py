"""One row in several processes: outputs, loss and gradients of the row in one process."""

import json

import pytest
import torch
from support.launches import ROOT, TORCHRUN, start
from support.models import image_config, model, text_config, token_ids
from torch import distributed

from lion_hf.modeling.lion_ranks import sequence_parallel

WORKER = str(ROOT / "tests/support/sequence_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("count", ["2", "4"])
def test_processes_give_what_one_gives(tmp_path, count):
    command = [count if word == "2" else word for word in TORCHRUN]
    start([command], WORKER, str(tmp_path))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"{rank}.json" for rank in range(int(count))]
    for file in files:
        for case, found in json.loads(file.read_text()).items():
            assert max(found["logits"], found["gradients"]) < 1e-11, (file.name, case, found)
            assert found["loss"] < 1e-5, (file.name, case, found)  # which is taken in float32
            assert found["alone"] > 1e-3, (file.name, case, found)


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_a_group_of_one(one_process):
    made, ids = model("Model", text_config(conv_kernel_size=3)), token_ids(2, 9)
    expected = made(ids).last_hidden_state
    with sequence_parallel(made) as ranks:
        assert ranks.piece_of(9) == slice(0, 9)
        found = made(ids).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all(layer.attention.ranks is None for layer in made.layers)


@pytest.mark.parametrize(
    "inputs,fields,message",
    [
        ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, {}, "attention_mask has padding"),
        ({"seq_idx": torch.tensor([[0] * 4 + [1] * 5])}, {}, "seq_idx has several documents"),
        ({"output_attentions": True}, {}, "output_attentions=True with sequence_parallel"),
        ({}, {"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob=0.1 with"),
    ],
)
def test_what_is_not_possible_in_pieces(one_process, inputs, fields, message):
    made = model("Model", text_config(attention_form="chunk", **fields))
    if fields:
        made.config.attention_form = "auto"
        made.train()
    with sequence_parallel(made), pytest.raises(ValueError, match=message):
        made(token_ids(1, 9), **inputs)


def test_which_models_are_refused(one_process):
    with pytest.raises(ValueError, match="Linear: expected a model with a LION encoder"):
        sequence_parallel(torch.nn.Linear(2, 2)).__enter__()
    with pytest.raises(ValueError, match="LionModel: expected a model with a LION encoder for"):
        sequence_parallel(model("Model", image_config())).__enter__()


def test_torch_distributed_must_run():
    with pytest.raises(ValueError, match="expected init_process_group before"):
        sequence_parallel(model("Model", text_config())).__enter__()
