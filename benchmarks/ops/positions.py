"""add_positions against x * scale + table[: s]: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from benchmarks import harness
from lmkernels import add_positions
from lmkernels.testing import cases, numerics

PASSES = ("forward", "forward+backward")


def lines() -> list[harness.Line]:
    """One per case, dtype and pass."""
    return [
        line(group, case, dtype, direction)
        for group, members in cases.ADD_POSITIONS_BENCHMARKS.items()
        for dtype in harness.DTYPES
        for case in members
        for direction in PASSES
    ]


def eager(x, table, scale=1.0):
    return x * scale + table[: x.shape[1]]


@cache
def wrong(case: cases.EmbedCase, dtype: torch.dtype) -> str | None:
    """Why the results of this case are wrong, or None: by the tests' rule."""

    def definition(**arguments):
        return add_positions(**arguments, backend="reference")

    try:
        numerics.assert_op_as_accurate(
            add_positions, definition, eager, case.make_added(dtype), ["x", "table"], dtype=dtype, scale=case.d**0.5
        )
    except AssertionError as error:
        return str(error)
    return None


def competitors(case: cases.EmbedCase, dtype: torch.dtype, direction: str) -> dict[str, Callable[[], object]]:
    inputs = {name: x.requires_grad_(direction != "forward") for name, x in case.make_added(dtype).items()}
    dout = torch.randn(inputs["x"].shape).to(dtype)

    def call(function):
        if direction == "forward":
            return lambda: function(**inputs, scale=case.d**0.5)
        return lambda: torch.autograd.grad(function(**inputs, scale=case.d**0.5), inputs.values(), dout)

    return {"ours": call(add_positions), "eager": call(eager)}


def line(group: str, case: cases.EmbedCase, dtype: str, direction: str) -> harness.Line:
    torch_dtype = harness.DTYPES[dtype]
    row = case.d * torch_dtype.itemsize
    tokens, table = (case.b or 1) * case.s * row, case.s * row
    backward = direction != "forward"  # dout is read for x and for the table
    return harness.Line(
        group,
        case.name,
        dtype,
        direction,
        competitors=lambda: competitors(case, torch_dtype, direction),
        wrong=lambda: wrong(case, torch_dtype),
        bytes_read=tokens + table + backward * 2 * tokens,
        bytes_written=tokens + backward * (tokens + table),
    )
