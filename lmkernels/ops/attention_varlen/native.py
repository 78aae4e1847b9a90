"""Attention over packed sequences in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .._precision import float32_parts
from ..attention.native import unsupported

__all__ = ["backward", "forward", "unsupported"]

_FEATURES = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sink, Tensor? kv_lengths, Tensor? seed, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "SymInt left, SymInt right, float scale, float softcap, float dropout_p"
)
_library.LIBRARY.define(
    f"attention_varlen_fwd(Tensor q, Tensor k, Tensor v, {_FEATURES}, int parts=3) -> (Tensor, Tensor)"
)
_library.LIBRARY.define(
    "attention_varlen_bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_FEATURES}, bool need_dbias, bool need_dslopes, bool need_dsink, bool deterministic, "
    "int parts=3) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_fwd = torch.ops.lmkernels.attention_varlen_fwd.default
_bwd = torch.ops.lmkernels.attention_varlen_bwd.default


@torch.library.register_fake("lmkernels::attention_varlen_fwd", lib=_library.LIBRARY)
def _(q, k, v, *features):
    t_q, h, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(t_q, h, v.shape[2]), q.new_empty(h, t_q, dtype=lse_dtype)


@torch.library.register_fake("lmkernels::attention_varlen_bwd", lib=_library.LIBRARY)
def _(dout, dlse, q, k, v, out, lse, *features_and_needs):
    _, bias, alibi_slopes, sink = features_and_needs[:4]
    need_dbias, need_dslopes, need_dsink = features_and_needs[15:18]

    def like(x, needed=True):
        return x.new_empty(x.shape) if needed else q.new_empty(0)

    return (like(q), like(k), like(v), like(bias, need_dbias), like(alibi_slopes, need_dslopes), like(sink, need_dsink))


def forward(q: Tensor, k: Tensor, v: Tensor, *features) -> tuple[Tensor, Tensor]:
    """out (t_q, h, d_v) and lse (h, t_q); `features` in the order of the schema."""
    return _fwd(q, k, v, *features, float32_parts())


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *features_and_needs,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias, dslopes, dsink; the last three are empty where not needed."""
    return _bwd(dout, dlse, q, k, v, out, lse, *features_and_needs, float32_parts())
