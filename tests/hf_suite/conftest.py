"""transformers' common tests on LION: no download without the marker, no skip without a reason that is written here."""

import re
from collections import Counter

import pytest
from _pytest.mark.expression import Expression

# What a skipped test says -> why that is right for LION. Any other skip is a failure.
ACCEPTED_SKIPS = {
    "requires accelerator|multiple accelerators|requires MPS|test is slow": "needs a GPU; the slow ones all do",
    "requires deepspeed": "DeepSpeed needs a GPU",
    "requires Flash Attention|requires the kernels library|SDPA|setting its attention dynamically|sliding window": "kernels of "
    "softmax attention, which LION has not: its forms are chosen by attention_form, and tested in test_equivalence.py",
    "composite model|No subconfigs": "LION's configuration has no sub-configurations",
    "No conversion found": "LION's parameters have the same names in files and in memory",
    "No decoder-only|No sequence-to-sequence": "LION is an encoder: the test is about decoders",
    "RoPE": "LION has no rotary embeddings",
    "no _keep_in_fp32_modules": "LION-lit has no gates, the only parameters that stay in float32",
    "sparse experts|output_router_logits|grouped_mm": "LION has no experts",
    "does not have a TP plan": "no tensor parallelism, as BERT and ViT have none",
    "does not have position embeddings": "no resizing of position embeddings, as BERT has none",
    "test_resize_embeddings is set to": "images have no token embeddings to resize",
    "Not a prioritized model": "older versions ask for a copyright year in the file; newer ones are told to run it",
    "is not in `self.pipeline_model_mapping`|PyTesseract|requires av|`run_pipeline_test` is currently not": "a pipeline of "
    "another task: documents, videos, masks, speech, generation, or of the other modality",
    "pixel_values, not embeddings": "as ViT: image models take pixel_values alone",
}


def accepted(reason: str) -> str | None:
    """Why a skip is right, or None."""
    return next((why for pattern, why in ACCEPTED_SKIPS.items() if re.search(pattern, reason)), None)


def pytest_ignore_collect(collection_path, config):
    """Without the marker nothing is downloaded: `-m "not hf_suite"` needs no network."""
    expression = config.option.markexpr
    wanted = not expression or Expression.compile(expression).evaluate(lambda name, **_: name == "hf_suite")
    return None if wanted else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if accepted(reason) is None:
            report.outcome = "failed"
            report.longrepr = f"skipped without an accepted reason: {reason}"
    return report


def pytest_terminal_summary(terminalreporter):
    """Says how many common tests passed and why the others were skipped."""
    counts = {}
    for outcome in ("passed", "skipped", "failed"):
        reports = [
            r for r in terminalreporter.stats.get(outcome, []) if type(r) is pytest.TestReport and "hf_suite" in r.nodeid
        ]
        counts[outcome] = [accepted(r.longrepr[2]) if outcome == "skipped" else "" for r in reports]
    if any(counts.values()):
        line = ", ".join(f"{len(reasons)} {outcome}" for outcome, reasons in counts.items())
        terminalreporter.write_line(f"common tests of transformers: {line}")
        for why, number in Counter(counts["skipped"]).most_common():
            terminalreporter.write_line(f"  {number} skipped: {why}")
