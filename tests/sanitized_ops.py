"""Runs every case of every op that has a native backend, forward and backward, for test_sanitizers.py.

    python sanitized_ops.py [poison]

This looks for accesses beyond memory and for undefined behaviour; that results are right, the ops' own tests show. What
runs is written to stderr, so that it stands above a sanitizer's report.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

import lmkernels
from lmkernels import _library
from lmkernels.testing import cases, numerics


def attention(dtype: torch.dtype):
    for case in cases.ATTENTION:
        yield case.name, lambda: numerics.attention_results(lmkernels.attention, case.make(dtype), backend="native")  # noqa: B023


# one for each op that has a native backend
OPS = {"attention": attention}


def run_every_case() -> None:
    for op, runs in OPS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for name, run in runs(dtype):
                print(op, dtype, name, file=sys.stderr)
                run()
        print(op)


def read_poisoned_memory() -> None:
    """What must end in a report: the last key is out of bounds."""
    q, k, v = (torch.randn(1, 8, 1, 16) for _ in range(3))
    ctypes.CDLL(None).__asan_poison_memory_region(ctypes.c_void_p(k[0, -1].data_ptr()), ctypes.c_size_t(64))
    lmkernels.attention(q, k, v, backend="native")


if __name__ == "__main__":
    assert _library.native_error is None, _library.native_error
    assert b"__asan_init" in Path(_library.__file__).with_name("_C.so").read_bytes(), _library.__file__
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory holds NaN
    read_poisoned_memory() if sys.argv[1:] == ["poison"] else run_every_case()
