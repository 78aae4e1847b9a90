"""Softmax attention in Triton: how the kernels of triton_kernels.py are launched, for padded and packed sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _triton, _triton_autotune
from .._precision import cuda_float32

MAX_HEAD_DIM = 256


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    reason = _triton.unsupported(q)
    if reason is None and (q.size(-1) > MAX_HEAD_DIM or v.size(-1) > MAX_HEAD_DIM):
        reason = f"head sizes go up to {MAX_HEAD_DIM}, got {q.size(-1)} and {v.size(-1)}"
    return reason


# BLOCK_M queries and BLOCK_N keys of one program, its warps and stages, by head size (rounded up to a power of two):
# the largest that ptxas fits into the registers and the shared memory. "sm_80" and "sm_90" are for 16 bits; float32
# goes to the matrix units as tf32 where torch allows that, and is multiplied one by one where not ("ieee").
TILES = {
    "fwd": {
        "sm_80": {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
        "sm_90": {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},
        "tf32": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
        "ieee": {64: (64, 32, 8, 1), 128: (64, 16, 8, 1), 256: (32, 16, 8, 1)},
    },
    "bwd_q": {
        "sm_80": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        "sm_90": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "tf32": {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)},
        "ieee": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "bwd_kv": {
        "sm_80": {64: (32, 64, 4, 2), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
        "sm_90": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 2)},
        "tf32": {64: (32, 64, 8, 1), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)},
        "ieee": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "bwd_bias": {  # and, in squares of BLOCK_M, bwd_distance
        "sm_80": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1), 256: (16, 32, 4, 1)},
        "sm_90": {64: (64, 64, 8, 1), 128: (32, 64, 8, 1), 256: (16, 32, 4, 1)},
        "tf32": {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 4, 1)},
        "ieee": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
}

# Instead of these, where something else wants registers too.
CROWDED = {
    "fwd": {
        "sm_80": {64: (64, 64, 4, 3), 128: (64, 64, 8, 2)},
        "sm_90": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2)},
        "ieee": {128: (64, 16, 16, 1)},
    },
    "bwd_q": {
        "sm_80": {64: (64, 32, 4, 2), 128: (64, 32, 8, 2)},
        "sm_90": {64: (64, 64, 8, 2), 128: (128, 32, 8, 2)},
    },
    "bwd_kv": {
        "sm_80": {64: (32, 32, 4, 2), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
        "sm_90": {64: (32, 128, 8, 2), 128: (16, 128, 8, 2), 256: (16, 64, 8, 2)},
        "tf32": {128: (16, 32, 8, 1)},
    },
}


def tile(kernel: str, d: int, kind: str, longest: int, crowded: bool) -> dict[str, int]:
    """The configuration of a kernel.

    d: the larger head size; kind: a key of TILES[kernel]
    longest: the longest sequence on the axis that the programs divide among them, queries or (bwd_kv) keys: no program
        takes much more. The other axis decides in which order sums are taken, and depends on nothing.
    """
    d = max(64, _triton.next_power_of_2(d))
    m, n, warps, stages = TILES[kernel][kind][d]
    if crowded:
        m, n, warps, stages = CROWDED.get(kernel, {}).get(kind, {}).get(d, (m, n, warps, stages))
    most = max(16, _triton.next_power_of_2(longest))
    if most < (n if kernel == "bwd_kv" else m):
        m, n = (m, most) if kernel == "bwd_kv" else (most, n)
        warps = 4 if kind != "ieee" and d < 256 and d * most <= 4096 else warps  # more would want more registers
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


class Packing(NamedTuple):
    """Where the sequences of packed tensors (t, h, d) lie."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Problem:
    """The arguments of one call, as the kernels take them."""

    def __init__(
        self, q, k, v, mask, bias, alibi_slopes, sink, kv_lengths, seed,
        left, right, offset, scale, softcap, dropout_p, packing: Packing | None = None,
    ):  # fmt: skip
        # the kernels take the maximum of the products before they are scaled
        self.flipped = scale < 0
        q, scale = (-q, -scale) if self.flipped else (q, scale)
        self.q, self.k, self.v = q, k, v = dense(q), dense(k), dense(v)
        self.mask, self.bias, self.slopes, self.sink = mask, bias, alibi_slopes, sink
        self.seed, self.packing = seed, packing
        self.h, self.d, self.h_kv, self.d_v = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
        if packing is None:
            self.b, self.s_q, self.s_k = q.shape[0], q.shape[1], k.shape[1]
            places = None, None, kv_lengths, self.s_q, self.s_k, 0, 0, offset
        else:
            starts_q, starts_k, self.s_q, self.s_k = packing
            self.b = starts_q.shape[0] - 1
            places = starts_q, starts_k, kv_lengths, self.s_q, self.s_k, q.shape[0], k.shape[0], 0
        # a bound beyond every distance is none; the kernels add it to positions in 32 bits
        farthest = self.s_q + self.s_k + abs(offset)
        left, right = (-1 if bound > farthest else bound for bound in (left, right))
        self.by_distance = bias is not None and bias.shape[3] not in (1, self.s_k)
        dropout = seed, dropout_threshold(dropout_p), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        self.capped = softcap > 0
        self.arguments = (
            q, k, v, None if mask is None else mask.view(torch.uint8), bias, alibi_slopes,
            heads(q), heads(k), heads(v), axes(mask), axes(bias),
            0 if alibi_slopes is None or alibi_slopes.dim() == 1 else self.h,
            scale, softcap, dropout, places, (left, right), (self.h, self.h // max(self.h_kv, 1)),
        )  # fmt: skip
        self.constants = {
            "D": self.d,
            "D_V": self.d_v,
            "BLOCK_D": max(16, _triton.next_power_of_2(self.d)),
            "BLOCK_DV": max(16, _triton.next_power_of_2(self.d_v)),
            "MASK_AXES": score_axes(mask),
            "BIAS_AXES": 4 if self.by_distance else score_axes(bias),
            "SOFTCAP": self.capped,
            "LEFT": left >= 0,
            "RIGHT": right >= 0,
            "PRECISION": cuda_float32(),
        }

    def tile(self, kernel: str, longest: int) -> dict[str, int]:
        kind = "sm_90" if _triton.capability(self.q.device) >= 90 else "sm_80"
        if self.q.dtype == torch.float32:
            kind = self.constants["PRECISION"]
        return tile(kernel, max(self.d, self.d_v), kind, longest, self.crowded(kernel, kind))

    def crowded(self, kernel: str, kind: str) -> bool:
        """Whether a kernel needs many registers beside those of its tiles: what ptxas spills says so."""
        added = [self.capped, *(x is not None for x in (self.mask, self.bias, self.slopes, self.seed))]
        if kernel == "bwd_kv" and (self.h != self.h_kv or self.packing is not None and kind == "sm_80"):
            return True  # a loop around the loops
        if kernel == "fwd" and (self.d, self.d_v) != (self.constants["BLOCK_D"], self.constants["BLOCK_DV"]):
            return True  # columns that do not exist
        if kind != "sm_90" or kernel == "fwd" and max(self.d, self.d_v) > 64:
            return any(added)
        return sum(added) > 1 or self.seed is not None or self.bias is not None

    def rows(self) -> Tensor:
        """One float32 for each query and head, uninitialised: (b, h, s_q), or (h, t_q) when packed."""
        shape = (self.b, self.h, self.s_q) if self.packing is None else (self.h, self.q.shape[0])
        return self.q.new_empty(shape, dtype=torch.float32)

    def sums(self, s: int) -> Tensor:
        """(b, h, s) float32, zeros."""
        return torch.zeros(self.b, self.h, s, dtype=torch.float32, device=self.q.device)

    def launch(self, kernel, programs: int, *arguments, **constants) -> None:
        _triton.launch(kernel, (programs,), *arguments, *self.arguments, **self.constants, **constants)

    def launch_tiles(self, kernel, axis: str, longest: int, heads: int, *arguments) -> None:
        """A program for each tile of `longest` queries or keys, head and sequence; axis: BLOCK_M or BLOCK_N."""
        name = kernel.fn.__name__

        def launch(options: dict[str, int]) -> None:
            programs = _triton.ceil_div(longest, options[axis]) * heads * self.b
            self.launch(kernel, programs, *arguments, **options)

        options = self.tile(name, longest)
        if _triton_autotune.enabled and self.q.is_cuda and longest * heads * self.b:
            size = _triton.next_power_of_2(longest)
            given = (x is not None for x in (self.mask, self.bias, self.slopes, self.seed, self.packing))
            key = (name, self.q.dtype, size, self.h // self.h_kv, *given, *self.constants.values())
            options = _triton_autotune.best(key, self.q.device, options, launch)
        launch(options)


def dropout_threshold(dropout_p: float) -> int:
    return min(int(dropout_p * 2.0**32), 0xFFFFFFFF)


def dense(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous, which is all that the kernels ask for, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def heads(x: Tensor) -> tuple[int, int, int]:
    """The strides of (b, s, h, d) but for the last, of (s, h, d) with 0 for a batch."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


def heads_of_rows(x: Tensor) -> tuple[int, int]:
    """The strides of (b, h, s_q) but for the last, of (h, t_q) with 0 for a batch."""
    return (0, x.stride(0)) if x.dim() == 2 else x.stride()[:2]


def axes(x: Tensor | None) -> tuple[int, ...] | None:
    """The strides of what broadcasts to (b, h, s_q, s_k), 0 where it does."""
    return None if x is None else tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))


def score_axes(x: Tensor | None) -> int:
    return 0 if x is None else (x.shape[2] != 1) + 2 * (x.shape[3] != 1)


def run_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """out in q's layout and lse: (b, h, s_q), or (h, t_q) when packed."""
    from . import triton_kernels as kernels

    p = problem
    out, lse = p.q.new_empty(*p.q.shape[:-1], p.d_v), p.rows()
    if p.packing is not None:  # tokens may belong to no sequence
        out.zero_()
        lse.fill_(float("-inf"))
    p.launch_tiles(kernels.fwd, "BLOCK_M", p.s_q, p.h, out, lse, p.sink, heads(out), heads_of_rows(lse))
    return out, lse


def run_backward(
    p: Problem, dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor,
    need_dbias: bool, need_dslopes: bool, need_dsink: bool, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dbias, dslopes, dsink; the last three are empty where not needed.

    One kernel for dq and one for dk and dv, each of which computes the scores anew: no sum goes through memory that
    others write to, so that the gradients are always deterministic.
    """
    from . import triton_kernels as kernels

    dout = torch.zeros_like(out) if dout is None else dense(dout)
    out, lse = dense(out), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    make = torch.empty if p.packing is None else torch.zeros  # tokens may belong to no sequence
    dq, dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (p.q, p.k, p.v))

    delta, sink_rows = torch.empty_like(lse), torch.empty_like(lse) if need_dsink else None
    options = {"BLOCK_M": 32, "num_warps": 4}
    s = lse.shape[-1]
    _triton.launch(
        kernels.bwd_delta, (_triton.ceil_div(s, options["BLOCK_M"]) * (lse.numel() // max(s, 1)),),
        delta, sink_rows, out, dout, lse, dlse, p.sink, heads(out), heads(dout), heads_of_rows(lse), p.h, s,
        D_V=p.d_v, BLOCK_DV=p.constants["BLOCK_DV"], **options,
    )  # fmt: skip
    given = dout, lse, delta
    strides = heads(dout), heads_of_rows(lse)

    # the sums over keys or queries that the gradients of a bias without one of these axes, and of slopes, are made of
    bias_axes = p.constants["BIAS_AXES"]
    row_sums = p.sums(p.s_q) if need_dbias and bias_axes < 2 else None
    key_sums = p.sums(p.s_k) if need_dbias and bias_axes == 2 else None
    slope_sums = p.sums(p.s_q) if need_dslopes else None
    p.launch_tiles(
        kernels.bwd_q, "BLOCK_M", p.s_q, p.h, dq, row_sums, slope_sums, *given, heads(dq), *strides
    )  # fmt: skip
    p.launch_tiles(
        kernels.bwd_kv, "BLOCK_N", p.s_k, p.h_kv, dk, dv, key_sums, *given, heads(dk), heads(dv), *strides
    )  # fmt: skip

    dbias = dslopes = dsink = p.q.new_empty(0)
    if need_dbias and p.by_distance:
        dbias = distance_gradient(p, given, strides)
    elif need_dbias and bias_axes == 3:
        dbias = score_gradient(p, given, strides)
    elif need_dbias:
        sums = row_sums[..., None] if key_sums is None else key_sums[..., None, :]  # (b, h, s_q or 1, 1 or s_k)
        dbias = sums.sum_to_size(p.bias.shape).to(p.bias.dtype)
    if need_dslopes:
        dslopes = slope_sums.sum(2).sum_to_size(p.slopes.shape).to(p.slopes.dtype)
    if need_dsink:
        head = lse.dim() - 2
        dsink = sink_rows.sum([axis for axis in range(lse.dim()) if axis != head]).to(p.sink.dtype)
    return dq.neg_() if p.flipped else dq, dk, dv, dbias, dslopes, dsink


def score_gradient(p: Problem, given: tuple, strides: tuple) -> Tensor:
    """The gradient of a bias that has the axes q and k."""
    from . import triton_kernels as kernels

    dbias = torch.empty(p.bias.shape, dtype=p.bias.dtype, device=p.bias.device)
    sum_b, sum_h = (n == 1 and size != 1 for n, size in zip(p.bias.shape[:2], (p.b, p.h)))
    options = p.tile("bwd_bias", p.s_q)
    tiles = _triton.ceil_div(p.s_q, options["BLOCK_M"]) * _triton.ceil_div(p.s_k, options["BLOCK_N"])
    p.launch(
        kernels.bwd_bias, tiles * p.bias.shape[0] * p.bias.shape[1], dbias, axes(dbias), p.b, *given, *strides,
        SUM_B=sum_b, SUM_H=sum_h, **options,
    )  # fmt: skip
    return dbias


def distance_gradient(p: Problem, given: tuple, strides: tuple) -> Tensor:
    """The gradient of a bias by distance, (1, h, 1, s_q + s_k)."""
    from . import triton_kernels as kernels

    options = p.tile("bwd_bias", p.s_q)
    distances, block = p.s_q + p.s_k, options["BLOCK_M"]
    options["BLOCK_N"] = block
    strips = _triton.ceil_div(distances, block) + 1
    sums = p.q.new_empty(p.b, p.h, strips, 2 * block, dtype=torch.float32)
    p.launch(kernels.bwd_distance, strips * p.h * p.b, sums, strips, *given, *strides, **options)
    first, second = sums.sum(0).split(block, -1)  # (h, strips, block)
    # a strip's second half belongs to the distances of the next one's first half
    by_distance = first[:, 1:] + second[:, :-1]
    return by_distance.flatten(1)[:, :distances].to(p.bias.dtype)[None, :, None].contiguous()


@_triton.op("attention_fwd")
def _fwd(q, k, v, *features):
    return run_forward(Problem(q, k, v, *features))


@_triton.op("attention_bwd")
def _bwd(dout, dlse, q, k, v, out, lse, *features_and_needs):
    features, needs = features_and_needs[:-4], features_and_needs[-4:]
    return run_backward(Problem(q, k, v, *features), dout, dlse, out, lse, *needs)


def forward(q: Tensor, k: Tensor, v: Tensor, *features) -> tuple[Tensor, Tensor]:
    """out (b, s_q, h, d_v) and lse (b, h, s_q); `features` in the order of the schema."""
    return _fwd(q, k, v, *features)


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
    return _bwd(dout, dlse, q, k, v, out, lse, *features_and_needs)
