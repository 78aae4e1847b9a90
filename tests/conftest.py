from __future__ import annotations

import os
from pathlib import Path

# Threads that wait must not spin: the shapes of tests are small, and on a busy machine spinning takes ten times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import lmkernels

BACKENDS = ("reference", "native")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device that the ops are tested on (default: cpu)")


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request) -> str:
    """Each backend by name; a test that takes it runs once per backend that this machine has."""
    reason = lmkernels.backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def native() -> str:
    """The name of the compiled library, for what only it promises."""
    reason = lmkernels.backends()["native"]
    if reason is not None:
        pytest.skip(reason)
    return "native"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of public data sets: $LMKERNELS_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("LMKERNELS_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets: {folder} is not a folder; set LMKERNELS_DATA")
    return folder


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN (the largest value for integers): what a kernel forgets to write shows.

    torch fills every tensor that aten::empty and its siblings make, in the compiled library too.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)
