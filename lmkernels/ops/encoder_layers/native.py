"""The layers of an encoder in the compiled library: the kernels of the ops that they are made of, without Python."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _library
from .._precision import float32_parts
from ..linear.native import CODES
from ..linear.native import unsupported as linear_unsupported
from ..quantize_weight import QuantizedWeight

MAX_HEAD_DIM = 256

# parameters: of each layer weight and bias of query, key, value, output, norm, up, down and norm; a quantised weight is
# its data and its scales.
_library.LIBRARY.define(
    "encoder_layers(Tensor x, Tensor[] parameters, Tensor? cu_seqlens, SymInt max_seqlen, int heads, float scale, "
    "int activation, float eps, int parts=3) -> Tensor"
)
_layers = torch.ops.lmkernels.encoder_layers.default


@torch.library.register_fake("lmkernels::encoder_layers", lib=_library.LIBRARY)
def _(x, *rest):
    return x.new_empty(x.shape)


def unsupported(x: Tensor, parameters: Sequence[Tensor | QuantizedWeight], heads: int) -> str | None:
    if x.shape[-1] // heads > MAX_HEAD_DIM:
        return f"head sizes go up to {MAX_HEAD_DIM}, got {x.shape[-1] // heads}"
    if x.dtype == torch.float64 and any(isinstance(p, QuantizedWeight) for p in parameters):
        return "quantised weights take x in float32, bfloat16 or float16, got torch.float64"
    return linear_unsupported(x, x)


def forward(
    x: Tensor,
    parameters: Sequence[Tensor | QuantizedWeight],
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    heads: int,
    activation: str,
    eps: float,
) -> Tensor:
    tensors = []
    for p in parameters:
        if isinstance(p, QuantizedWeight):
            tensors += p.data, p.scales
        else:
            tensors.append(p)
    scale = (x.shape[-1] // heads) ** -0.5
    return _layers(x, tensors, cu_seqlens, max_seqlen, heads, scale, CODES[activation], eps, float32_parts())
