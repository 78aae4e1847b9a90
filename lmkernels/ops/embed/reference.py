"""The definition of embedding in plain torch: rows of tables, looked up for each token and added up."""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(x: Tensor) -> str | None:
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
    """x * scale, or token_table[token_ids], plus position_table[positions] plus type_table[type_ids].

    Each table may be absent; positions are 0, 1, 2, ... where they are. Summed in float32 (float64 for float64).
    """
    first = token_table if x is None else x
    acc = torch.promote_types(first.dtype, torch.float32)
    total = token_table[token_ids].to(acc) if x is None else x.to(acc) * scale
    if position_table is not None:
        rows = position_table[: total.shape[-2]] if positions is None else position_table[positions]
        total = total + rows.to(acc)
    if type_table is not None:
        total = total + type_table[type_ids].to(acc)
    return total.to(first.dtype)
