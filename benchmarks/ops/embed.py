"""embed against sums of F.embedding: forward, backward, and a backward whose gradients are then read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from benchmarks import harness
from lmkernels import embed
from lmkernels.testing import cases, numerics

PASSES = ("forward", "backward", "backward and a read")


def lines() -> list[harness.Line]:
    """One per case, dtype and pass."""
    return [
        line(group, case, dtype, direction)
        for group, members in cases.EMBED_BENCHMARKS.items()
        for dtype in harness.DTYPES
        for case in members
        for direction in PASSES
    ]


def eager(token_ids, token_table, position_table=None, type_ids=None, type_table=None):
    out = F.embedding(token_ids, token_table)
    if position_table is not None:
        out = out + F.embedding(torch.arange(token_ids.shape[-1], device=token_ids.device), position_table)
    return out if type_table is None else out + F.embedding(type_ids, type_table)


@cache
def wrong(case: cases.EmbedCase, dtype: torch.dtype) -> str | None:
    """Why the results of this case are wrong, or None: by the tests' rule."""
    inputs, tables = case.make(dtype)

    def definition(**arguments):
        return embed(**arguments, backend="reference")

    try:
        numerics.assert_op_as_accurate(embed, definition, eager, inputs, tables, dtype=dtype)
    except AssertionError as error:
        return str(error)
    return None


def competitors(case: cases.EmbedCase, dtype: torch.dtype, direction: str) -> dict[str, Callable[[], object]]:
    inputs, names = case.make(dtype)
    leaves = [inputs[name].requires_grad_(direction != "forward") for name in names]

    def call(function):
        if direction == "forward":
            return lambda: function(**inputs)
        out = function(**inputs)
        dout = torch.randn(out.shape).to(dtype)

        def backward():
            gradients = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            # an optimiser reads them: what a gradient's memory costs may only then be paid
            return [g.sum() for g in gradients] if direction == PASSES[2] else gradients

        return backward

    return {"ours": call(embed), "F.embedding": call(eager)}


def line(group: str, case: cases.EmbedCase, dtype: str, direction: str) -> harness.Line:
    torch_dtype = harness.DTYPES[dtype]
    row = case.d * torch_dtype.itemsize
    tokens, table = (case.b or 1) * case.s * row, case.vocab * row
    return harness.Line(
        group,
        case.name,
        dtype,
        direction,
        competitors=lambda: competitors(case, torch_dtype, direction),
        wrong=lambda: wrong(case, torch_dtype),
        bytes_read={PASSES[0]: tokens, PASSES[1]: tokens, PASSES[2]: tokens + table}[direction],
        bytes_written=tokens if direction == PASSES[0] else table,
    )
