"""Shared by all tests: devices, seeds, NaN in uninitialised memory, and no network."""

import os

# Before any import of transformers: no test may reach for the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from support.marks import selection  # noqa: E402

pytest_plugins = ["support.hub_fixtures"]

# Without a GPU the kernels run in triton's interpreter, which is chosen when triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n 2`: the processes share the cores
    torch.set_num_threads(1)


def pytest_configure(config):
    config.option.markexpr = selection(config.option.markexpr)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Runs a test on the CPU, and with `pytest -m gpu` on a GPU."""
    return request.param


@pytest.fixture(autouse=True)
def _deterministic():
    """Seeds every test, and fills memory from `torch.empty` with NaN, so that reading it shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
