"""`lion-hf mlm` in two processes: packed rows are evaluated and predicted as in one process."""

import json
from pathlib import Path

import pytest
from support.launches import LAUNCHES, ROOT, start

from lion_hf.tasks import mlm


def options(folder: Path, output: str) -> list[str]:
    argv = ["--train_file", str(folder / "text.txt"), "--validation_file", str(folder / "text.txt")]
    argv += ["--tokenizer", str(folder / "first"), "--model", str(folder / "first")]
    argv += ["--rows", "packed", "--max_length", "24", "--max_steps", "2", "--learning_rate", "0"]
    argv += [
        "--total_batch_size",
        "4",
        "--per_device_train_batch_size",
        "2",
        "--do_predict",
        "true",
    ]
    argv += ["--per_device_eval_batch_size", "3", "--remove_unused_columns", "true"]
    argv += ["--disable_tqdm", "true", "--report_to", "none", "--output_dir", str(folder / output)]
    return [*argv, "--peak_tflops", "1"]


@pytest.mark.slow
def test_packed_rows_are_evaluated_as_in_one_process(tmp_path):
    lines = (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()
    (tmp_path / "text.txt").write_text("\n".join(lines[:60]), encoding="utf-8")
    sizes = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
    mlm.main(
        ["--train_file", str(tmp_path / "text.txt"), "--train_tokenizer", "--vocab_size", "200"]
        + ["--model", "lion-s-base", "--model_overrides", f"{sizes},initializer_range=0.3"]
        + ["--max_steps", "1", "--report_to", "none", "--output_dir", str(tmp_path / "first")]
        + ["--peak_tflops", "1", "--use_cpu", "true"]
    )
    mlm.main([*options(tmp_path, "one"), "--use_cpu", "true"])
    start(LAUNCHES["torchrun"][0], str(ROOT / "run_scripts/run_mlm.py"), *options(tmp_path, "two"))
    one, two = (json.loads((tmp_path / x / "metrics.json").read_text()) for x in ("one", "two"))
    for name in ("masked_accuracy", "loss", "perplexity"):
        assert two[f"eval_{name}"] == pytest.approx(one[f"eval_{name}"], rel=1e-5), name
    texts = [
        [json.loads(line)["text"] for line in (tmp_path / x / "predictions.jsonl").open()]
        for x in ("one", "two")
    ]
    assert texts[0] == texts[1] and len(texts[0]) % 3 != 0  # the last batch is not full
