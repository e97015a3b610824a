"""The common tests of transformers: when to download them, and which skips are accepted."""

from collections import Counter

import pytest
from _pytest.mark.expression import Expression
from skips import accepted


def pytest_ignore_collect(collection_path, config):
    """Downloads nothing unless `-m` selects a common test: `-m "not hf_suite"` needs no network."""
    expression = Expression.compile(config.option.markexpr)
    kinds = ({"hf_suite"}, {"hf_suite", "slow"})
    if any(expression.evaluate(lambda name, **_: name in kind) for kind in kinds):  # noqa: B023
        return None
    return True


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
            r
            for r in terminalreporter.stats.get(outcome, [])
            if type(r) is pytest.TestReport and "hf_suite" in r.nodeid
        ]
        counts[outcome] = [accepted(r.longrepr[2]) if outcome == "skipped" else "" for r in reports]
    if any(counts.values()):
        line = ", ".join(f"{len(reasons)} {outcome}" for outcome, reasons in counts.items())
        terminalreporter.write_line(f"common tests of transformers: {line}")
        for why, number in Counter(counts["skipped"]).most_common():
            terminalreporter.write_line(f"  {number} skipped: {why}")
