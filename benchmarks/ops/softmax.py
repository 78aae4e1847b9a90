"""softmax against torch's: forward, and forward with backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks import harness
from lmkernels import softmax
from lmkernels.testing import cases, numerics

CHECKED_ROWS = 32  # float64 is slow


def lines() -> list[harness.Line]:
    """One per case, dtype and pass."""
    return [
        line(group, case, dtype, direction)
        for group, members in cases.SOFTMAX_BENCHMARKS.items()
        for dtype in harness.DTYPES
        for case in members
        for direction in ("forward", "forward+backward")
    ]


def plain(x):
    return torch.softmax(x, -1)


def wrong(case: cases.SoftmaxCase, dtype: torch.dtype) -> str | None:
    """Why the results of this case are wrong, or None: by the tests' rule, against float64, on some of the rows."""
    reference = partial(softmax, backend="reference")
    case = replace(case, shape=(CHECKED_ROWS, case.shape[-1]))
    try:
        numerics.assert_op_as_accurate(
            softmax, reference, plain, case.make(dtype), ["x"], dtype=dtype, samples=CHECKED_ROWS
        )
    except AssertionError as error:
        return str(error)
    return None


def competitors(case: cases.SoftmaxCase, dtype: torch.dtype, direction: str) -> dict[str, Callable]:
    backward = direction != "forward"
    x = case.make(dtype)["x"]
    dy = torch.randn(case.shape).to(dtype)

    def call(function):
        leaf = x.detach().requires_grad_(backward)
        if backward:
            return lambda: torch.autograd.grad(function(leaf), leaf, dy)
        return lambda: function(leaf)

    return {"ours": call(softmax), "torch": call(plain)}


def line(group: str, case: cases.SoftmaxCase, dtype: str, direction: str) -> harness.Line:
    torch_dtype = harness.DTYPES[dtype]
    tensor = math.prod(case.shape) * torch_dtype.itemsize
    reads, writes = (1, 1) if direction == "forward" else (3, 2)  # x, y; then dy, y and dx
    return harness.Line(
        group,
        case.name,
        dtype,
        direction,
        competitors=lambda: competitors(case, torch_dtype, direction),
        wrong=lambda: wrong(case, torch_dtype),
        bytes_read=reads * tensor,
        bytes_written=writes * tensor,
    )
