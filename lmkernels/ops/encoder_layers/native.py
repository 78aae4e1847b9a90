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
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as the library numbers them

# parameters: of each layer weight and bias of query, key, value, output, norm, up, down and norm; a quantised weight is
# its data and its scales.
_library.LIBRARY.define(
    "encoder_layers(Tensor x, Tensor[] parameters, Tensor? cu_seqlens, SymInt max_seqlen, int heads, float scale, "
    "int activation, float eps, int parts=3) -> Tensor"
)
_CALL = (
    "Tensor? cu_seqlens, SymInt batch, SymInt max_seqlen, int heads, float scale, int activation, {eps}"
    "Tensor? attention_seed, float attention_p, int dropped, int seed1, int seed2, "
)
# y, and what the backward wants
_library.LIBRARY.define(
    f"encoder_layer_fwd(Tensor x, Tensor[] parameters, {_CALL.format(eps='float eps, ')}int dtype, int parts=3)"
    " -> Tensor[]"
)
# of x, then, where needed, of the parameters
_library.LIBRARY.define(
    f"encoder_layer_bwd(Tensor dy, Tensor[] saved, Tensor[] parameters, {_CALL.format(eps='')}bool need_parameters, "
    "int parts=3) -> Tensor[]"
)
_layers = torch.ops.lmkernels.encoder_layers.default
layer_fwd = torch.ops.lmkernels.encoder_layer_fwd.default
layer_bwd = torch.ops.lmkernels.encoder_layer_bwd.default


@torch.library.register_fake("lmkernels::encoder_layers", lib=_library.LIBRARY)
def _(x, *rest):
    return x.new_empty(x.shape)


@torch.library.register_fake("lmkernels::encoder_layer_fwd", lib=_library.LIBRARY)
def _(x, parameters, cu_seqlens, batch, max_seqlen, heads, *rest):
    dtype = DTYPES[rest[-2] if len(rest) == 10 else rest[-1]]
    t, d_model = x.shape
    d_ff = parameters[10].shape[0]
    acc = torch.promote_types(x.dtype, torch.float32)
    dims = (t, heads, d_model // heads)
    shape, lse = (dims, (heads, t)) if cu_seqlens is not None else ((batch, t // max(batch, 1), *dims[1:]), None)
    lse = (batch, heads, t // max(batch, 1)) if lse is None else lse
    wide, narrow = x.new_empty(t, d_model), x.new_empty(shape, dtype=dtype)
    rows, hidden = x.new_empty(t, dtype=acc), x.new_empty(t, d_ff, dtype=dtype)

    def like(*tensors):
        return [torch.empty_like(tensor) for tensor in tensors]

    results = like(wide, narrow, narrow, narrow, narrow, x.new_empty(lse, dtype=acc), wide, rows, rows, wide, hidden)
    results += like(hidden, wide, rows, rows)
    if dtype != x.dtype:
        results += like(*[x.new_empty(t, d_model, dtype=dtype)] * 2)
    return results


@torch.library.register_fake("lmkernels::encoder_layer_bwd", lib=_library.LIBRARY)
def _(dy, saved, parameters, *rest):
    need_parameters = rest[11]
    return [dy.new_empty(dy.shape), *(p.new_empty(p.shape) for p in parameters if need_parameters)]


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
