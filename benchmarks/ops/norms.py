"""layer_norm and rms_norm against torch's, alone and after the addition of a residual: forward, and with backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from lmkernels import layer_norm, rms_norm
from lmkernels.testing import cases, numerics

EPS = 1e-5
CHECKED_ROWS = 512  # float64 is slow
NORMS = {"layer_norm": (layer_norm, F.layer_norm), "rms_norm": (rms_norm, F.rms_norm)}


def lines() -> list[harness.Line]:
    """One per norm, case, dtype and pass."""
    return [
        line(norm, group, replace(case, residual=residual, bias=norm == "layer_norm"), dtype, direction)
        for norm in NORMS
        for group, members in cases.NORM_BENCHMARKS.items()
        for dtype in harness.DTYPES
        for case in members
        for residual in (None, "same")
        for direction in ("forward", "forward+backward")
    ]


def ours(norm: str, x: Tensor, residual: Tensor | None = None, **parameters: Tensor):
    return NORMS[norm][0](x, **parameters, eps=EPS, residual=residual)


def plain(norm: str, x: Tensor, residual: Tensor | None = None, **parameters: Tensor):
    s = x if residual is None else x + residual
    y = NORMS[norm][1](s, s.shape[-1:], **parameters, eps=EPS)
    return y if residual is None else (y, s)


def wrong(norm: str, case: cases.NormCase, dtype: torch.dtype) -> str | None:
    """Why the results of this case are wrong, or None: by the tests' rule, against float64, on some of the rows."""
    case = replace(case, shape=(min(case.shape[0], CHECKED_ROWS), case.shape[1]))
    inputs = case.make(dtype)
    reference = partial(NORMS[norm][0], eps=EPS, backend="reference")
    try:
        numerics.assert_op_as_accurate(
            partial(ours, norm), reference, partial(plain, norm), inputs, inputs, dtype=dtype, samples=case.shape[0]
        )
    except AssertionError as error:
        return str(error)
    return None


def competitors(
    norm: str, case: cases.NormCase, dtype: torch.dtype, direction: str, peers: dict[str, Callable] | None = None
) -> dict[str, Callable]:
    """peers: beside torch's norm; they take what `plain` takes after the norm's name."""
    inputs = case.make(dtype)
    backward = direction != "forward"
    douts = [torch.randn(case.shape).to(dtype) for _ in range(1 if case.residual is None else 2)]

    def call(function):
        leaves = {name: x.detach().requires_grad_(backward) for name, x in inputs.items()}
        if backward:
            return lambda: torch.autograd.grad(function(**leaves), leaves.values(), douts)
        return lambda: function(**leaves)

    functions = {"ours": partial(ours, norm), "torch": partial(plain, norm)} | (peers or {})
    return {name: call(function) for name, function in functions.items()}


def line(norm: str, group: str, case: cases.NormCase, dtype: str, direction: str) -> harness.Line:
    torch_dtype = harness.DTYPES[dtype]
    both = case.residual is not None
    reads, writes = (2, 2) if both else (1, 1)  # x and residual; y and s
    if direction != "forward":
        reads, writes = reads + (3 if both else 2), writes + 1  # dy, ds and s; dx
    tensor = case.shape[0] * case.shape[1] * torch_dtype.itemsize
    return harness.Line(
        f"{norm}{' with residual' if both else ''}, {group}",
        f"{norm} {case.name}{' residual' if both else ''}",
        dtype,
        direction,
        competitors=lambda: competitors(norm, case, torch_dtype, direction),
        wrong=lambda: wrong(norm, case, torch_dtype),
        bytes_read=reads * tensor,
        bytes_written=writes * tensor,
    )
