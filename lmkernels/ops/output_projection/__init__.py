"""The projection that follows attention."""

from __future__ import annotations

from torch import Tensor

from .._checks import check_floating
from ..linear import linear
from ..quantize_weight.api import QuantizedWeight

__all__ = ["output_projection"]


def output_projection(
    attn: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`linear` of attention's result: the heads of a token side by side, times weight^T, plus bias and residual.

    attn: (b, s, h, d) or (t, h, d)
    weight: (d_model, h d), bias: (d_model,), residual: (b, s, d_model) or (t, d_model); dtypes as in `linear`
    Returns (b, s, d_model) or (t, d_model).
    """
    check_floating("attn", attn)
    if attn.dim() < 3:
        raise ValueError(f"attn must be (..., h, d) with at least 3 axes, got {tuple(attn.shape)}")
    return linear(attn.flatten(-2), weight, bias, residual=residual, backend=backend)
