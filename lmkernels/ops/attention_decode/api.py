"""Attention over a cache of keys and values: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient
from ..attention.checks import check_features, check_scale, check_softcap, check_window
from . import native, reference, triton
from .checks import check_cache, check_new, check_tables, check_values, in_cache_dtype

BACKENDS = {"native": native, "triton": triton, "reference": reference}


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lengths: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends the new tokens to a cache of keys and values, in place, and attends to all that it then holds.

    q: (b, s_q, h, d)          queries of the newest s_q tokens; 1 for plain generation
    k_cache: (b, max_len, h_kv, d)    any strides on the first three axes: a cache (b, h_kv, max_len, d) is passed
    v_cache: (b, max_len, h_kv, d_v)  as its transpose. Paged: (num_blocks, block_size, h_kv, d or d_v)
    kv_lengths: (b,) int32 or int64, tokens of each sequence in the cache before this call; it is not changed
    k_new: (b, s_new, h_kv, d), v_new: (b, s_new, h_kv, d_v)
        written at positions kv_lengths .. kv_lengths + s_new - 1. Without them nothing is written.

    With total = kv_lengths + s_new, query i stands at position total - s_q + i of its sequence and sees the keys up to
    and including its own position; one whose position is below 0 sees nothing: out 0, lse -inf.
    For s_q = 2, total = 4:   1 1 1 0
                              1 1 1 1
    cos, sin: (max_pos, d_rot / 2), d_rot <= d: the first d_rot columns of q and of k_new are rotated by the angle of
        their position, k_new before it is written. q and k_new themselves are not changed.
    interleaved: column pairs are (0, 1), (2, 3), ... instead of (0, d_rot / 2), (1, d_rot / 2 + 1), ...
    block_table: (b, max_blocks) int32 or int64: token j of a sequence is token j % block_size of page
        block_table[sequence, j // block_size]. Any block_size. A page that is written must belong to one sequence;
        entries beyond a sequence's end, and pages that lie wholly before its window, are not looked at.
    scale, softcap, window, alibi_slopes, sink: as in `attention`; distances count from the query's own position, and as
        no query sees a later key, the right side of the window has no effect.
    return_lse: also return the natural logarithm of the softmax's denominator, the sink included.
    backend: "native", "triton" or "reference"; None takes the first that can run this.
    k_scale, v_scale: (b, max_len, h_kv) float32, paged (num_blocks, block_size, h_kv), any strides: with caches of
        int8, each row is its scale times integers from -127 to 127. Written on append: scale = max|x| / 127, integers
        rounded to nearest even. The error of a result against a float32 cache is about 0.4 % of the values' size for
        one key and falls with the number of keys that share the weight.

    Everything but an int8 cache has q's dtype: float32, bfloat16, float16 or (on the CPU, without int8) float64. Under
    autocast q, k_new and v_new take the cache's dtype (the autocast dtype for int8).
    Returns (b, s_q, h, d_v) in that dtype, and lse (b, h, s_q) in float32 (float64 for float64) on request.
    A sequence's results depend neither on the batch nor on the number of threads, and are the same bits for a paged
    cache as for a contiguous one. No gradients: inputs that require one are refused while gradients are enabled.

    Raises ValueError or TypeError for bad arguments before anything is written (values in kv_lengths and block_table
    are not looked at under torch.compile: there they are clamped), NotImplementedError when `backend` cannot run them.
    torch.compile with dynamic shapes (torch 2.13) may lose what an op, any op, writes to several views of one tensor:
    under it, give the keys and the values of each layer tensors of their own.

    Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; Kwon et al. 2023, arXiv:2309.06180.
    """
    q, k_new, v_new = in_cache_dtype(q, k_cache, k_new, v_new)
    b, s_q, h, d, capacity = check_cache(q, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale)
    s_new = check_new(q, k_cache, v_cache, k_new, v_new, capacity)
    cos, sin = check_tables(q, cos, sin)
    left, _ = check_window(window, causal=True)
    _, _, alibi_slopes, sink, _ = check_features(q, b, h, s_q, capacity, None, None, alibi_slopes, sink, None)
    scale, softcap = check_scale(scale, d), check_softcap(softcap)
    if needs_gradient(q, k_cache, v_cache, k_new, v_new, cos, sin, alibi_slopes, sink, k_scale, v_scale):
        raise ValueError(
            "attention_decode gives no gradient, and one of its arguments requires one: call it under torch.no_grad(), "
            "or use attention"
        )
    module = _dispatch.choose("attention_decode", BACKENDS, backend, q, k_cache, v_cache)
    if q.is_cpu and not torch.compiler.is_compiling():
        # reading the values would break a compiled graph and stall a GPU; the kernels clamp them
        check_values(k_cache, kv_lengths, block_table, s_q, s_new, capacity, cos, left)
    if block_table is not None:
        block_table = block_table.to(torch.int32)
    out, lse = module.forward(
        q,
        k_cache,
        v_cache,
        kv_lengths,
        k_new,
        v_new,
        cos,
        sin,
        bool(interleaved),
        block_table,
        scale,
        softcap,
        left,
        alibi_slopes,
        sink,
        k_scale,
        v_scale,
    )
    if k_new is not None and module is not reference and not torch.compiler.is_compiling():
        _count_writes(k_cache, v_cache, k_scale, v_scale)
    return (out, lse) if return_lse else out


def _count_writes(*written: Tensor | None) -> None:
    """For whoever saved a cache for a backward: the dispatcher does not count what an op of a library writes."""
    tensors = [x for x in written if x is not None]
    if not any(x.is_inference() for x in tensors):
        torch.autograd.graph.increment_version(tensors)
