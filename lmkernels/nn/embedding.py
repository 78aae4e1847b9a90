"""Embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.embed import embed
from ._scope import is_for_torch


class Embedding(torch.nn.Embedding):
    """`torch.nn.Embedding` by `lmkernels.embed`: (b, s) or (t,) to (..., embedding_dim).

    The gradient is dense, and touches memory only where tokens fall. `max_norm`, `sparse` and `scale_grad_by_freq`
    are left to torch, and so are indices of other shapes.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not takes_indices(input) or is_for_torch(self.weight) or not is_dense(self):
            return super().forward(input)
        return embed(input, table(self))


def is_dense(embedding: torch.nn.Embedding) -> bool:
    return embedding.max_norm is None and not embedding.sparse and not embedding.scale_grad_by_freq


def takes_indices(indices: Tensor) -> bool:
    """Whether `embed` reads such indices."""
    return (
        type(indices) is Tensor
        and indices.dtype in (torch.int64, torch.int32)
        and indices.dim() in (1, 2)
        and not (indices.is_nested or indices.is_meta)
    )


def table(embedding: torch.nn.Embedding) -> Tensor:
    """The rows to look up; that of padding_idx has no gradient."""
    weight, row = embedding.weight, embedding.padding_idx
    if row is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    return _WithoutGradientOfRow.apply(weight, row)


class _WithoutGradientOfRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, row):
        ctx.row = row
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, dweight):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return dweight.index_fill(0, torch.tensor([ctx.row], device=dweight.device), 0), None
        # in place: the lookup's gradient was made for this view, and nobody else has it
        dweight[ctx.row] = 0
        return dweight, None
