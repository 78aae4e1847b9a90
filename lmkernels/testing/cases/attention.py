"""Shapes and features of attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .drawing import drawn_on_the_cpu

_FLOAT_OPTIONS = ("bias", "alibi_slopes", "sink")


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of `attention`, and the gradients that arrive at its two results."""

    q: Tensor  # (b, s_q, h, d)
    k: Tensor  # (b, s_k, h_kv, d)
    v: Tensor  # (b, s_k, h_kv, d_v)
    dout: Tensor  # (b, s_q, h, d_v)
    dlse: Tensor  # (b, h, s_q)
    options: dict  # keyword arguments of `attention`

    @property
    def rows(self) -> int:
        """Rows of the softmax: b * h * s_q."""
        return self.dlse.numel()

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same values in another dtype; dlse and float32 options of 16-bit inputs stay at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        options = dict(self.options)
        for name in _FLOAT_OPTIONS:
            if name in options:
                options[name] = options[name].to(dtype if options[name].dtype == self.q.dtype else wide)
        return AttentionInputs(*(x.to(dtype) for x in (self.q, self.k, self.v, self.dout)), self.dlse.to(wide), options)

    def differentiable(self) -> dict[str, Tensor]:
        """Every input that has a gradient, by name."""
        named = {"q": self.q, "k": self.k, "v": self.v}
        return named | {name: self.options[name] for name in _FLOAT_OPTIONS if name in self.options}

    def first_heads(self) -> AttentionInputs:
        """The first sequence and the query heads that read key head 0: attention of a slice is a slice of attention.

        For checks of large cases without options that have a batch or head axis.
        """
        group = self.q.shape[2] // self.k.shape[2]
        return AttentionInputs(
            self.q[:1, :, :group],
            self.k[:1, :, :1],
            self.v[:1, :, :1],
            self.dout[:1, :, :group],
            self.dlse[:1, :group],
            self.options,
        )


@dataclass(frozen=True)
class AttentionCase:
    name: str
    b: int
    h: int
    s_q: int
    s_k: int
    d: int
    h_kv: int | None = None  # default h
    d_v: int | None = None  # default d
    layout: str = "bshd"  # bshd, bhsd, fused (b, s, 3, h, d) or padded: a view into a larger tensor
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    mask: str | None = None  # the axes of b, h, q, k that it has; "" has none
    bias: str | None = None  # the same
    bias_hides: bool = False  # some entries of bias are -inf, whole rows among them
    alibi: str | None = None  # "h" or "bh"
    sink: bool = False
    float32_options: bool = False  # bias, slopes and sink in float32 beside 16-bit q
    kv_lengths: tuple[int, ...] = ()  # one per sequence
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return self.name

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype, seed: int = 0) -> AttentionInputs:
        """Standard normal q, k, v, dout and dlse, and the options that the case names."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        q, k, v = self._qkv(normal)
        options_dtype = torch.promote_types(dtype, torch.float32) if self.float32_options else dtype
        options = {"causal": self.causal, "window": self.window, "scale": self.scale, "softcap": self.softcap}
        if self.mask is not None:
            mask = torch.rand(self._broadcast(self.mask), generator=generator) < 0.7
            if "q" in self.mask:
                mask[..., self.s_q // 2 : self.s_q // 2 + 1, :] = False
            options["mask"] = mask
        if self.bias is not None:
            bias = torch.randn(self._broadcast(self.bias), generator=generator)
            if self.bias_hides:
                bias[torch.rand(bias.shape, generator=generator) < 0.1] = float("-inf")
                if "q" in self.bias:
                    bias[..., :1, :] = float("-inf")
            options["bias"] = bias.to(options_dtype)
        if self.alibi is not None:
            slopes = 2.0 ** -torch.linspace(1, 8, self.h)  # (h,)
            if self.alibi == "bh":
                slopes = slopes * torch.randn(self.b, 1, generator=generator)  # (b, h)
            options["alibi_slopes"] = slopes.to(options_dtype)
        if self.sink:
            options["sink"] = torch.randn(self.h, generator=generator).to(options_dtype)
        if self.kv_lengths:
            options["kv_lengths"] = torch.tensor(self.kv_lengths, dtype=torch.int32)
        if self.dropout_p > 0:
            options |= {"dropout_p": self.dropout_p, "seed": 0x1234_5678_9ABC_DEF0 + seed}
        dout = normal(*q.shape[:3], v.shape[3])
        dlse = torch.randn(self.b, self.h, self.s_q, generator=generator)
        return AttentionInputs(q, k, v, dout, dlse.to(torch.promote_types(dtype, torch.float32)), options)

    def visible_pairs(self) -> int:
        """How many of the s_q * s_k scores of one head the triangle and the window leave; for counting FLOPs."""
        left, right = self.window[0], 0 if self.causal else self.window[1]
        diagonal = torch.arange(self.s_q) + self.s_k - self.s_q
        first = (diagonal - left).clamp(0, self.s_k) if left >= 0 else torch.zeros_like(diagonal)
        last = (diagonal + right + 1).clamp(0, self.s_k) if right >= 0 else torch.full_like(diagonal, self.s_k)
        return int((last - first).clamp(min=0).sum())

    def _broadcast(self, axes: str) -> tuple[int, ...]:
        """(b, h, s_q, s_k) with 1 for the axes that are not named, leading 1s dropped."""
        sizes = {"b": self.b, "h": self.h, "q": self.s_q, "k": self.s_k}
        first = min(("bhqk".index(axis) for axis in axes), default=4)
        return tuple(size if axis in axes else 1 for axis, size in sizes.items())[first:]

    def _qkv(self, normal) -> tuple[Tensor, Tensor, Tensor]:
        h_kv, d_v = self.h_kv or self.h, self.d_v or self.d
        if self.layout == "fused":
            return normal(self.b, self.s_q, 3, self.h, self.d).unbind(2)
        shapes = ((self.s_q, self.h, self.d), (self.s_k, h_kv, self.d), (self.s_k, h_kv, d_v))
        if self.layout == "bhsd":
            return tuple(normal(self.b, h, s, d).transpose(1, 2) for s, h, d in shapes)
        if self.layout == "padded":
            return tuple(normal(self.b, s + 2, h + 1, d + 3)[:, 1:-1, 1:, 2:-1] for s, h, d in shapes)
        return tuple(normal(self.b, s, h, d) for s, h, d in shapes)


# Lengths lie on both sides of every tile edge, which sit at multiples of 8, 16, 32 and 64; 1 and 5 are smaller than a
# vector, 16 is exactly one, 63 and 257 one off a tile, 113 x 203 and 799 x 3 are odd on both axes.
_SHAPES = [
    AttentionCase("one query, one key and a sink", 2, 2, 1, 1, 64, sink=True),
    AttentionCase("five tokens", 2, 3, 5, 5, 40),
    AttentionCase("sixteen tokens, fused projection", 1, 12, 16, 16, 64, layout="fused"),
    AttentionCase("nine tokens, head size 37, values of 19", 2, 2, 9, 16, 37, d_v=19, layout="bhsd"),
    AttentionCase("sixteen tokens, two key heads for six", 2, 6, 16, 16, 64, h_kv=2, causal=True),
    AttentionCase(
        "sixteen tokens, window, sink, lengths",
        3,
        4,
        16,
        13,
        32,
        h_kv=2,
        window=(5, 2),
        sink=True,
        kv_lengths=(13, 0, 4),
    ),
    AttentionCase("a short sequence, window", 2, 2, 32, 50, 24, h_kv=1, window=(20, -1), causal=True),
    AttentionCase("one token short of a tile, (b, h, s, d)", 2, 2, 63, 63, 64, layout="bhsd"),
    AttentionCase("one token past a tile, padded", 1, 2, 257, 257, 32, layout="padded"),
    AttentionCase("odd lengths", 1, 2, 113, 203, 64),
    AttentionCase("many queries, three keys", 1, 2, 799, 3, 64),
    AttentionCase("three queries, many keys", 1, 2, 3, 799, 64),
    AttentionCase("one query, long cache", 2, 4, 1, 1025, 64, h_kv=2),
    AttentionCase("one query, one head, long cache", 1, 1, 1, 2100, 64),
    AttentionCase("one head", 1, 1, 300, 300, 64, causal=True),
    AttentionCase("head size 1", 2, 2, 33, 67, 1),
    AttentionCase("head size 8", 2, 2, 33, 67, 8, causal=True),
    AttentionCase("head size 80", 1, 2, 65, 70, 80),
    AttentionCase("head size 128", 1, 2, 130, 130, 128, causal=True),
    AttentionCase("head size 256", 1, 1, 70, 66, 256),
    AttentionCase("head size 37, values of 19", 2, 2, 70, 45, 37, d_v=19),
    AttentionCase("head size 40, values of 72", 1, 2, 70, 45, 40, d_v=72, layout="padded"),
    AttentionCase("one key head", 2, 4, 40, 50, 64, h_kv=1),
    AttentionCase("two key heads for six", 2, 6, 40, 50, 32, h_kv=2, layout="bhsd", causal=True),
]

_FEATURES = [
    AttentionCase("causal, fused", 2, 3, 96, 96, 64, layout="fused", causal=True),
    AttentionCase("causal, more keys", 1, 2, 70, 150, 64, causal=True),
    AttentionCase("causal, more queries: rows that see no key", 1, 2, 150, 70, 64, causal=True),
    AttentionCase("window", 1, 2, 150, 150, 32, window=(10, 3)),
    AttentionCase("window, causal, odd lengths", 1, 2, 113, 203, 64, window=(37, -1), causal=True),
    AttentionCase("window of one key", 1, 2, 80, 80, 16, window=(0, 0), sink=True),
    AttentionCase("window to the right", 1, 2, 90, 60, 16, window=(-1, 5)),
    AttentionCase("scale", 1, 2, 40, 40, 64, scale=0.5),
    AttentionCase("negative scale", 1, 2, 40, 40, 64, scale=-0.1),
    AttentionCase("zero scale", 1, 2, 20, 40, 64, scale=0.0),
    AttentionCase("softcap", 1, 2, 70, 70, 64, softcap=2.0, scale=0.3),
    AttentionCase("mask per key", 2, 2, 60, 70, 64, mask="k"),
    AttentionCase("mask per sequence and key", 3, 2, 60, 70, 64, mask="bk"),
    AttentionCase("mask per query and key", 2, 2, 60, 70, 64, mask="qk"),
    AttentionCase("mask per query", 2, 2, 60, 70, 64, mask="q"),
    AttentionCase("mask of every axis", 2, 2, 60, 70, 64, mask="bhqk"),
    AttentionCase("mask of one element", 1, 2, 20, 20, 64, mask=""),
    AttentionCase("bias of every axis", 2, 3, 60, 70, 64, bias="bhqk"),
    AttentionCase("bias of every axis that hides", 2, 3, 60, 70, 64, bias="bhqk", bias_hides=True),
    AttentionCase("bias per head", 2, 3, 60, 70, 64, bias="hqk"),
    AttentionCase("bias per sequence", 2, 3, 60, 70, 64, bias="bqk"),
    AttentionCase("bias per query and key", 2, 3, 60, 70, 64, bias="qk", bias_hides=True),
    AttentionCase("bias per key", 2, 3, 60, 70, 64, bias="k"),
    AttentionCase("bias per sequence and key", 2, 3, 60, 70, 64, bias="bk", bias_hides=True),
    AttentionCase("bias per head and key", 2, 3, 60, 70, 64, bias="hk"),
    AttentionCase("bias per query", 2, 3, 60, 70, 64, bias="q"),
    AttentionCase("bias per sequence and head", 2, 3, 60, 70, 64, bias="bh"),
    AttentionCase("bias of one element", 2, 3, 20, 20, 64, bias=""),
    AttentionCase("bias in float32", 2, 3, 60, 70, 64, bias="hqk", float32_options=True),
    AttentionCase("alibi", 2, 4, 70, 80, 64, alibi="h"),
    AttentionCase("alibi per sequence, causal", 2, 4, 70, 80, 64, alibi="bh", causal=True),
    AttentionCase("sink", 2, 4, 60, 70, 64, sink=True),
    AttentionCase("sink, causal, rows that see no key", 1, 4, 70, 40, 64, sink=True, causal=True, h_kv=2),
    AttentionCase("lengths, one of them 0", 4, 2, 60, 70, 64, kv_lengths=(0, 1, 33, 70)),
    AttentionCase("lengths, one query", 3, 4, 1, 600, 64, h_kv=2, kv_lengths=(600, 0, 77)),
    AttentionCase("lengths, causal", 3, 2, 50, 50, 64, kv_lengths=(50, 7, 0), causal=True),
    AttentionCase("dropout", 2, 2, 60, 70, 64, dropout_p=0.2),
    AttentionCase("dropout, causal, odd lengths", 1, 3, 113, 203, 64, dropout_p=0.5, causal=True),
    AttentionCase("everything is dropped", 1, 2, 20, 20, 16, dropout_p=1.0),
    AttentionCase(
        "everything at once",
        b=3,
        h=4,
        s_q=70,
        s_k=90,
        d=48,
        h_kv=2,
        d_v=40,
        layout="padded",
        causal=True,
        window=(50, -1),
        scale=0.2,
        softcap=5.0,
        mask="bqk",
        bias="hqk",
        bias_hides=True,
        alibi="bh",
        sink=True,
        kv_lengths=(90, 33, 0),
        dropout_p=0.1,
    ),
    AttentionCase(
        "everything at once, float32 options",
        b=2,
        h=4,
        s_q=65,
        s_k=65,
        d=64,
        h_kv=1,
        layout="bhsd",
        window=(20, 40),
        softcap=8.0,
        mask="k",
        bias="bhk",
        alibi="h",
        sink=True,
        float32_options=True,
        kv_lengths=(65, 64),
    ),
    AttentionCase(
        "bias, alibi, dropout, one query",
        b=2,
        h=4,
        s_q=1,
        s_k=300,
        d=64,
        h_kv=2,
        bias="bhqk",
        alibi="h",
        sink=True,
        kv_lengths=(300, 10),
        dropout_p=0.1,
    ),
]

ATTENTION = _SHAPES + _FEATURES


def _square(s: int, h: int, d: int) -> list[AttentionCase]:
    full = AttentionCase(f"s{s}-h{h}-d{d}-full", 1, h, s, s, d)
    return [full, replace(full, name=f"s{s}-h{h}-d{d}-causal", causal=True)]


# What a model runs: the model width is 768 throughout (h 12, d 64 and h 6, d 128).
ATTENTION_BENCHMARKS = {
    "long": [case for s in (512, 1024, 2048) for h, d in ((12, 64), (6, 128)) for case in _square(s, h, d)],
    "short": [
        *_square(16, 12, 64),
        AttentionCase("b8-s128-h12-d64-full", 8, 12, 128, 128, 64),
        AttentionCase("b8-s128-h12-d64-fused-causal", 8, 12, 128, 128, 64, layout="fused", causal=True),
    ],
    "grouped": [AttentionCase("s1024-h12-kv4-d64-causal", 1, 12, 1024, 1024, 64, h_kv=4, causal=True)],
    "decode": [
        AttentionCase("b1-s1x4096-h12-d64", 1, 12, 1, 4096, 64),
        AttentionCase("b8-s1x4096-h12-kv4-d64", 8, 12, 1, 4096, 64, h_kv=4),
    ],
}


# --- attention_varlen ---
