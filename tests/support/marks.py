"""Which tests run: marks for parametrised tests, and what `-m` selects."""

from collections.abc import Iterable

import pytest


def slow_except(cases: Iterable, *kept) -> list:
    """The cases of a parametrised test, all of them slow but those in `kept`.

    The quick run then has a representative of each kind, and `pytest -m slow` has the rest.

    Args:
        cases: values, or tuples of them.
        kept: the cases that run without `-m slow`.
    """
    cases = list(cases)
    assert all(case in cases for case in kept), f"{kept} are not among {cases}"
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=() if case in kept else pytest.mark.slow))
    return marked


def selection(expression: str) -> str:
    """What `-m` selects: tests for a GPU only if the expression names them.

    So `-m slow` runs anywhere, and `-m gpu` has the slow ones for a GPU too.
    """
    if "gpu" in expression:
        return expression
    return f"({expression}) and not gpu" if expression else "not gpu"
