"""Losses and Trainer: accumulation, soft labels, weight decay."""

import re

import pytest
import torch
from support.marks import slow_except
from support.models import IMAGE_HEADS, TEXT_HEADS, image_config, inputs_of, model, text_config
from support.trainers import trainer
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    SwinConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
)

from lion_hf import LionTrainer
from lion_hf.modeling.lion_loss import classification_loss
from lion_hf.training.speed import items_and_flops

NO_DROPOUT = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}
HEADS = (*TEXT_HEADS, *IMAGE_HEADS)
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression", "soft")


def head_and_batch(head: str, problem: str = "single_label_classification", rows: int = 8):
    """A head without dropout and a batch whose rows have different numbers of labels."""
    config = (image_config if head in IMAGE_HEADS else text_config)(**NO_DROPOUT)
    if problem != "soft":
        config.problem_type = problem
    if problem == "soft" and head == "SequenceClassification":
        config.problem_type = "single_label_classification"
    network = model(head, config)
    inputs = inputs_of(head, config, batch=rows)
    if head in ("MaskedLM", "TokenClassification"):
        inputs["labels"][
            torch.rand(inputs["labels"].shape) < torch.linspace(0.1, 0.9, rows)[:, None]
        ] = -100
    if head == "MaskedImageModeling":
        inputs["bool_masked_pos"] = torch.rand(rows, 16) < torch.linspace(0.1, 0.9, rows)[:, None]
        inputs["bool_masked_pos"][:, 0] = True
    if head == "QuestionAnswering":  # in some rows the answer was cut off
        inputs["start_positions"][:5] = inputs["end_positions"][:5] = 1000
    if problem == "multi_label_classification":
        inputs["labels"] = (torch.rand(rows, 3) < 0.5).float()
    elif problem == "regression":
        inputs["labels"] = torch.randn(rows, 3)
    elif problem == "soft":
        inputs["labels"] = torch.rand(rows, 3).softmax(-1)
    return network, inputs


def trained_gradient(network, inputs, steps: int, folder) -> dict[str, torch.Tensor]:
    """The gradient that the optimizer sees when the rows come in `steps` accumulated batches."""
    rows = len(next(iter(inputs.values())))
    data = [{name: x[row] for name, x in inputs.items()} for row in range(rows)]
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=rows // steps,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        label_names=["labels"] if "labels" in inputs else None,
    )
    found = {}

    class Spy(LionTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            named = dict(self.model.named_parameters())
            optimizer.register_step_pre_hook(
                lambda *_: found.update(
                    {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
                )
            )
            return optimizer

    Spy(network, args, train_dataset=data).train()
    return found


CASES = [(head, "single_label_classification") for head in HEADS] + [
    (head, problem)
    for head in ("SequenceClassification", "ImageClassification")
    for problem in PROBLEMS[1:]
]


@pytest.mark.parametrize("head, problem", slow_except(CASES, CASES[0], CASES[-1]))
def test_eight_batches_of_one_are_one_batch_of_eight(head, problem, tmp_path):
    """Each head's gradient is the same to rounding, with labels spread unevenly over the rows."""
    network, inputs = head_and_batch(head, problem)
    whole, parts = (trained_gradient(network, inputs, steps, tmp_path) for steps in (1, 8))
    assert whole.keys() == parts.keys() and len(whole) > 10
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4, msg=name)
    assert max(x.abs().max() for x in whole.values()) > 1e-3


@pytest.mark.parametrize("head, problem", CASES)
def test_num_items_in_batch_divides_the_sum(head, problem):
    """Two halves, each divided by the items of the whole, add up to the loss of the whole."""
    network, inputs = head_and_batch(head, problem)
    if "labels" in inputs:
        items = (inputs["labels"] != -100).sum()
    elif head == "QuestionAnswering":
        items = (inputs["start_positions"] < 1000).sum()
    else:
        items = inputs["bool_masked_pos"].sum()
    whole = network(**inputs).loss
    halves = [
        network(**{k: v[rows] for k, v in inputs.items()}, num_items_in_batch=items).loss
        for rows in (slice(5), slice(5, 8))
    ]
    torch.testing.assert_close(sum(halves), whole)
    as_integer = network(**inputs, num_items_in_batch=int(items)).loss
    torch.testing.assert_close(as_integer, whole)


def test_losses_are_the_textbook_ones():
    logits, indices = torch.randn(6, 3), torch.randint(0, 3, (6,))
    one_hot = F.one_hot(indices, 3).float()
    single = "single_label_classification"
    torch.testing.assert_close(
        classification_loss(logits, indices, single), F.cross_entropy(logits, indices)
    )
    torch.testing.assert_close(
        classification_loss(logits, one_hot, single), F.cross_entropy(logits, indices)
    )
    soft = torch.rand(6, 3).softmax(-1)
    torch.testing.assert_close(
        classification_loss(logits, soft, single), -(soft * logits.log_softmax(-1)).sum(-1).mean()
    )
    multi = classification_loss(logits, one_hot, "multi_label_classification")
    torch.testing.assert_close(multi, F.binary_cross_entropy_with_logits(logits, one_hot))
    torch.testing.assert_close(
        classification_loss(logits[:, :1], soft[:, 0], "regression"),
        F.mse_loss(logits[:, 0], soft[:, 0]),
    )
    ignored = indices.clone()
    ignored[2:] = -100
    torch.testing.assert_close(
        classification_loss(logits, ignored, single), F.cross_entropy(logits[:2], indices[:2])
    )


def test_losses_refuse_what_they_cannot_mean():
    with pytest.raises(ValueError, match="problem_type='foo': expected None or one of"):
        classification_loss(torch.ones(2, 3), torch.tensor([0, 1]), "foo")
    with pytest.raises(
        ValueError,
        match=re.escape("labels (2,) for regression: expected one for each of logits (2, 3)"),
    ):
        classification_loss(torch.ones(2, 3), torch.ones(2), "regression")


def test_one_label_on_images_is_regression():
    network = model("ImageClassification", image_config(num_labels=1))
    outputs = network(torch.randn(4, 3, 16, 16), labels=torch.randn(4))
    assert outputs.logits.shape == (4, 1) and torch.isfinite(outputs.loss)


def test_mixup_labels_on_images_are_soft_targets():
    network, inputs = head_and_batch("ImageClassification", "soft")
    outputs = network(**inputs)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, inputs["labels"]))
    assert network.config.problem_type is None


def test_problem_type_of_texts_follows_the_labels():
    for labels, num_labels, expected in (
        (torch.tensor([0, 2]), 3, "single_label_classification"),
        (torch.rand(2, 3), 3, "multi_label_classification"),
        (torch.rand(2), 1, "regression"),
    ):
        network = model("SequenceClassification", text_config(num_labels=num_labels))
        network(torch.ones(2, 4, dtype=torch.long), labels=labels)
        assert network.config.problem_type == expected


@pytest.mark.parametrize("mask_type", ("lit", "decay", "selective"))
@pytest.mark.parametrize("head", ("MaskedLM", "ImageClassification", "MaskedImageModeling"))
def test_weight_decay_spares_what_it_would_spoil(head, mask_type, tmp_path):
    """Matrices decay; decays, gate biases, norms, class token and positions do not."""
    network = model(head, (text_config if head == "MaskedLM" else image_config)(mask_type))
    args = TrainingArguments(tmp_path, weight_decay=0.1, report_to="none", use_cpu=True)
    optimizer = LionTrainer(network, args).create_optimizer()
    names = {id(p): n for n, p in network.named_parameters()}
    decayed = {
        names[id(p)]
        for group in optimizer.param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    pattern = r"bias$|norm\.weight$|cls_token|mask_token|position_embeddings"
    assert decayed == {n for n in names.values() if not re.search(pattern, n)}
    assert decayed and decayed != set(names.values())
    stock = Trainer(network, args).create_optimizer()
    stock_decayed = {
        names[id(p)]
        for group in stock.param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    assert not [n for n in stock_decayed if n.endswith("gate.bias")], (
        "decays are safe under the stock Trainer too"
    )


def test_trainer_learns_and_resumes(tmp_path):
    """Training lowers the loss, and a resumed run ends in the same weights."""
    config = image_config("decay", "snake", initializer_range=0.02, **NO_DROPOUT)
    images, labels = torch.randn(48, 3, 16, 16), torch.arange(48) % 3
    images += labels[:, None, None, None] * 1.0
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels)]

    def trainer(network, **kwargs):
        args = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=16,
            max_steps=30,
            learning_rate=3e-3,
            save_steps=15,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
            **kwargs,
        )
        return LionTrainer(network, args, train_dataset=data, eval_dataset=data)

    network = model("ImageClassification", config)
    before = trainer(network).evaluate()["eval_loss"]
    run = trainer(network)
    run.train()
    assert run.evaluate()["eval_loss"] < 0.7 * before
    resumed = model("ImageClassification", config)
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    for (name, a), b in zip(network.named_parameters(), resumed.parameters()):
        torch.testing.assert_close(a, b, msg=name)


def test_a_new_run_keeps_what_it_writes_beside_an_old_one(tmp_path, caplog):
    """As Trainer does: the old run's checkpoints go, though their numbers are higher."""

    def run(steps, **resume):
        options = {"max_steps": steps, "save_steps": steps // 2, "save_total_limit": 2}
        trainer(tmp_path, do_train=True, **options).train(**resume)
        return sorted(path.name for path in tmp_path.glob("checkpoint-*"))

    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        run(2, resume_from_checkpoint=True)
    assert run(8) == ["checkpoint-4", "checkpoint-8"] and "an earlier one" not in caplog.text
    assert run(2) == ["checkpoint-1", "checkpoint-2"]
    assert "which holds checkpoint-4, checkpoint-8 of an earlier one" in caplog.text
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()  # as if the run had been killed
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    caplog.clear()
    assert "checkpoint-6" in run(6, resume_from_checkpoint=True)
    assert "checkpoint-2 is broken and left alone" in caplog.text


@pytest.mark.parametrize(
    ("config", "items", "counted"),
    [
        (ConvNextConfig(depths=[1, 1], hidden_sizes=[4, 8], num_stages=2), 2, False),
        (SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2]), 2, False),
        (
            ViTConfig(image_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1),
            2,
            True,
        ),
    ],
)
def test_the_speed_of_a_model_that_does_not_tell_its_operations(config, items, counted):
    """Trainers count the operations of any model, which must not stop a training."""
    network = AutoModelForImageClassification.from_config(config)
    found, flops = items_and_flops(network, {"pixel_values": torch.zeros(2, 3, 32, 32)})
    assert found == 2 and (flops > 0) == counted


@pytest.mark.parametrize("wrong", ["[1]", {"cycles": 2}])
def test_options_of_another_schedule_are_named(tmp_path, wrong):
    with pytest.raises(ValueError, match="lr_scheduler_kwargs=.* do not fit lr_scheduler_type"):
        trainer(tmp_path, lr_scheduler_kwargs=wrong).train()
