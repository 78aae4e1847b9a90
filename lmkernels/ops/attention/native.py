"""Softmax attention in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .._precision import float32_parts

MAX_HEAD_DIM = 256

_FEATURES = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sink, Tensor? kv_lengths, Tensor? seed, "
    "SymInt left, SymInt right, SymInt offset, float scale, float softcap, float dropout_p"
)
_library.LIBRARY.define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_FEATURES}, int parts=3) -> (Tensor, Tensor)")
_library.LIBRARY.define(
    "attention_bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_FEATURES}, bool need_dbias, bool need_dslopes, bool need_dsink, bool deterministic, "
    "int parts=3) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# nothing but what "causal" needs
_PLAIN = "SymInt right, SymInt offset, float scale"
_library.LIBRARY.define(f"attention_fwd.plain(Tensor q, Tensor k, Tensor v, {_PLAIN}, int parts=3) -> (Tensor, Tensor)")
_library.LIBRARY.define(
    "attention_bwd.plain(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_PLAIN}, bool deterministic, int parts=3) -> (Tensor, Tensor, Tensor)"
)
_fwd = torch.ops.lmkernels.attention_fwd.default
_bwd = torch.ops.lmkernels.attention_bwd.default
_fwd_plain = torch.ops.lmkernels.attention_fwd.plain
_bwd_plain = torch.ops.lmkernels.attention_bwd.plain


@torch.library.register_fake("lmkernels::attention_fwd", lib=_library.LIBRARY)
@torch.library.register_fake("lmkernels::attention_fwd.plain", lib=_library.LIBRARY)
def _(q, k, v, *features):
    b, s_q, h, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(b, s_q, h, v.shape[3]), q.new_empty(b, h, s_q, dtype=lse_dtype)


@torch.library.register_fake("lmkernels::attention_bwd", lib=_library.LIBRARY)
def _(
    dout,
    dlse,
    q,
    k,
    v,
    out,
    lse,
    mask,
    bias,
    alibi_slopes,
    sink,
    kv_lengths,
    seed,
    left,
    right,
    offset,
    scale,
    softcap,
    dropout_p,
    need_dbias,
    need_dslopes,
    need_dsink,
    deterministic,
    parts=3,
):
    def like(x, needed=True):
        return x.new_empty(x.shape) if needed else q.new_empty(0)

    return (like(q), like(k), like(v), like(bias, need_dbias), like(alibi_slopes, need_dslopes), like(sink, need_dsink))


@torch.library.register_fake("lmkernels::attention_bwd.plain", lib=_library.LIBRARY)
def _(dout, dlse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Every dtype that attention takes is supported."""
    if _library.native_error is not None:
        return _library.native_error
    if not q.is_cpu:
        return f"the compiled library has no kernel for device {q.device.type!r}"
    if q.shape[-1] > MAX_HEAD_DIM or v.shape[-1] > MAX_HEAD_DIM:
        return f"head sizes go up to {MAX_HEAD_DIM}, got {q.size(-1)} and {v.size(-1)}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, *features) -> tuple[Tensor, Tensor]:
    """out (b, s_q, h, d_v) and lse (b, h, s_q); `features` in the order of either schema."""
    op = _fwd_plain if len(features) == 3 else _fwd
    return op(q, k, v, *features, float32_parts())


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
    """dq, dk, dv and, with all features, dbias, dslopes and dsink, which are empty where not needed."""
    op = _bwd_plain if len(features_and_needs) == 4 else _bwd
    return op(dout, dlse, q, k, v, out, lse, *features_and_needs, float32_parts())
