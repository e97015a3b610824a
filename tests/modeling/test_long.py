"""Long documents in pieces: what the whole forward pass gives, resumable, in bounded memory."""

import copy
import errno
import json
import signal
import subprocess
import sys
import textwrap
import time
from itertools import product

import numpy
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from support.marks import slow_except
from support.models import image_config, model, text_config, token_ids
from support.pages import ROOT
from torch.testing._internal.two_tensor import TwoTensor

from lion_hf.modeling import lion_long, lion_long_files
from lion_hf.modeling.configuration_lion import (
    FEATURE_MAP_NAMES,
    FORMS,
    MASK_TYPES,
    LionConfig,
)
from lion_hf.modeling.lion_long_marks import fingerprints

LENGTH = 61
MODERN = {
    "pre_norm": True,
    "gated_mlp": True,
    "normalize_attention": True,
    "feature_map": "sqrt_softmax",
    "attention_norm": True,
    "conv_placement": "inputs",
}
BLOCKS = {"paper": {}, "modern": MODERN}
PIECES = (1, 7, 30, LENGTH, 100)


def network(mask_type: str = "selective", head: str = "Model", **fields) -> torch.nn.Module:
    """In float64, with convolutions that are far from the identity."""
    made = model(head, text_config(mask_type, **fields)).double()
    for name, parameter in made.named_parameters():
        if "_conv" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return made


@torch.no_grad()
def whole(made: torch.nn.Module, ids: torch.Tensor):
    assert ids.shape[1] <= lion_long.LONGEST_WHOLE  # else it would be computed in pieces
    return made(ids)


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.fixture
def mapped(monkeypatch):
    """No document is small enough for memory."""
    monkeypatch.setattr(lion_long_files, "LARGEST_IN_MEMORY", 0)


class TestExact:
    @pytest.mark.parametrize(
        "mask_type,block,width",
        slow_except(
            product(MASK_TYPES, BLOCKS, (None, 1, 3, 7)),
            ("lit", "modern", 7),
            ("decay", "paper", None),
            ("selective", "modern", 3),
        ),
    )
    def test_pieces_give_what_the_whole_gives(self, mask_type, block, width):
        """Pieces may be shorter than what a convolution sees of their neighbours."""
        made, ids = (
            network(mask_type, conv_kernel_size=width, **BLOCKS[block]),
            token_ids(1, LENGTH),
        )
        expected = whole(made, ids)
        for piece in PIECES:
            found = made.encode_long(ids, piece=piece, pooling=None)
            assert_close(found.last_hidden_state, expected.last_hidden_state)
            assert_close(found.pooler_output, expected.pooler_output)

    @pytest.mark.parametrize("feature_map", FEATURE_MAP_NAMES)
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("form", FORMS)
    def test_any_feature_map_and_form(self, feature_map, normalize, form):
        fields = {"feature_map": feature_map, "normalize_attention": normalize}
        made = network(attention_form=form, chunk_size=4, **fields)
        ids = token_ids(1, LENGTH)
        found = made.encode_long(ids, piece=13, pooling=None)
        assert_close(found.last_hidden_state, whole(made, ids).last_hidden_state)

    @pytest.mark.parametrize("mask_type", MASK_TYPES)
    def test_learned_positions_go_on_from_piece_to_piece(self, mask_type):
        made, ids = network(mask_type, use_position_embeddings=True), token_ids(1, LENGTH)
        found = made.encode_long(ids, piece=9, pooling=None)
        assert_close(found.last_hidden_state, whole(made, ids).last_hidden_state)

    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    @pytest.mark.parametrize("mask_type", MASK_TYPES)
    def test_pooled_as_the_models_pooler_does(self, mask_type, pooling):
        made, ids = network(mask_type, classifier_pooling=pooling), token_ids(1, LENGTH)
        expected = whole(made, ids)
        found = made.encode_long(ids, piece=10, pooling=pooling)
        assert found.last_hidden_state is None and found.span_embeddings is None
        assert_close(found.pooler_output, expected.pooler_output)
        states = expected.last_hidden_state
        assert_close(found.pooled, states[:, 0] if pooling == "cls" else states.mean(1))

    @pytest.mark.parametrize("block", BLOCKS)
    @pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
    def test_in_the_models_type(self, dtype, atol, block):
        made = network(conv_kernel_size=3, **BLOCKS[block]).to(dtype)
        ids = token_ids(1, LENGTH)
        expected, found = whole(made, ids), made.encode_long(ids, piece=16, pooling=None)
        assert found.last_hidden_state.dtype == found.pooler_output.dtype == dtype
        assert_close(found.last_hidden_state, expected.last_hidden_state, atol)

    def test_no_layers_and_no_pooler(self):
        made, ids = network(num_hidden_layers=0, pre_norm=True), token_ids(1, LENGTH)
        made.pooler = None
        found = made.encode_long(ids, piece=8, pooling=None)
        assert found.pooler_output is None
        assert_close(found.last_hidden_state, whole(made, ids).last_hidden_state)

    def test_under_autocast(self):
        made, ids = network(**MODERN).float(), token_ids(1, LENGTH)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = whole(made, ids), made.encode_long(ids, piece=16, pooling=None)
        assert found.last_hidden_state.dtype == expected.last_hidden_state.dtype
        assert_close(found.last_hidden_state, expected.last_hidden_state, 0.1)

    def test_nothing_is_recorded_for_gradients(self):
        found = network().encode_long(token_ids(1, LENGTH), spans=9)
        assert not found.pooled.requires_grad and not found.span_embeddings.requires_grad


class TestInputs:
    @pytest.mark.parametrize(
        "given",
        [
            lambda ids: ids,
            lambda ids: ids[0].int(),
            lambda ids: ids[0].tolist(),
            lambda ids: iter(ids[0].tolist()),
            lambda ids: iter(ids[0].numpy()),
            lambda ids: (part for part in ids[0].split(5)),
            lambda ids: (part[None] for part in ids[0].split(5)),
            lambda ids: (part.tolist() for part in ids[0].tensor_split([0, 4, 4, 40])),
            lambda ids: (part.repeat_interleave(2)[::2] for part in ids[0].split(5)),
            lambda ids: ids.numpy().astype("uint16"),
        ],
        ids=(
            *("row", "flat", "list", "ints", "numpy", "tensors", "rows", "lists", "strided"),
            "array",
        ),
    )
    def test_ids_come_in_many_ways(self, given):
        made, ids = network(), token_ids(1, LENGTH)
        expected = made.encode_long(ids, piece=20).pooled
        assert torch.equal(made.encode_long(given(ids), piece=20).pooled, expected)

    def test_span_ends_may_be_anywhere(self):
        made, ids = network(**MODERN), token_ids(1, LENGTH)
        spans = [(0, 1), (60, 61), (0, LENGTH), (7, 33), (8, 12), (9, 50)]
        states = whole(made, ids).last_hidden_state[0]
        found = made.encode_long(ids, piece=10, spans=spans)
        expected = torch.stack([states[start:end].mean(0) for start, end in spans])
        assert_close(found.span_embeddings, expected[None])
        assert_close(found.pooled[0], expected[2])

    @pytest.mark.parametrize("size", [1, 8, 60, LENGTH, 1000])
    def test_windows_cover_the_document(self, size):
        made, ids = network(), token_ids(1, LENGTH)
        states = whole(made, ids).last_hidden_state[0]
        expected = torch.stack([part.mean(0) for part in states.split(size)])
        found = made.encode_long(ids, piece=10, spans=size).span_embeddings
        assert_close(found, expected[None])

    @pytest.mark.parametrize(
        "arguments,message",
        [
            ({"input_ids": []}, "input_ids is empty: expected at least one token"),
            ({"input_ids": iter(())}, "input_ids is empty"),
            ({"input_ids": torch.empty(1, 0).long()}, "input_ids is empty"),
            ({"input_ids": "a text"}, "input_ids is str: expected a tensor"),
            ({"input_ids": 7}, "input_ids is int: expected a tensor"),
            ({"input_ids": token_ids(2, 9)}, r"input_ids \(2, 9\): expected one document"),
            ({"input_ids": [5, 6.5]}, "input_ids gives 6.5 at position 1: expected token ids"),
            ({"input_ids": [[5, 6.5]]}, "input_ids is torch.float32: expected integers"),
            ({"input_ids": [5, "word"]}, "input_ids gives 'word' at position 1"),
            ({"input_ids": iter([5] * 44 + [99])}, "holds 99 at position 44: expected 0 to 98"),
            ({"input_ids": [[5] * 40, [5, -1]]}, "holds -1 at position 41: expected 0 to 98"),
            ({"input_ids": torch.tensor([[5, 6, 100]])}, "holds 100 at position 2"),
            ({"piece": 0}, "piece=0: expected an integer of at least 1"),
            ({"input_ids": token_ids(2, 9).numpy()}, r"input_ids \(2, 9\): expected one document"),
            ({"input_ids": numpy.array(["a"])}, "input_ids gives array.* expected token ids"),
            ({"input_ids": [5, torch.tensor(6.5)]}, "input_ids gives tensor.6.5.* at position 1"),
            ({"input_ids": [5, 10**30]}, "holds 1000.* at position 1: expected 0 to 98"),
            ({"input_ids": [[5, 10**30]]}, "input_ids gives .* at position 0: expected token ids"),
            ({"input_ids": token_ids(1, 9).to_sparse()}, "sparse.*: expected a dense tensor"),
            ({"piece": 2.0}, "piece=2.0: expected an integer"),
            ({"piece": True}, "piece=True: expected an integer"),
            ({"pooling": ["cls"]}, "pooling=.*cls.*: expected one of"),
            ({"pooling": "max"}, r"pooling='max': expected one of \('cls', 'mean', None\)"),
            ({"spans": 0}, "spans=0: expected windows of at least 1 token"),
            ({"spans": []}, "spans is empty: expected at least one pair"),
            ({"spans": [(0, 3), (4, 4)]}, r"spans holds \(4, 4\): expected 0 <= start < end <= 9"),
            ({"spans": [(3, 10)]}, r"spans holds \(3, 10\)"),
            ({"spans": [(-2, 3)]}, r"spans holds \(-2, 3\)"),
            ({"spans": [3, 4]}, r"spans=\[3, 4\]: expected pairs"),
            ({"spans": "words"}, "spans='words': expected pairs"),
            ({"spans": [(0.0, 3.7)]}, r"spans=\[\(0.0, 3.7\)\]: expected pairs"),
            ({"spans": ["05"]}, r"spans=\['05'\]: expected pairs"),
            ({"spans": [(False, True)]}, r"spans=\[\(False, True\)\]: expected pairs"),
            ({"cache": 7}, "cache=7: expected the name of a folder"),
            ({"cache": ""}, "cache='': expected the name of a folder"),
        ],
    )
    def test_what_is_refused(self, arguments, message, tmp_path):
        given = {"input_ids": token_ids(1, 9), "cache": tmp_path / "cache", **arguments}
        with pytest.raises(ValueError, match=message) as error:
            network().encode_long(**given)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "cache").exists()

    def test_which_models_are_refused(self):
        with pytest.raises(ValueError, match="modality='image': expected 'text'"):
            model("Model", image_config()).encode_long([5])
        with pytest.raises(ValueError, match="in training.* expected model.eval"):
            network().train().encode_long([5])
        made = network()
        made.layers[1].mlp.train()
        with pytest.raises(ValueError, match="in training.* expected model.eval"):
            made.encode_long([5])
        made = network()
        made.layers[0].attention.ranks = object()  # as within `sequence_parallel`
        with pytest.raises(ValueError, match="encode_long within sequence_parallel"):
            made.encode_long([5])
        with pytest.raises(ValueError, match=r"weights on \['meta'\]: expected one device"):
            network().to("meta").encode_long([5])
        with pytest.raises(ValueError, match="65 tokens: expected at most 64.*max_position_emb"):
            network("lit").encode_long([5] * 65)

    def test_numbers_of_numpy_and_torch(self):
        made, ids = network(), token_ids(1, LENGTH)
        expected = made.encode_long(ids, piece=10, spans=[(3, 9)]).span_embeddings
        for spans in ([numpy.array([3, 9])], torch.tensor([[3, 9]])):
            found = made.encode_long(ids, piece=numpy.int64(10), spans=spans)
            assert torch.equal(found.span_embeddings, expected)
        windows = made.encode_long(ids, piece=10, spans=numpy.int32(9)).span_embeddings
        assert torch.equal(windows, made.encode_long(ids, piece=10, spans=9).span_embeddings)

    def test_the_outputs_order_is_that_of_forward(self):
        made, ids = network(), token_ids(1, LENGTH)
        expected, found = whole(made, ids), made.encode_long(ids, pooling=None, spans=9)
        for output in (found, copy.copy(found), copy.deepcopy(found)):
            assert list(output)[:2] == list(expected)
            assert torch.equal(output[1], found.pooler_output)
            assert list(output) == [*expected, "pooled", "span_embeddings"]


def hooked(part: str):
    return lambda made: made.get_submodule(part).register_forward_hook(lambda *_: None)


def wrapped(made: torch.nn.Module) -> None:
    layer = made.layers[1]
    layer.forward = lambda *args, inner=layer.forward, **options: inner(*args, **options)


def accelerated(made: torch.nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    hooks.add_hook_to_module(made.layers[0].mlp, hooks.ModelHook())


WATCHERS = {
    "layer": hooked("layers.0"),
    "attention": hooked("layers.1.attention"),
    "mlp": hooked("layers.0.mlp"),
    "projection": hooked("layers.0.attention.q_proj"),
    "embeddings": hooked("embeddings"),
    "pooler": hooked("pooler"),
    "before": lambda made: made.layers[0].register_forward_pre_hook(lambda *_: None),
    "wrapped": wrapped,
    "accelerate": accelerated,
    "everywhere": lambda made: torch.nn.modules.module.register_module_forward_hook(
        lambda *_: None
    ),
}


@pytest.fixture
def no_hooks_left():
    yield
    torch.nn.modules.module._global_forward_hooks.clear()


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS)
def test_a_model_that_somebody_watches(watch, monkeypatch):
    """encode_long says so, and a long forward pass goes the ordinary way."""
    made, ids = network(), token_ids(1, LENGTH)
    watch(made)
    with pytest.raises(ValueError, match="encode_long of a model with .*expected no hooks"):
        made.encode_long(ids)
    monkeypatch.setattr(lion_long, "LONGEST_WHOLE", LENGTH - 1)
    monkeypatch.setattr(lion_long, "encode_long", None)
    with torch.no_grad():
        assert made(ids).last_hidden_state.shape == (1, LENGTH, 24)


def test_hooks_for_gradient_checkpointing_do_no_harm():
    made, ids = network(), token_ids(1, LENGTH)
    expected = made.encode_long(ids).pooled
    made.enable_input_require_grads()
    assert torch.equal(made.encode_long(ids).pooled, expected)


class TestFiles:
    @pytest.mark.parametrize("layers", [1, 2])
    def test_mapped_states_are_those_in_memory(self, mapped, layers, tmp_path, monkeypatch):
        monkeypatch.setattr(lion_long_files.tempfile, "tempdir", str(tmp_path))
        made, ids = network(num_hidden_layers=layers, **MODERN), token_ids(1, LENGTH)
        found = made.encode_long(ids, piece=10, pooling=None)
        assert list(tmp_path.iterdir()) == []  # the result outlives the file's name
        assert_close(found.last_hidden_state, whole(made, ids).last_hidden_state)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_a_cache_keeps_the_last_hidden_states(self, tmp_path, dtype):
        made, ids = network().to(dtype), token_ids(1, LENGTH)
        found = made.encode_long(ids, piece=10, pooling=None, cache=tmp_path)
        files = sorted(path.name for path in tmp_path.iterdir())
        assert files == ["hidden_states_0.safetensors", "lock", "record.safetensors"]
        kept = load_file(tmp_path / files[0])
        assert torch.equal(kept["hidden_states"], found.last_hidden_state[0])

    def test_a_finished_cache_answers_without_the_layers(self, tmp_path, monkeypatch):
        made, ids = network(), token_ids(1, LENGTH)
        expected = made.encode_long(ids, piece=10, spans=7, cache=tmp_path)
        # the sample of the first tokens, and nothing else
        monkeypatch.setattr(lion_long, "state_to_the_left", None)
        found = made.encode_long(ids, piece=10, pooling="cls", spans=7, cache=str(tmp_path))
        assert torch.equal(found.span_embeddings, expected.span_embeddings)
        states = made.encode_long(ids, piece=10, pooling=None, cache=tmp_path).last_hidden_state
        assert torch.equal(found.pooled, states[:, 0])

    @pytest.mark.parametrize("mask_type", slow_except(MASK_TYPES, "selective"))
    def test_broken_off_anywhere_it_goes_on(self, tmp_path, monkeypatch, mask_type):
        """No piece of a layer is computed twice, and the result is the same bit for bit."""
        made, ids = network(mask_type, conv_kernel_size=3, **MODERN), token_ids(1, LENGTH)
        expected = made.encode_long(ids, piece=20, pooling=None).last_hidden_state
        save, attend = lion_long_files.Cache.save, lion_long.mix_piece
        computed, saved = [], []

        def count(*args, **kwargs):
            tokens = args[1].heads["q"].shape[2]
            computed.extend([tokens] * (tokens != lion_long.SAMPLED))
            return attend(*args, **kwargs)

        def stop(cache, progress):
            if len(saved) == limit:
                raise KeyboardInterrupt
            saved.append(progress)
            save(cache, progress)

        monkeypatch.setattr(lion_long, "mix_piece", count)
        saves = 1 + 2 * (4 + 1)  # the embeddings, then four pieces and the end of both layers
        for limit in range(saves):
            computed.clear(), saved.clear()
            cache = tmp_path / str(limit)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(lion_long_files.Cache, "save", stop)
                made.encode_long(ids, piece=20, cache=cache)
            found = made.encode_long(ids, piece=20, pooling=None, cache=cache).last_hidden_state
            assert torch.equal(found, expected)
            # the piece whose record was not written is computed again
            assert len(computed) == 2 * 4 + (limit % 5 != 0 and limit > 0)

    @pytest.mark.parametrize("change", ["model", "document", "piece"])
    def test_a_cache_of_something_else(self, tmp_path, change):
        made, ids = network(), token_ids(1, LENGTH)
        made.encode_long(ids, piece=10, cache=tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        if change == "model":
            with torch.no_grad():
                made.layers[1].mlp.fc1.bias[3] += 1e-3
        if change == "document":
            ids[0, 50] = 5 if ids[0, 50] != 5 else 6
        with pytest.raises(ValueError, match=f"belongs to another {change}: expected an empty"):
            made.encode_long(ids, piece=11 if change == "piece" else 10, cache=tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_what_is_written_into_the_result_stays_out_of_the_cache(self, tmp_path):
        made, ids = network(), token_ids(1, LENGTH)
        expected = made.encode_long(ids, pooling=None).last_hidden_state
        for _ in range(3):  # when it is computed, and when it is read
            found = made.encode_long(ids, pooling=None, cache=tmp_path).last_hidden_state
            assert torch.equal(found, expected)
            found.mul_(0)
            assert not found.any()

    def test_a_finished_cache_may_be_read_only(self, tmp_path, monkeypatch):
        made, ids = network(), token_ids(1, LENGTH)
        expected = made.encode_long(ids, cache=tmp_path / "done")
        save = lion_long_files.Cache.save

        def stop(cache, progress):
            if progress.stage == 2:
                raise KeyboardInterrupt
            save(cache, progress)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(lion_long_files.Cache, "save", stop)
            made.encode_long(ids, cache=tmp_path / "begun")

        def read_only(file, mode="r"):
            if mode != "rb" and str(file).startswith(str(tmp_path)):
                raise PermissionError(13, "Permission denied", str(file))
            return open(file, mode)

        # for root, files have no permissions
        monkeypatch.setattr(lion_long_files, "open", read_only, raising=False)
        found = made.encode_long(ids, cache=tmp_path / "done")
        assert torch.equal(found.pooled, expected.pooled)
        with pytest.raises(ValueError, match="begun' cannot be written: expected a folder"):
            made.encode_long(ids, cache=tmp_path / "begun")

    def test_a_cache_of_other_adapters(self, tmp_path):
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        adapters = peft.LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False)
        made, ids = peft.get_peft_model(network(), adapters), token_ids(1, LENGTH)
        made.add_adapter("other", adapters)
        made.eval()
        made.encode_long(ids, cache=tmp_path)
        with (
            made.disable_adapter(),
            pytest.raises(ValueError, match="belongs to another model"),
        ):
            made.encode_long(ids, cache=tmp_path)
        made.set_adapter("other")
        with pytest.raises(ValueError, match="belongs to another model"):
            made.encode_long(ids, cache=tmp_path)
        made.set_adapter("default")
        made.encode_long(ids, cache=tmp_path)
        made.base_model.layers[0].mlp.fc1.scale_layer(0.5)
        with pytest.raises(ValueError, match="belongs to another model"):
            made.encode_long(ids, cache=tmp_path)

    def test_a_cache_of_another_output(self, tmp_path):
        """Whatever has changed: the model's first outputs are compared too."""
        made, ids = network(), token_ids(1, LENGTH)
        made.encode_long(ids, cache=tmp_path)
        made.layers[0].mlp.act = torch.nn.ReLU().eval()
        with pytest.raises(ValueError, match="belongs to another model"):
            made.encode_long(ids, cache=tmp_path)

    def test_a_cache_of_another_precision(self, tmp_path):
        made, ids = network().float(), token_ids(1, LENGTH)
        made.encode_long(ids, cache=tmp_path)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ValueError, match="belongs to another precision"),
        ):
            made.encode_long(ids, cache=tmp_path)

    def test_a_configuration_of_a_class_of_ones_own(self):
        class Own(LionConfig):
            model_type = "own-lion"
            extra: int = 1

        made, ids = network(), token_ids(1, LENGTH)[0]
        config = Own(**text_config().to_dict())
        before = fingerprints(made, config, ids, 10)
        assert fingerprints(made, config, ids, 10) == before
        config.chunk_size += 1
        assert fingerprints(made, config, ids, 10)["model"] != before["model"]

    def test_a_cache_of_a_quantised_model(self, tmp_path):
        """Whose state holds tensors made of others, and what is no tensor."""
        made, ids = network().float(), token_ids(1, LENGTH)
        part = made.layers[0].mlp
        part.get_extra_state = lambda: {"bits": 8}
        marks = set()
        for n in (1.0, 2.0):
            part.register_buffer("codes", TwoTensor(torch.ones(3), torch.full((3,), n)))
            marks.add(fingerprints(made, made.config, ids, 10)["model"])
        assert len(marks) == 2
        made.encode_long(ids, cache=tmp_path)

    @pytest.mark.parametrize("numbers", [(4, 0), (-1, 0), (1, 8), (0, 1), (3, 1), (1, 2)])
    def test_impossible_records(self, tmp_path, numbers):
        made, ids = network(), token_ids(1, LENGTH)
        made.encode_long(ids, piece=10, cache=tmp_path)
        record = tmp_path / "record.safetensors"
        with safe_open(record, "pt") as file:
            marks, sample = file.metadata(), file.get_tensor("sample")
        marks |= dict(zip(("stage", "pieces"), map(str, numbers)))
        save_file({"sample": sample}, record, metadata=marks)  # and no state behind a piece
        with pytest.raises(ValueError, match="record.safetensors was not written by encode_long"):
            made.encode_long(ids, piece=10, cache=tmp_path)

    def test_folders_that_cannot_be(self, tmp_path):
        made, ids = network(), token_ids(1, LENGTH)
        (tmp_path / "file").write_text("")
        (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
        for cache in (tmp_path / "file" / "below", tmp_path / "link"):
            with pytest.raises(ValueError, match="cannot be made .*: expected a folder") as error:
                made.encode_long(ids, cache=cache)
            assert "\n" not in str(error.value)

    def test_a_disk_that_fills_up_on_the_way(self, tmp_path, monkeypatch):
        made, ids = network(), token_ids(1, LENGTH)

        def full(*_, **__):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr(lion_long_files, "save_file", full)
            with pytest.raises(ValueError, match="cannot be written .*No space left"):
                made.encode_long(ids, cache=tmp_path)
        made.encode_long(ids, cache=tmp_path)

    def test_folders_that_are_no_cache(self, tmp_path):
        made, ids = network(), token_ids(1, LENGTH)
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="file' is a file: expected a folder"):
            made.encode_long(ids, cache=tmp_path / "file")
        record = tmp_path / "other" / "record.safetensors"
        record.parent.mkdir()
        record.write_text("{}")
        with pytest.raises(ValueError, match="record.safetensors was not written by encode_long"):
            made.encode_long(ids, cache=record.parent)
        made.encode_long(ids, cache=tmp_path / "cache")
        (tmp_path / "cache" / "hidden_states_0.safetensors").unlink()
        with pytest.raises(ValueError, match="hidden_states_0.safetensors is missing or has"):
            made.encode_long(ids, cache=tmp_path / "cache")

    def test_a_cache_in_use(self, tmp_path):
        made, ids = network(), token_ids(1, LENGTH)
        pytest.importorskip("fcntl", reason="Windows: the cache is not locked there")
        with (
            lion_long_files.Cache(tmp_path, {}, torch.zeros(1)).held(),
            pytest.raises(ValueError, match="is in use by another process"),
        ):
            made.encode_long(ids, cache=tmp_path)
        made.encode_long(ids, cache=tmp_path)

    def test_a_filesystem_without_locks(self, tmp_path, monkeypatch, caplog):
        made, ids = network(), token_ids(1, LENGTH)
        pytest.importorskip("fcntl", reason="Windows: the cache is not locked there")

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lion_long_files.fcntl, "flock", refuse)
        expected = made.encode_long(ids).pooled
        assert torch.equal(made.encode_long(ids, cache=tmp_path).pooled, expected)
        assert "its filesystem has no locks" in caplog.text

    def test_a_full_disk_is_seen_before_work(self, mapped, monkeypatch):
        usage = lion_long_files.shutil.disk_usage(".")._replace(free=1000)
        monkeypatch.setattr(lion_long_files.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(ValueError, match="0.00 GiB free: expected .* GiB for hidden states"):
            network().encode_long(token_ids(1, LENGTH))


class TestForwardPass:
    """One row beyond a length goes through the model in pieces by itself."""

    @pytest.fixture(autouse=True)
    def in_pieces(self, monkeypatch) -> list[int]:
        """The lengths of the rows that did."""
        rows, encode = [], lion_long.encode_long
        monkeypatch.setattr(lion_long, "PIECE", 10)

        def record(network, input_ids, **options):
            rows.append(input_ids.shape[1])
            return encode(network, input_ids, **options)

        monkeypatch.setattr(lion_long, "encode_long", record)
        return rows

    @pytest.mark.parametrize("head", ["Model", "TokenClassification", "QuestionAnswering"])
    @pytest.mark.parametrize("mask_type", MASK_TYPES)
    def test_heads_give_the_same(self, monkeypatch, in_pieces, mask_type, head):
        made, ids = network(mask_type, head, conv_kernel_size=3, **MODERN), token_ids(1, LENGTH)
        expected = whole(made, ids)
        assert in_pieces == []
        monkeypatch.setattr(lion_long, "LONGEST_WHOLE", LENGTH - 1)
        with torch.no_grad():
            plain = made(ids)
            padded = made(ids, torch.ones_like(ids), torch.zeros_like(ids))
        assert in_pieces == [LENGTH] * 2
        for found in (plain, padded):
            assert type(found) is type(expected) and found.keys() == expected.keys()
            for name, x in expected.items():
                assert_close(found[name], x)

    @pytest.mark.parametrize(
        "change",
        [
            lambda made, inputs: inputs.update(input_ids=inputs["input_ids"].repeat(2, 1)),
            lambda made, inputs: inputs.update(attention_mask=(inputs["input_ids"] > 9).long()),
            lambda made, inputs: inputs.update(token_type_ids=torch.ones(1, LENGTH).long()),
            lambda made, inputs: inputs.update(position_ids=torch.arange(LENGTH)[None] % 30),
            lambda made, inputs: inputs.update(seq_idx=torch.arange(LENGTH)[None] // 30),
            lambda made, inputs: inputs.update(cu_seq_lens_q=torch.tensor([0, 9, LENGTH])),
            lambda made, inputs: inputs.update(output_hidden_states=True),
            lambda made, inputs: inputs.update(output_attentions=True),
            lambda made, inputs: setattr(made.config, "attention_form", "chunk"),
            lambda made, inputs: made.layers[0].register_forward_hook(lambda *_: None),
            lambda made, inputs: made.train(),
            lambda made, inputs: torch.set_grad_enabled(True),
            lambda made, inputs: inputs.update(input_ids=inputs["input_ids"][:, :-1]),
        ],
        ids=(
            *("batch", "padding", "types", "positions", "documents", "offsets", "states", "maps"),
            *("form", "hook", "training", "gradients", "short"),
        ),
    )
    def test_who_goes_through_whole(self, monkeypatch, in_pieces, change):
        monkeypatch.setattr(lion_long, "LONGEST_WHOLE", LENGTH - 1)
        made, inputs = network(), {"input_ids": token_ids(1, LENGTH)}
        with torch.no_grad():
            change(made, inputs)
            made(**inputs)
        assert in_pieces == []

    @pytest.mark.parametrize("wrong", ["shape", "negative", "types", "list"])
    def test_inputs_are_checked_before(self, monkeypatch, in_pieces, wrong):
        made, ids = network(), token_ids(1, LENGTH)
        inputs = {
            "shape": {"attention_mask": torch.ones(1, LENGTH - 1)},
            "negative": {"attention_mask": torch.full((1, LENGTH), -1e4)},
            "types": {"token_type_ids": torch.zeros(1, LENGTH)},
            "list": {"attention_mask": [1] * LENGTH},
        }[wrong]
        with pytest.raises(ValueError) as expected, torch.no_grad():
            made(ids, **inputs)
        monkeypatch.setattr(lion_long, "LONGEST_WHOLE", LENGTH - 1)
        with pytest.raises(ValueError) as found, torch.no_grad():
            made(ids, **inputs)
        assert str(found.value) == str(expected.value) and in_pieces == []

    @pytest.mark.parametrize("trouble", ["full", "missing"])
    def test_without_temporary_files_it_stays_in_memory(
        self, monkeypatch, in_pieces, mapped, trouble, tmp_path
    ):
        made, ids = network(), token_ids(1, LENGTH)
        expected = whole(made, ids).last_hidden_state
        monkeypatch.setattr(lion_long, "LONGEST_WHOLE", LENGTH - 1)
        if trouble == "full":
            usage = lion_long_files.shutil.disk_usage(".")._replace(free=1000)
            monkeypatch.setattr(lion_long_files.shutil, "disk_usage", lambda folder: usage)
        else:
            missing = str(tmp_path / "missing")
            monkeypatch.setattr(lion_long_files.tempfile, "tempdir", missing)
        with torch.no_grad():
            assert_close(made(ids).last_hidden_state, expected)
        assert in_pieces == [LENGTH]
        with pytest.raises(ValueError, match="hidden states"):
            made.encode_long(ids)

    def test_after_hidden_states_were_asked_for_too(self, monkeypatch, in_pieces):
        """transformers then leaves its hooks on the layers."""
        monkeypatch.setattr(lion_long, "LONGEST_WHOLE", LENGTH - 1)
        made, ids = network(), token_ids(1, LENGTH)
        with torch.no_grad():
            made(ids, output_hidden_states=True)
            assert any(layer._forward_hooks for layer in made.layers)
            made(ids)
        assert in_pieces == [LENGTH]


PREPARED = """
import json, sys, torch
import lion_hf
torch.manual_seed(0)
torch.set_num_threads(1)
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(x.split()[1] for x in lines if x.startswith("RssAnon"))) * 1024
"""


def start(code: str, *words: str) -> subprocess.Popen:
    """A process of its own that runs code."""
    command = [sys.executable, "-c", PREPARED + textwrap.dedent(code), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path):
    code = """
        config = lion_hf.LionConfig(
            vocab_size=99, hidden_size=64, num_hidden_layers=4, num_attention_heads=2,
            intermediate_size=64, pre_norm=True, conv_kernel_size=3
        )
        model, ids = lion_hf.LionModel(config).eval(), torch.randint(5, 99, (1, 40_000))
        cache = sys.argv[1] if sys.argv[1:] else None
        output = model.encode_long(ids, piece=500, spans=10_000, cache=cache)
        print(json.dumps(output.span_embeddings.flatten().tolist()))
    """
    record = tmp_path / "record.safetensors"
    kills = 0
    for moment in (0.0, 0.4, 0.1, 0.8):
        process = start(code, str(tmp_path))
        before = record.stat().st_mtime_ns if record.exists() else 0
        while process.poll() is None and (
            not record.exists() or record.stat().st_mtime_ns == before
        ):
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2 and record.exists()
    resumed, whole_run = start(code, str(tmp_path)), start(code)
    results = [json.loads(process.communicate()[0]) for process in (resumed, whole_run)]
    assert len(results[0]) == 4 * 64 and results[0] == results[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_memory_does_not_grow_with_the_document():
    """At width 768 the two tensors of hidden states have 0.75 GiB; they are in temporary files."""
    code = """
        import threading, time
        config = lion_hf.LionConfig(num_hidden_layers=1, vocab_size=99, intermediate_size=768)
        model, ids = lion_hf.LionModel(config).eval(), torch.randint(5, 99, (131_072,))
        before, most = anonymous(), [0]
        def watch():
            while True:
                most[0] = max(most[0], anonymous())
                time.sleep(0.01)
        threading.Thread(target=watch, daemon=True).start()
        model.encode_long(ids, spans=1000)
        print(most[0] - before)
    """
    used = int(start(code).communicate()[0])
    assert 0 < used < 700 * 2**20
