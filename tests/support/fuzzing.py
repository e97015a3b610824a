"""What the tests with random and absurd inputs share.

`CASES` says how many cases each of them draws.
"""

import re

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CASES = {
    "values": 800,
    "arguments": 500,
    "isolation": 100,
    "texts": 600,
    "labels": 300,
    "images": 300,
    "configurations": 300,
    "collator": 200,
    "helpers": 100,
}
NAN, INF = float("nan"), float("inf")


def fuzz(name: str):
    return settings(
        max_examples=CASES[name],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def refused(function, names: str) -> bool:
    """Whether a call raises an error of ours, whose message must name one of the arguments."""
    try:
        function()
    except (ValueError, TypeError) as error:
        assert re.search(names, str(error)), f"{type(error).__name__} names nothing: {error}"
        return True
    return False


ABSURD = st.sampled_from(
    (
        None,
        "x",
        0,
        -1,
        3,
        10**30,
        1.5,
        NAN,
        INF,
        True,
        [],
        [[1]],
        {},
        (1, 2, 3),
        torch.tensor(1),
        torch.tensor(NAN),
    )
)
