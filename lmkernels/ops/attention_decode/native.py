"""Attention over a cache in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library

MAX_HEAD_DIM = 256
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# without k_new nothing is written
_SCHEMA = (
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_lengths, Tensor? k_new, "
    "Tensor? v_new, Tensor? cos, Tensor? sin, bool interleaved, Tensor? block_table, float scale, float softcap, "
    "SymInt left, Tensor? alibi_slopes, Tensor? sink, Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> (Tensor, Tensor)"
)


def _fake(q, k_cache, v_cache, *rest):
    b, s_q, h, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(b, s_q, h, v_cache.shape[3]), q.new_empty(b, h, s_q, dtype=lse_dtype)


# attention_decode on CUDA tensors is Triton's
for _name in ("attention_decode", "attention_decode_cuda"):
    _library.LIBRARY.define(_name + _SCHEMA)
    torch.library.register_fake(f"lmkernels::{_name}", _fake, lib=_library.LIBRARY)
_decode = torch.ops.lmkernels.attention_decode.default
_decode_cuda = torch.ops.lmkernels.attention_decode_cuda.default


def unsupported(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    """On CUDA tensors it runs when it is named: see `_dispatch.choose`."""
    if q.is_cuda:
        reason = _library.cuda_error
        # a graph is compiled for the device at hand, which torch's own compiler has found new enough
        if reason is None and not torch.compiler.is_compiling():
            reason = _library.gpu_absence(q.device)
    elif q.is_cpu:
        reason = _library.native_error
    else:
        reason = f"the compiled library has no kernel for device {q.device.type!r}"
    if reason is not None:
        return reason
    floats = _FLOATS[:3] if q.is_cuda else _FLOATS
    if q.dtype not in floats:
        return f"dtype {q.dtype} is not one of {', '.join(str(x).removeprefix('torch.') for x in floats)}"
    if q.size(3) > MAX_HEAD_DIM or v_cache.size(3) > MAX_HEAD_DIM:
        return f"head sizes go up to {MAX_HEAD_DIM}, got {q.size(3)} and {v_cache.size(3)}"
    return None


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """out (b, s_q, h, d_v) and lse (b, h, s_q); `arguments` in the order of the schema."""
    decode = _decode_cuda if q.is_cuda else _decode
    return decode(q, k_cache, v_cache, *arguments)
