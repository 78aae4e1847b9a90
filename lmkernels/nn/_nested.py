"""Nested tensors, torch's batches of sequences of different lengths, as the packed tokens that the ops take."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._autograd import needs_gradient


class Packed(NamedTuple):
    """The sequences of a nested tensor, end to end."""

    tokens: Tensor  # (t, d)
    cu_seqlens: Tensor  # (b + 1,)
    max_seqlen: int
    nest: Callable[[Tensor], Tensor]  # (t, d) as a nested tensor of the same sequences


def pack(name: str, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Packed:
    """The nested tensor (b, s*, d) of either of torch's layouts, without a copy where its sequences lie end to end.

    parameters: what else may want a gradient, which only the jagged layout can carry
    """
    if x.dim() != 3:
        raise ValueError(f"{name} must be nested (b, s*, d) with 3 axes, got {x.dim()}")
    return _pack_jagged(name, x) if x.layout == torch.jagged else _pack_strided(name, x, parameters)


def _pack_jagged(name: str, x: Tensor) -> Packed:
    if x._ragged_idx != 1:
        raise ValueError(f"{name} must be nested (b, s*, d) with sequences on axis 1, got them on axis {x._ragged_idx}")
    x = x.contiguous()
    offsets = x.offsets()
    lengths = offsets.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    return Packed(x.values(), offsets, longest, lambda y: torch.nested.nested_tensor_from_jagged(y, offsets))


def _pack_strided(name: str, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Packed:
    if needs_gradient(x, *parameters):
        raise ValueError(
            f"{name} must be nested with layout=torch.jagged where a gradient is wanted, got torch.strided; "
            "or run under torch.no_grad()"
        )
    x = x.contiguous()
    sizes = x._nested_tensor_size()  # (b, 2)
    lengths = sizes[:, 0]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tokens = x.values().view(-1, x.size(-1))

    def nest(y: Tensor) -> Tensor:
        y = y.contiguous()
        d = y.shape[-1]
        shapes = torch.stack([lengths, torch.full_like(lengths, d)], 1)
        strides = torch.tensor([d, 1]).expand(len(lengths), 2).contiguous()
        return torch._nested_view_from_buffer(y.view(-1), shapes, strides, cu_seqlens[:-1] * d)

    return Packed(tokens, cu_seqlens.to(x.device), int(lengths.max()) if lengths.numel() else 0, nest)
