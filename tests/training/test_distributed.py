"""Several processes train as one does: DDP and FSDP2 on CPUs, through every launcher."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from filelock import FileLock
from safetensors.torch import load_file
from support.distributed_worker import train
from support.launches import LAUNCHES, SETTINGS, start

from lion_hf import LionForMaskedLM
from lion_hf.tasks import mlm
from lion_hf.training import processes

ROOT = Path(__file__).parents[2]

WORKER = str(ROOT / "tests/support/distributed_worker.py")
BATCH = 8  # in all, of one process or of two

TRAININGS = [
    (launch, case)
    for launch, (_, cases) in LAUNCHES.items()
    for case in cases
    if case not in ("bf16", "broken", "packed")
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Runs a launch once, when a test first asks for it, and gives the folder that it wrote."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def launch(name: str) -> Path:
        folder = shared / f"launch-{name}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                commands, cases = LAUNCHES[name]
                start(commands, WORKER, str(folder), str(BATCH // 2), *cases)
        return folder

    return launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process logs for a case with the whole batch."""
    results, folder = {}, tmp_path_factory.mktemp("alone")

    def result(case: str) -> dict:
        if case not in results:
            results[case] = train(case, folder, BATCH)
        return results[case]

    return result


def logs(folder: Path, case: str) -> list[dict]:
    """What both processes logged."""
    return [json.loads((folder / f"{case}-{process}.json").read_text()) for process in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("launch, case", TRAININGS)
def test_two_processes_give_the_losses_of_one(launch, case, launched, alone):
    """Same losses and norms at the same total batch, with predictions spread unevenly."""
    first, second = logs(launched(launch), case)
    expected = alone(case)
    assert (first["processes"], first["kind"]) == (2, "FSDP" if launch == "fsdp2" else "MULTI_CPU")
    assert (expected["processes"], expected["kind"]) == (1, "NO") and first == second
    assert len(expected["losses"]) == (3 if case == "stream" else 6)
    for name, tolerance in (("losses", 1e-4), ("norms", 1e-2)):
        assert first[name] == pytest.approx(expected[name], abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "fsdp2"])
def test_resumed_processes_repeat_the_losses(launch, launched):
    """The newest checkpoint is broken: both continue from the one before, to the same numbers."""
    folder = launched(launch)
    first, second = logs(folder, "resumed")
    assert first["resumed"] == first["losses"] == second["resumed"]
    assert {path.name for path in (folder / "resumed").glob("checkpoint-*")} == {
        "checkpoint-3",
        "checkpoint-6",
    }
    assert (folder / "resumed" / "checkpoint-3" / "rng_state_1.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "fsdp2"])
def test_checkpoints_of_processes_are_whole_models(launch, launched):
    """The last checkpoint and the final folder load with from_pretrained, to the same logits."""
    folder = launched(launch) / "resumed"
    token_ids, logits = torch.arange(5, 16)[None], []
    for place in (folder, folder / "checkpoint-6"):
        model, info = LionForMaskedLM.from_pretrained(place, output_loading_info=True)
        assert (
            not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        )
        assert model.decoder.weight is model.lion.embeddings.word_embeddings.weight
        logits.append(model.eval()(token_ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    assert "decoder.weight" not in load_file(folder / "model.safetensors"), (
        "shared weights are saved once"
    )
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LionForMaskedLM"]
    assert (folder / "modeling_lion.py").is_file() and (folder / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "fsdp2"])
def test_nan_in_one_process_stops_both(launch, launched, alone):
    first, second = logs(launched(launch), "broken")
    for result in (first, second, alone("broken")):
        assert "the loss became nan or infinite in step 3 " in result["error"]
    assert "in another process" in first["error"]
    assert (
        "that of lion.layers.0.mlp.fc1" in second["error"]
        and "that of lion.layers.0.mlp.fc1" in alone("broken")["error"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "fsdp2"])
def test_packed_evaluation_of_two_processes_is_that_of_one(launch, launched, alone):
    """Rows differ in number between the processes, and the last round has one batch only."""
    first, second = logs(launched(launch), "packed")
    expected = alone("packed")
    assert first["processes"] == 2 and first["metrics"] == second["metrics"]
    for name in ("rows", "labels"):
        assert first["metrics"][name] == expected["metrics"][name]
    for name in ("sum", "loss"):
        assert first["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-4)
    torch.testing.assert_close(
        torch.tensor(first["predictions"]), torch.tensor(expected["predictions"]), rtol=0, atol=1e-4
    )


@pytest.mark.slow
def test_bf16_with_fsdp2_logs_losses_that_are_not_rounded_to_it(launched, alone):
    first, second = logs(launched("fsdp2"), "bf16")
    assert first == second
    assert first["losses"][:3] == pytest.approx(alone("bf16")["losses"][:3], abs=0.05)
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in first["losses"])


@pytest.mark.slow
def test_run_mlm_with_fsdp2_is_run_mlm(tmp_path):
    """The script itself, evaluation and final model included, without an option more."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.txt").write_text("\n".join(lines[:120]), encoding="utf-8")
    (tmp_path / "validation.txt").write_text("\n".join(lines[120:160]), encoding="utf-8")
    sizes = "hidden_size=24,num_hidden_layers=2,num_attention_heads=3,intermediate_size=40"
    options = {
        "--train_file": tmp_path / "train.txt",
        "--validation_file": tmp_path / "validation.txt",
        "--max_length": "24",
        "--model": ROOT / "configs" / "lion-d-base",
        "--max_steps": "4",
        "--logging_steps": "1",
        "--report_to": "none",
        "--model_overrides": f"{sizes},hidden_dropout_prob=0,attention_probs_dropout_prob=0",
        "--learning_rate": "1e-2",
    }
    argv = [str(word) for pair in options.items() for word in pair]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    expected = mlm.main(
        [
            *argv,
            "--output_dir",
            str(alone),
            "--train_tokenizer",
            "--vocab_size",
            "300",
            "--per_device_train_batch_size",
            "8",
        ]
    )
    argv += [
        "--output_dir",
        str(shared),
        "--tokenizer",
        str(alone),
        "--per_device_train_batch_size",
        "4",
    ]
    start(LAUNCHES["fsdp2"][0], str(ROOT / "run_scripts/run_mlm.py"), *argv)
    found = json.loads((shared / "metrics.json").read_text())
    for name in ("train_loss", "eval_masked_accuracy", "eval_loss", "eval_perplexity"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("file", sorted(SETTINGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_knows_all_settings(file):
    """No misspelt key: accelerate refuses unknown ones itself, but not those of FSDP."""
    settings = load_config_from_file(str(file))
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(settings.fsdp_config) <= options
    assert settings.mixed_precision == "no", "the scripts' own options decide"
    if settings.fsdp_config:
        assert (
            settings.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
            in LionForMaskedLM._no_split_modules
        )
        assert settings.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.parametrize(
    "command, expected",
    [
        (
            [
                "python",
                "/bin/accelerate",
                "launch",
                "--cpu",
                "--num_processes",
                "3",
                "run.py",
                "--num_processes",
                "7",
            ],
            3,
        ),
        (["python", "-m", "accelerate.commands.launch", "--num_processes=2", "--cpu", "run.py"], 2),
        (
            [
                "accelerate-launch",
                "--cpu",
                "--config_file",
                str(SETTINGS / "two_machines.yaml"),
                "run.py",
            ],
            16,
        ),
        (
            [
                "accelerate",
                "launch",
                "--cpu",
                "--num_machines",
                "2",
                "--num_processes",
                "2",
                "run.py",
            ],
            None,
        ),
        (["bash", "-c", "run.sh"], None),
    ],
    ids=["accelerate", "module", "file", "machines", "unknown"],
)
def test_processes_that_accelerate_was_asked_for(command, expected):
    assert processes._asked_processes(command) == expected


def test_one_process_in_place_of_several_is_refused(monkeypatch):
    """Where the number cannot be found out, training in one process in silence is no answer."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for name in processes.RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes.psutil.Process, "cmdline", lambda self: ["bash"])
    with pytest.raises(SystemExit, match="torchrun --nproc_per_node N"):
        processes.start_processes()
    monkeypatch.setenv("RANK", "0")
    processes.start_processes()


def test_torchrun_without_gpu_needs_no_option(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    processes.use_cpu_without_accelerator()
    assert "ACCELERATE_USE_CPU" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "0")
    processes.use_cpu_without_accelerator()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
