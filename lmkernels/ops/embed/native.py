"""Embedding in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library

_library.LIBRARY.define(
    "embed_fwd(Tensor? x, float scale, Tensor? token_ids, Tensor? token_table, Tensor? positions, "
    "Tensor? position_table, Tensor? type_ids, Tensor? type_table) -> Tensor"
)
_library.LIBRARY.define("embed_bwd(Tensor dout, Tensor? ids, SymInt n_rows, bool float32) -> Tensor")
_fwd = torch.ops.lmkernels.embed_fwd.default
_bwd = torch.ops.lmkernels.embed_bwd.default


@torch.library.register_fake("lmkernels::embed_fwd", lib=_library.LIBRARY)
def _(x, scale, token_ids, token_table, positions, position_table, type_ids, type_table):
    return x.new_empty(x.shape) if x is not None else token_table.new_empty(*token_ids.shape, token_table.shape[1])


@torch.library.register_fake("lmkernels::embed_bwd", lib=_library.LIBRARY)
def _(dout, ids, n_rows, float32):
    return dout.new_empty(n_rows, dout.shape[-1], dtype=torch.float32 if float32 else dout.dtype)


def unsupported(x: Tensor) -> str | None:
    if _library.native_error is not None:
        return _library.native_error
    if not x.is_cpu:
        return f"the compiled library has no kernel for device {x.device.type!r}"
    return None


def forward(
    x: Tensor | None,
    scale: float,
    token_ids: Tensor | None,
    token_table: Tensor | None,
    positions: Tensor | None,
    position_table: Tensor | None,
    type_ids: Tensor | None,
    type_table: Tensor | None,
) -> Tensor:
    """The sum of the terms that are there, rounded once."""
    return _fwd(x, scale, token_ids, token_table, positions, position_table, type_ids, type_table)


def backward(dout: Tensor, ids: Tensor | None, n_rows: int, float32: bool) -> Tensor:
    """The gradient (n_rows, d) of one table, in dout's dtype or in float32, the same bits for any number of threads."""
    return _bwd(dout, ids, n_rows, float32)
