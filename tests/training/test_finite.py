"""Nothing that is not finite is saved, and a trainer that was stopped by it can train again."""

import math

import pytest
import torch
from support.models import image_config, model, text_config
from support.trainers import Rows, trainer
from transformers import TrainerCallback, set_seed

from lion_hf.data.samples import SeededDataset
from lion_hf.tasks.image_trainer import ImageTrainer
from lion_hf.training import checkpoints
from lion_hf.training.arguments import LionTrainingArguments
from lion_hf.training.finite import Watch, not_finite
from lion_hf.training.run import run
from lion_hf.training.trainer import LionTrainer


class At(TrainerCallback):
    """Does something once, at the beginning or at the end of a step."""

    def __init__(self, step: int, action, event: str = "begin"):
        self.step, self.action, self.event = step, action, event

    def on_step_begin(self, args, state, control, **kwargs):
        self.do(state.global_step + 1, "begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.do(state.global_step, "end")

    def do(self, step: int, event: str):
        if (step, event) == (self.step, self.event) and self.action is not None:
            action, self.action = self.action, None
            action()


def break_gradient(network, step: int, value: float) -> At:
    """Makes one gradient of a step not finite; the loss of the step is finite."""
    weight = network.lion.layers[1].mlp.fc1.weight

    def action():
        handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * value)[1])

    return At(step, action)


def losses(made) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in made.state.log_history if "loss" in entry}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm", [1.0, 0.0])
@pytest.mark.parametrize("step", [6, 8, 12], ids=["between", "at a checkpoint", "last"])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, step, norm, value):
    network = model("SequenceClassification", text_config())
    made = trainer(tmp_path, network=network, max_grad_norm=norm, save_total_limit=1)
    made.add_callback(break_gradient(network, step, value))
    last = 8 if step == 12 else 4
    message = rf"the gradient became nan or infinite in step {step} .*lion.layers.1.mlp.fc1.weight"
    with pytest.raises(FloatingPointError, match=f"{message}.*checkpoint-{last} is from before"):
        run(made, title="A run")
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [f"checkpoint-{last}"]
    assert checkpoints.find_checkpoint(tmp_path).name == f"checkpoint-{last}"
    assert not not_finite(network.named_parameters())
    assert not (tmp_path / "model.safetensors").exists()


def test_the_trainer_can_train_again(tmp_path):
    whole = trainer(tmp_path / "whole", network=model("SequenceClassification", text_config()))
    whole.train()
    network = model("SequenceClassification", text_config())
    made = trainer(tmp_path / "run", network=network)
    made.add_callback(break_gradient(network, 6, math.nan))
    with pytest.raises(FloatingPointError, match="in step 6 "):
        made.train()
    assert not made.is_in_train
    made.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(made) == losses(whole)


def test_a_trainer_without_checkpoint_can_train_again(tmp_path):
    network = model("SequenceClassification", text_config())
    before = {name: x.clone() for name, x in network.state_dict().items()}
    made = trainer(tmp_path, network=network, save_strategy="no", max_steps=6)

    def break_state():
        for state in made.optimizer.state.values():
            state["exp_avg"].fill_(math.nan)

    made.add_callback(At(3, break_state))
    with pytest.raises(FloatingPointError, match="There is no checkpoint"):
        made.train()
    network.load_state_dict(before)
    assert math.isfinite(made.train().metrics["train_loss"])


def poison(tensors) -> None:
    with torch.no_grad():
        next(iter(tensors)).view(-1)[0] = math.nan


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_what_breaks_after_the_gradient_is_not_saved(tmp_path, kind, strategy):
    """As on a GPU, where the gradient of a step is looked at when the next log is written."""
    network = model("SequenceClassification", text_config())
    made = trainer(tmp_path, network=network, save_strategy=strategy, max_steps=8)

    def action():
        state = [x["exp_avg_sq"] for x in made.optimizer.state.values()]
        poison(network.parameters() if kind == "weights" else state)

    made.add_callback(At(8, action, "end"))
    name = "the optimizer's exp_avg_sq of " if kind == "optimizer" else ""
    folder = "checkpoint-8" if strategy == "steps" else "the model"
    with pytest.raises(
        FloatingPointError,
        match=rf"{folder} is not saved: 1 tensors are not finite, first {name}lion.embeddings",
    ):
        run(made, title="A run")
    found = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert found == (["checkpoint-4"] if strategy == "steps" else [])
    assert not (tmp_path / "model.safetensors").exists()


class Late(LionTrainer):
    """Looks at its notes only when it logs or saves, as on a GPU, which nobody waits for."""

    def _note(self, name, value, inputs=None):
        self._watch.note(name, value, self.state.global_step)


@pytest.mark.parametrize("step", [5, 6, 8])
@pytest.mark.parametrize("logging_steps", [3, 100])
def test_a_gradient_that_is_noticed_late_spoils_no_checkpoint(tmp_path, step, logging_steps):
    network = model("SequenceClassification", text_config())
    made = trainer(
        tmp_path, network=network, cls=Late, save_total_limit=1, logging_steps=logging_steps
    )
    made.add_callback(break_gradient(network, step, math.nan))
    with pytest.raises(FloatingPointError, match=f"the gradient became .* in step {step} "):
        run(made, title="A run")
    assert not_finite(network.named_parameters()), "the step was made"
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-4"]
    assert checkpoints.damage(tmp_path / "checkpoint-4") is None
    assert not (tmp_path / "model.safetensors").exists()


def test_save_model_refuses(tmp_path):
    network = model("SequenceClassification", text_config())
    made = trainer(tmp_path, network=network)
    made.save_model(tmp_path / "good")
    poison(network.parameters())
    with pytest.raises(FloatingPointError, match="bad is not saved: 1 tensors"):
        made.save_model(tmp_path / "bad")
    assert (tmp_path / "good" / "model.safetensors").is_file() and not (tmp_path / "bad").exists()


def test_a_buffer_may_hold_an_infinity_on_purpose(tmp_path):
    network = model("SequenceClassification", text_config())
    network.register_buffer("mask", torch.full((3,), -math.inf))
    made = trainer(tmp_path, network=network)
    made.save_model()
    network.register_buffer("other", torch.full((3,), math.nan))
    with pytest.raises(FloatingPointError, match="first other"):
        made.save_model()


def test_the_average_of_the_weights(tmp_path):
    rows = [
        {"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(n % 3)} for n in range(8)
    ]
    args = LionTrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    network = model("ImageClassification", image_config())
    made = ImageTrainer(network, args, train_dataset=SeededDataset(rows, dict), average_decay=0.9)
    made.add_callback(At(4, lambda: poison(made.average.module.parameters()), "end"))
    with pytest.raises(FloatingPointError, match="checkpoint-4 is not saved: .*the average of"):
        made.train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2"]


def test_what_is_watched_is_the_first_step():
    watch = Watch(torch.device("cpu"))
    assert watch.first(lambda x: x) is None
    watch.note("gradient", torch.tensor(math.inf), 3)
    watch.note("loss", torch.tensor(math.nan), 4)
    watch.note("gradient", torch.tensor(1.0), 5)
    assert watch.first(lambda x: x) == ("gradient", 3, True)
    other = torch.tensor([[2, 2]])
    assert watch.first(lambda x: torch.cat([x, other])) == ("loss", 2, False)
    watch.reset()
    assert watch.first(lambda x: x) is None


def test_names_of_what_is_not_finite():
    values = {
        "whole": torch.tensor([1, 2]),
        "good": torch.ones(3),
        "bad": torch.tensor([1.0, math.nan]),
        "half": torch.tensor([math.inf], dtype=torch.float16),
    }
    assert not_finite(values.items()) == ["bad", "half"]
    assert not_finite([]) == []


@pytest.mark.parametrize("full", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_half_precision_leaves_the_model_as_it_is(tmp_path, full):
    expected = trainer(tmp_path / "a", network=model("SequenceClassification", text_config()))
    made = trainer(
        tmp_path / "b", network=model("SequenceClassification", text_config()), **{full: True}
    )
    expected.eval_dataset = made.eval_dataset = Rows()
    rounded = made.evaluate()["eval_loss"]
    assert 0 < abs(rounded - expected.evaluate()["eval_loss"]) < 0.1, "evaluated in half precision"
    made.predict(Rows())
    for each in (expected, made):
        set_seed(3)
        run(each, title="A run")
    for name, weight in made.model.state_dict().items():
        assert torch.equal(weight, expected.model.state_dict()[name]), name
    written = [(tmp_path / place / "model.safetensors").read_bytes() for place in "ab"]
    assert written[0] == written[1]
