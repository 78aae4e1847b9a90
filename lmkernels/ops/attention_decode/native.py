"""Attention over a cache in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library

MAX_HEAD_DIM = 256
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# without k_new nothing is written
_library.LIBRARY.define(
    "attention_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_lengths, Tensor? k_new, "
    "Tensor? v_new, Tensor? cos, Tensor? sin, bool interleaved, Tensor? block_table, float scale, float softcap, "
    "SymInt left, Tensor? alibi_slopes, Tensor? sink, Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> (Tensor, Tensor)"
)
_decode = torch.ops.lmkernels.attention_decode.default


@torch.library.register_fake("lmkernels::attention_decode", lib=_library.LIBRARY)
def _(q, k_cache, v_cache, *rest):
    b, s_q, h, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(b, s_q, h, v_cache.shape[3]), q.new_empty(b, h, s_q, dtype=lse_dtype)


def unsupported(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    if _library.native_error is not None:
        return _library.native_error
    if not q.is_cpu:
        return f"the compiled library has no kernel for device {q.device.type!r}"
    if q.dtype not in _FLOATS:
        return f"dtype {q.dtype} is not one of float32, bfloat16, float16, float64"
    if q.size(3) > MAX_HEAD_DIM or v_cache.size(3) > MAX_HEAD_DIM:
        return f"head sizes go up to {MAX_HEAD_DIM}, got {q.size(3)} and {v_cache.size(3)}"
    return None


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """out (b, s_q, h, d_v) and lse (b, h, s_q); `arguments` in the order of the schema."""
    return _decode(q, k_cache, v_cache, *arguments)
