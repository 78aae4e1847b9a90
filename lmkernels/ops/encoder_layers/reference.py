"""The definition of an encoder's layers: the references of the ops that they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor

from ..attention import attention
from ..attention_varlen import attention_varlen
from ..linear import linear
from ..norms import layer_norm
from ..quantize_weight import QuantizedWeight

PER_LAYER = 16  # parameters


def unsupported(x: Tensor, parameters: Sequence[Tensor | QuantizedWeight], heads: int) -> str | None:
    return None


def pairs(parameters: Sequence[Tensor | QuantizedWeight]) -> Iterable[tuple[Tensor | QuantizedWeight, Tensor]]:
    """Weights, each with its bias."""
    return zip(parameters[::2], parameters[1::2], strict=True)


def forward(
    x: Tensor,
    parameters: Sequence[Tensor | QuantizedWeight],
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    heads: int,
    activation: str | None,
    eps: float,
) -> Tensor:
    """x after the layers, in its shape; arguments as `encoder_layers` after its checks."""
    dense = partial(linear, backend="reference")
    for first in range(0, len(parameters), PER_LAYER):
        query, key, value, output, norm1, up, down, norm2 = pairs(parameters[first : first + PER_LAYER])
        q, k, v = (dense(x, *part).unflatten(-1, (heads, -1)) for part in (query, key, value))
        if cu_seqlens is None:
            out = attention(q, k, v, backend="reference")
        else:
            bounds = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
            out = attention_varlen(q, k, v, *bounds, backend="reference")
        x = layer_norm(dense(out.flatten(-2), *output, residual=x), *norm1, eps, backend="reference")
        hidden = dense(x, *up, activation=activation)
        x = layer_norm(dense(hidden, *down, residual=x), *norm2, eps, backend="reference")
    return x
