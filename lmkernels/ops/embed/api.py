"""Embedding: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import check_device, check_floating, check_indices, check_range, check_same_or_wider, check_tensor
from ..linear.api import QuantizedWeight
from .autograd import BACKENDS, run


def embed(
    token_ids: Tensor,
    token_table: Tensor | QuantizedWeight,
    *,
    position_table: Tensor | None = None,
    positions: Tensor | None = None,
    type_ids: Tensor | None = None,
    type_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """token_table[token_ids] + position_table[positions] + type_table[type_ids], in one pass.

    token_ids: (b, s), or packed (t,); int32 or int64, as all indices
    token_table: (vocab, d), float32, bfloat16, float16 or (on the CPU) float64; or from `quantize_weight`, whose rows
        are looked up in the dtype of the other tables, or in float32
    position_table: (n, d), type_table: (n_types, d), in token_table's dtype or, where that has 16 bits, in float32
    positions: (s,), (1, s) or (b, s), packed (t,); None is 0, 1, 2, ...
    type_ids: the same shapes; None is type 0
    backend: "native", "triton" or "reference"; None takes the first that can run this.

    Returns (b, s, d) or (t, d) in token_table's dtype, summed in float32 (float64 for float64) and rounded once.
    Differentiable any number of times in the tables. Their gradients are dense; tokens with one row are added up in
    float32 in their order, so the bits depend neither on threads nor on chance.

    Raises ValueError or TypeError for bad arguments, an index outside its table among them, NotImplementedError when
    `backend` cannot run them.
    """
    check_tensor("token_ids", token_ids)
    if token_ids.dim() not in (1, 2):
        raise ValueError(f"token_ids must be (b, s) or (t,), got {tuple(token_ids.shape)}")
    if isinstance(token_table, QuantizedWeight):
        token_table, token_ids = _quantized_rows(token_table, token_ids, position_table, type_table)
    check_table("token_table", token_table)
    check_indices("token_ids", token_ids, (tuple(token_ids.shape),), "token_table", token_table)
    shapes = index_shapes(token_ids.shape)
    for name, table, index_name, index in (
        ("position_table", position_table, "positions", positions),
        ("type_table", type_table, "type_ids", type_ids),
    ):
        if table is not None:
            check_beside(name, table, index_name, index, shapes, "token_table", token_table)
        elif index is not None:
            raise ValueError(f"{index_name} must be None without {name}, got {tuple(index.shape)}")
    if position_table is not None and positions is None:
        check_length("position_table", position_table, token_ids.shape[-1])
    if type_table is not None and type_ids is None:
        type_ids = torch.zeros((), dtype=torch.int64, device=token_ids.device).expand(shapes[0])
    module = _dispatch.choose("embed", BACKENDS, backend, token_table)
    return run(module, None, 1.0, token_ids, token_table, positions, position_table, type_ids, type_table)


def _quantized_rows(table: QuantizedWeight, token_ids: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """A small table with the row of each token, and the tokens' places in it."""
    check_indices("token_ids", token_ids, (tuple(token_ids.shape),), "token_table", table)
    check_range("token_ids", token_ids, table.shape[0])
    dtype = next((other.dtype for other in others if isinstance(other, Tensor)), torch.float32)
    places = torch.arange(token_ids.numel(), device=token_ids.device).view(token_ids.shape)
    return table.rows(token_ids.flatten(), dtype), places


def check_table(name: str, table) -> None:
    if check_floating(name, table).dim() != 2:
        raise ValueError(f"{name} must be (n, d), got {tuple(table.shape)}")


def index_shapes(tokens: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes that indices may have beside tokens (s,) or (b, s)."""
    s = tokens[-1]
    return ((s,),) if len(tokens) == 1 else ((s,), (1, s), tuple(tokens))


def check_beside(name: str, table, index_name: str, index, shapes, other_name: str, other: Tensor) -> None:
    """A table and its indices, beside the tensor that gives d, dtype and device."""
    check_table(name, table)
    check_device(name, table, other_name, other)
    check_same_or_wider(name, table, other)
    if table.shape[1] != other.shape[-1]:
        raise ValueError(f"{name} must be (n, {other.shape[-1]}), got {tuple(table.shape)}")
    if index is not None:
        check_indices(index_name, index, shapes, other_name, other)


def check_length(name: str, table: Tensor, s: int) -> None:
    if table.shape[0] < s:
        raise ValueError(f"{name} must have a row for each of the {s} positions, got {table.shape[0]}")
