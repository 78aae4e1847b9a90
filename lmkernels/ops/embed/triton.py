"""Embedding in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton

PIECE = 128  # tokens that one program adds up


@_triton.op("embed_fwd")
def _fwd(x, scale, token_ids, token_table, positions, position_table, type_ids, type_table):
    from . import triton_kernels as kernels

    out = x.new_empty(x.shape) if x is not None else token_table.new_empty(*token_ids.shape, token_table.shape[1])
    if not out.numel():
        return out
    *_, s, d = out.shape
    tokens = out.numel() // d
    cols = min(1024, _triton.next_power_of_2(d))
    rows = min(16, 4096 // cols)
    tables = (token_table, position_table, type_table)
    _triton.launch(
        kernels.fwd, (_triton.ceil_div(tokens, rows), _triton.ceil_div(d, cols)),
        out, x, token_ids, token_table, positions, position_table, type_ids, type_table, tokens, s, d, scale,
        *(0 if table is None else table.shape[0] for table in tables),
        *((0, 0, 0) if x is None else ((0,) * (3 - x.dim()) + x.stride())),
        *_strides(token_ids, token_table), *_strides(positions, position_table), *_strides(type_ids, type_table),
        ROWS=rows, COLS=cols, num_warps=4,
    )  # fmt: skip
    return out


def _strides(ids: Tensor | None, table: Tensor | None) -> tuple[int, int, int, int]:
    """Those of the indices on (b, s), and of the table."""
    of_ids = (0, 0) if ids is None else _triton.broadcast_strides(ids)
    return *of_ids, *((0, 0) if table is None else table.stride())


@_triton.op("embed_bwd")
def _bwd(dout, ids, n_rows, float32):
    from . import triton_kernels as kernels

    d = dout.shape[-1]
    dtype = torch.float32 if float32 else dout.dtype
    dtable = dout.new_zeros(n_rows, d, dtype=dtype)
    if not dout.numel() or not n_rows:
        return dtable
    if dout.dim() == 3 and (ids is None or ids.dim() == 1 or ids.shape[0] == 1):
        # all sequences have the same rows
        b, s = dout.shape[:2]
        if b > 1:
            dout = _triton.column_sums(dout.reshape(b, s * d), dtype if ids is None else torch.float32).view(s, d)
        else:
            dout = dout[0]
    if ids is None:
        dtable[: dout.shape[0]] = dout
        return dtable
    dout = _triton.rows_of(dout)
    rows, order = ids.reshape(-1).clamp(0, n_rows - 1).sort(stable=True)
    starts, ends = torch.searchsorted(rows, rows), torch.searchsorted(rows, rows, right=True)
    tokens = rows.shape[0]
    partial = dout.new_empty(2 * _triton.ceil_div(tokens, PIECE), d, dtype=torch.float32)
    cols = min(512, _triton.next_power_of_2(d))
    grid = (tokens, _triton.ceil_div(d, cols))
    options = {"PIECE": PIECE, "TOKENS": 8, "COLS": cols, "num_warps": max(1, min(4, cols // 64))}
    _triton.launch(
        kernels.bwd_pieces, grid, dout, rows, order, starts, ends, dtable, partial, d, dout.stride(0), **options
    )
    if tokens > PIECE:
        _triton.launch(kernels.bwd_join, grid, rows, starts, ends, dtable, partial, d, **options)
    return dtable


def unsupported(x: Tensor) -> str | None:
    return _triton.unsupported(x)


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
    """The gradient (n_rows, d) of one table, in dout's dtype or in float32, the same bits in every run."""
    return _bwd(dout, ids, n_rows, float32)
