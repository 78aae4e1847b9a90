"""The micro-kernels of each instruction set of this machine, without torch: the module of micro/bindings.cpp."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import native_build
import pytest

ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx")


@pytest.fixture(scope="session")
def micro():
    """LMKERNELS_MICRO names the module's file where it is not the plain one."""
    if (path := os.environ.get("LMKERNELS_MICRO")) is None:
        if reason := native_build.missing():
            pytest.skip(reason)
        (path,) = native_build.build("plain/micro.so")
    spec = importlib.util.spec_from_file_location("micro", Path(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=ISAS)
def isa(request, micro):
    """A submodule for each instruction set; a test that takes it runs once per one of this machine."""
    if request.param not in micro.isas:
        pytest.skip("this machine does not have it")
    return micro.isas[request.param]
