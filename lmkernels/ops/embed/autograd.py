"""The gradient of embedding, and of all that adds rows of a table to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import needs_gradient
from .._checks import check_range
from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}

_NAMES = ("token_ids", "positions", "type_ids")


def run(module, x: Tensor | None, scale: float, *ids_and_tables: Tensor | None) -> Tensor:
    """The sum from a backend; autograd is entered only where a gradient is wanted.

    ids_and_tables: token_ids, token_table, positions, position_table, type_ids, type_table
    """
    ids, tables = ids_and_tables[::2], ids_and_tables[1::2]
    if module is not native:  # which looks itself
        for name, index, table in zip(_NAMES, ids, tables, strict=True):
            if table is not None:
                check_range(name, index, table.shape[0])
    if module is reference:
        return module.forward(x, scale, *ids_and_tables)
    if not needs_gradient(x, *tables):
        return module.forward(x, scale, *ids_and_tables)
    return _Embed.apply(module.__name__.rpartition(".")[2], scale, x, *ids_and_tables)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, scale, x, *ids_and_tables):
        ctx.name, ctx.scale = name, scale
        # a table may change before the backward: its gradient needs its size alone
        ctx.save_for_backward(*ids_and_tables[::2])
        ctx.tables = [None if table is None else (table.shape[0], table.dtype) for table in ids_and_tables[1::2]]
        return BACKENDS[name].forward(x, scale, *ids_and_tables)

    @staticmethod
    def backward(ctx, dout):
        needs_x, needs_tables = ctx.needs_input_grad[2], ctx.needs_input_grad[4::2]
        gradients = []
        for ids, table, needed in zip(ctx.saved_tensors, ctx.tables, needs_tables, strict=True):
            gradients += [None, _table_gradient(ctx.name, dout, ids, *table) if needed else None]
        dx = (dout if ctx.scale == 1.0 else dout * ctx.scale) if needs_x else None
        return None, None, dx, *gradients


def _table_gradient(name: str, dout: Tensor, ids: Tensor | None, n_rows: int, dtype: torch.dtype) -> Tensor:
    float32 = dtype != dout.dtype
    if needs_gradient(dout):
        return _TableGradient.apply(name, dout, ids, n_rows, float32)
    return BACKENDS[name].backward(dout, ids, n_rows, float32)


class _TableGradient(torch.autograd.Function):
    """Linear in dout: its gradient is a look-up."""

    @staticmethod
    def forward(ctx, name, dout, ids, n_rows, float32):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = dout.shape, dout.dtype
        return BACKENDS[name].backward(dout, ids, n_rows, float32)

    @staticmethod
    def backward(ctx, dtable):
        (ids,) = ctx.saved_tensors
        rows = dtable[: ctx.shape[-2]] if ids is None else dtable[ids]
        return None, rows.to(ctx.dtype).expand(ctx.shape), None, None, None
