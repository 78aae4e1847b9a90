"""The one list of shapes and feature sets that tests and benchmarks run through."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor

from ..ops.decode_step import StepLayer, StepModel
from ..ops.quantize_weight import QuantizedWeight, quantize_weight
from ..ops.rotary import rotary_tables


def drawn_on_the_cpu(make: Callable) -> Callable:
    """What it makes lies on torch's default device; drawn on the CPU, the values are the same for every device."""

    @functools.wraps(make)
    def made(*arguments, **options):
        device = torch.get_default_device()
        with torch.device("cpu"):
            return moved(make(*arguments, **options), device)

    return made


def moved(x, device: torch.device):
    """x, or the tensors in its tuples, lists, dicts and dataclasses, on `device`; their strides stay, gaps and all."""
    if isinstance(x, Tensor):
        if x.device == device:
            return x
        memory = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
        return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())
    if isinstance(x, dict):
        return {name: moved(value, device) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(moved(value, device) for value in x)
    if is_dataclass(x):
        return replace(x, **{field.name: moved(getattr(x, field.name), device) for field in fields(x)})
    return x


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


@dataclass(frozen=True)
class AttentionVarlenCase:
    """Sequences of these lengths, the first tokens of each entry of a padded batch; its options are theirs too."""

    padded: AttentionCase
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]

    def __str__(self) -> str:
        return self.padded.name

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype, seed: int = 0) -> AttentionInputs:
        """q (t_q, h, d), dout (t_q, h, d_v), dlse (h, t_q), and k and v (t_k, ...); cu_seqlens are options."""
        padded = self.padded.make(dtype, seed)
        q, dout, dlse = (pack(x, self.lengths_q) for x in (padded.q, padded.dout, padded.dlse.transpose(1, 2)))
        k, v = (pack(x, self.lengths_k) for x in (padded.k, padded.v))
        lengths = {
            "cu_seqlens_q": cu_seqlens(self.lengths_q),
            "cu_seqlens_k": cu_seqlens(self.lengths_k),
            "max_seqlen_q": self.padded.s_q,
            "max_seqlen_k": self.padded.s_k,
        }
        return AttentionInputs(q, k, v, dout, dlse.T.contiguous(), lengths | padded.options)

    def visible_pairs(self) -> int:
        """As AttentionCase's, of all sequences together."""
        lengths = zip(self.lengths_q, self.lengths_k, strict=True)
        return sum(replace(self.padded, s_q=s_q, s_k=s_k).visible_pairs() for s_q, s_k in lengths)


def pack(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The first tokens of each sequence of (b, s, ...), end to end: (t, ...)."""
    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])


def cu_seqlens(lengths: tuple[int, ...]) -> Tensor:
    """(b + 1,) int32: 0 and the ends of the sequences."""
    return torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)


def _varlen(
    name: str, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...] | None = None, h: int = 2, d: int = 64, **options
) -> AttentionVarlenCase:
    """lengths_k: lengths_q where not given."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    padded = AttentionCase(name, len(lengths_q), h, max(lengths_q), max(lengths_k), d, **options)
    return AttentionVarlenCase(padded, lengths_q, lengths_k)


_RAGGED_Q, _RAGGED_K = (5, 0, 70, 33, 1, 64, 9), (9, 30, 90, 33, 200, 0, 4)

# Among the lengths are 0 and 1 on either side, more queries than keys, few queries on many keys (the split path), and
# both sides of the edges of blocks and vectors.
ATTENTION_VARLEN = [
    _varlen("one sequence", (77,)),
    _varlen("sixteen to seventeen tokens", (16, 17, 15, 16, 1)),
    _varlen("different lengths of keys", _RAGGED_Q, _RAGGED_K),
    _varlen("causal", (40, 7, 0, 113, 64), causal=True),
    _varlen("causal, different lengths of keys", _RAGGED_Q, _RAGGED_K, causal=True),
    _varlen("one query each, long caches", (1, 1, 1), (300, 1025, 7), h=4, h_kv=2),
    _varlen("more keys than one block", (300, 20, 270), (270, 600, 300), causal=True),
    _varlen("heads of 1", _RAGGED_Q, _RAGGED_K, d=1),
    _varlen("heads of 37, values of 19", _RAGGED_Q, _RAGGED_K, d=37, d_v=19),
    _varlen("heads of 40, values of 72", (50, 45), d=40, d_v=72, causal=True),
    _varlen("heads of 256", (30, 66), d=256),
    _varlen("two key heads for six", _RAGGED_Q, _RAGGED_K, h=6, h_kv=2, d=32, causal=True),
    _varlen("window", (90, 17, 60), (60, 40, 90), window=(10, 3), d=32),
    _varlen("softcap, negative scale", (40, 70), softcap=2.0, scale=-0.3),
    _varlen("mask per key", (60, 30), (70, 41), mask="k"),
    _varlen("mask per sequence and query", (60, 30), (70, 41), mask="bq"),
    _varlen("mask of every axis", _RAGGED_Q, _RAGGED_K, mask="bhqk"),
    _varlen("bias of every axis that hides", (60, 30, 8), (70, 41, 8), bias="bhqk", bias_hides=True),
    _varlen("bias per head", (60, 5, 130), (50, 300, 220), h=3, bias="hqk"),
    _varlen("bias per sequence and key", (60, 30, 0), (70, 41, 9), bias="bk"),
    _varlen("bias per query", (60, 30), (70, 41), bias="q"),
    _varlen("bias of one element", (20, 12), bias=""),
    _varlen("alibi, causal", _RAGGED_Q, _RAGGED_K, h=4, alibi="h", causal=True),
    _varlen("alibi per sequence", (70, 31), (80, 80), h=4, alibi="bh"),
    _varlen("sink, rows that see no key", _RAGGED_Q, _RAGGED_K, h=4, sink=True, causal=True),
    _varlen("lengths", (60, 30, 7, 20), (70, 41, 7, 30), kv_lengths=(33, 70, 0, 1)),
    _varlen("dropout", (60, 31, 1), (70, 41, 9), dropout_p=0.2),
    _varlen(
        "everything at once",
        (70, 0, 33, 2, 64),
        (90, 20, 45, 301, 30),
        h=4,
        d=48,
        h_kv=2,
        d_v=40,
        causal=True,
        window=(50, -1),
        scale=0.2,
        softcap=5.0,
        mask="bqk",
        bias="hqk",
        bias_hides=True,
        alibi="bh",
        sink=True,
        kv_lengths=(80, 20, 12, 300, 301),
        dropout_p=0.1,
    ),
    _varlen(
        "everything at once, float32 options",
        (65, 20, 5),
        h=4,
        h_kv=1,
        window=(20, 40),
        softcap=8.0,
        mask="k",
        bias="bhk",
        alibi="h",
        sink=True,
        float32_options=True,
        kv_lengths=(65, 19, 3),
    ),
]

# A batch of BERT with a mean length of 0.56 of the longest, and GPT's documents in one pass.
ATTENTION_VARLEN_BENCHMARKS = {
    "bert": [_varlen("b8-s16..128-h12-d64-full", tuple(range(16, 129, 16)), h=12)],
    "gpt": [_varlen("b6-s100..2048-h12-d64-causal", (100, 2048, 250, 1500, 400, 900), h=12, causal=True)],
}


@dataclass(frozen=True)
class RotaryCase:
    """Arguments of `rotary`."""

    name: str
    b: int | None  # None: packed, (t, h, d)
    s: int
    h: int
    d: int
    d_rot: int | None = None  # default d
    interleaved: bool = False
    positions: str | None = None  # the axes of b, s that they have
    wide_positions: bool = True  # int64
    tables: str = "n"  # n: a row for each position; 1s, bs: the rows of the tokens
    float32_tables: bool = True  # else in x's dtype
    layout: str = "bshd"  # bshd, bhsd, fused (b, s, 3, h, d), padded or strided: no axis is contiguous

    def __str__(self) -> str:
        return self.name

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], dict]:
        """The tensors x, cos and sin, and the other arguments."""
        generator = torch.Generator().manual_seed(seed)
        b, d_rot = self.b or 1, self.d if self.d_rot is None else self.d_rot
        x = _laid_out(self.layout, b, self.s, self.h, self.d, generator)
        rows = {"n": (self.s + 5,), "1s": (1, self.s), "bs": (b, self.s)}[self.tables]
        angles = torch.rand(*rows, d_rot // 2, generator=generator) * 100
        table_dtype = torch.promote_types(dtype, torch.float32) if self.float32_tables else dtype
        options = {"interleaved": self.interleaved}
        if self.positions is not None:
            shape = tuple(b if axis == "b" else self.s for axis in self.positions)
            positions = torch.randint(self.s + 5, shape, generator=generator)
            options["positions"] = positions.to(torch.int64 if self.wide_positions else torch.int32)
        x = (x if self.b else x[0]).to(dtype)
        tensors = {"x": x, "cos": angles.cos().to(table_dtype), "sin": angles.sin().to(table_dtype)}
        return tensors, options


def _laid_out(layout: str, b: int, s: int, h: int, d: int, generator: torch.Generator) -> Tensor:
    """(b, s, h, d), standard normal, as a view of a larger or transposed tensor."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if layout == "bhsd":
        return normal(b, h, s, d).transpose(1, 2)
    if layout == "fused":
        return normal(b, s, 3, h, d)[:, :, 1]
    if layout == "padded":
        return normal(b, s + 2, h + 1, d + 3)[:, 1:-1, 1:, 2:-1]
    if layout == "strided":
        return normal(b, s, h, 2 * d)[..., ::2]
    return normal(b, s, h, d)


# Half of d_rot is 1 to 64: less than a vector of any instruction set, some whole ones, and some with a rest.
ROTARY = [
    RotaryCase("GPT-2 size", 2, 33, 12, 64),
    RotaryCase("GPT-2 size, interleaved", 2, 33, 12, 64, interleaved=True),
    RotaryCase("fused projection", 2, 20, 4, 64, layout="fused"),
    RotaryCase("(b, h, s, d), head size 128, interleaved", 1, 50, 3, 128, interleaved=True, layout="bhsd"),
    RotaryCase("padded, head size 80", 2, 17, 3, 80, layout="padded"),
    RotaryCase("padded, head size 80, interleaved", 2, 17, 3, 80, layout="padded", interleaved=True),
    RotaryCase("no contiguous axis", 2, 9, 2, 48, layout="strided"),
    RotaryCase("a quarter of the head (Pythia)", 2, 31, 4, 64, d_rot=16),
    RotaryCase("half of an odd head", 1, 7, 3, 37, d_rot=18),
    RotaryCase("a part of the head, interleaved (GPT-J)", 1, 31, 2, 256, d_rot=64, interleaved=True),
    RotaryCase("two columns of five", 3, 4, 2, 5, d_rot=2),
    RotaryCase("two columns of five, interleaved", 3, 4, 2, 5, d_rot=2, interleaved=True),
    RotaryCase("no column", 1, 4, 2, 8, d_rot=0),
    RotaryCase("one token, one head", 1, 1, 1, 64),
    RotaryCase("positions of the sequence", 3, 20, 2, 32, positions="s"),
    RotaryCase("positions of each token", 3, 20, 2, 32, positions="bs", interleaved=True),
    RotaryCase("int32 positions", 3, 20, 2, 32, positions="bs", wide_positions=False),
    RotaryCase("packed", None, 50, 4, 64),
    RotaryCase("packed, positions", None, 50, 4, 64, positions="s", interleaved=True),
    RotaryCase("rows of the tokens, one sequence", 3, 20, 2, 64, tables="1s"),
    RotaryCase("rows of the tokens", 3, 20, 2, 64, tables="bs", interleaved=True),
    RotaryCase("tables in x's dtype", 2, 20, 2, 64, float32_tables=False),
    RotaryCase("several tasks of tokens", 4, 150, 12, 64, positions="bs"),
]

# q of GPT-2, of Llama-like sizes with few key heads, and of one token
ROTARY_BENCHMARKS = {
    "out of cache": [
        RotaryCase("b8-s1024-h12-d64", 8, 1024, 12, 64),
        RotaryCase("b8-s1024-h12-d64-interleaved", 8, 1024, 12, 64, interleaved=True),
        RotaryCase("b4-s1024-h16-d128-fused", 4, 1024, 16, 128, layout="fused"),
    ],
    "in cache": [
        RotaryCase("b1-s256-h12-d64", 1, 256, 12, 64),
        RotaryCase("b1-s128-h12-d64-interleaved", 1, 128, 12, 64, interleaved=True),
    ],
    "one token": [RotaryCase("b1-s1-h12-d64", 1, 1, 12, 64)],
}


@dataclass(frozen=True)
class EmbedCase:
    """Arguments of `embed`, or, with its x in place of the token's row, of `add_positions`."""

    name: str
    b: int | None  # None: packed, (t,)
    s: int
    d: int
    vocab: int = 50
    positions: str | None = None  # the axes of b, s that they have; "" stands for 0, 1, 2, ...
    types: str | None = None  # the same; "" stands for type 0
    float32_tables: bool = False  # position and type table in float32 beside 16 bits
    wide_ids: bool = True  # int64
    repeated: float = 0.0  # this share of the tokens is one and the same
    layout: str = "dense"  # dense, or strided: no axis of a table or of x is contiguous

    def __str__(self) -> str:
        return self.name

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], list[str]]:
        """The arguments of `embed`, and the names of its tables."""
        generator = torch.Generator().manual_seed(seed)
        ids_dtype = torch.int64 if self.wide_ids else torch.int32
        tokens = (self.b, self.s) if self.b is not None else (self.s,)

        def ids(axes: str, size: int) -> Tensor:
            shape = tokens if "b" in axes else (self.s,)
            return torch.randint(size, shape, generator=generator).to(ids_dtype)

        token_ids = ids("bs", self.vocab)
        token_ids[torch.rand(tokens, generator=generator) < self.repeated] = self.vocab // 2
        inputs = {"token_ids": token_ids, "token_table": self._table(self.vocab, dtype, generator)}
        beside = torch.promote_types(dtype, torch.float32) if self.float32_tables else dtype
        if self.positions is not None:
            inputs["position_table"] = self._table(self.s + 3, beside, generator)
            if self.positions:
                inputs["positions"] = ids(self.positions, self.s + 3)
        if self.types is not None:
            inputs["type_table"] = self._table(3, beside, generator)
            if self.types:
                inputs["type_ids"] = ids(self.types, 3)
        return inputs, [name for name in inputs if name.endswith("_table")]

    @drawn_on_the_cpu
    def make_added(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """The tensors of `add_positions`."""
        inputs, _ = replace(self, positions=self.positions or "", types=None).make(dtype, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        tokens = tuple(inputs["token_ids"].shape)
        x = torch.randn(*tokens, 2 * self.d, generator=generator)
        x = x[..., ::2] if self.layout == "strided" else x[..., : self.d]
        added = {"x": x.to(dtype), "table": inputs["position_table"]}
        return added | ({"positions": inputs["positions"]} if "positions" in inputs else {})

    def _table(self, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        if self.layout == "strided":
            return torch.randn(2 * self.d, n, generator=generator).to(dtype).t()[:, ::2]
        return torch.randn(n, self.d, generator=generator).to(dtype)


# d lies below, at and beyond a vector and a block of columns; more tokens than a task and than a group's look-ahead
EMBED = [
    EmbedCase("tokens alone", 2, 33, 64),
    EmbedCase("GPT-2", 2, 40, 768, positions=""),
    EmbedCase("BERT", 3, 30, 100, positions="", types="bs"),
    EmbedCase("BERT, positions of the sequence", 3, 30, 256, positions="s", types="s"),
    EmbedCase("positions of each token", 3, 30, 33, positions="bs"),
    EmbedCase("type 0 for all", 2, 7, 31, types=""),
    EmbedCase("int32 indices", 2, 30, 48, positions="bs", types="bs", wide_ids=False),
    EmbedCase("packed", None, 70, 96, positions="s", types="s"),
    EmbedCase("packed, positions 0, 1, 2, ...", None, 70, 7, positions=""),
    EmbedCase("float32 tables beside", 2, 30, 300, positions="", types="bs", float32_tables=True),
    EmbedCase("no contiguous axis", 2, 20, 40, positions="bs", types="bs", layout="strided"),
    EmbedCase("one column", 2, 20, 1, positions=""),
    EmbedCase("one token", 1, 1, 768, positions="", types="bs"),
    EmbedCase("one row of each table", 2, 30, 24, vocab=1, positions="s"),
    EmbedCase("one token in many places", 4, 200, 136, vocab=300, positions="", repeated=0.7),
]

EMBED_BENCHMARKS = {
    "GPT-2": [
        EmbedCase("b1-s1024-d768", 1, 1024, 768, vocab=50257, positions=""),
        EmbedCase("b4-s1024-d768-half-repeated", 4, 1024, 768, vocab=50257, positions="", repeated=0.5),
    ],
    "BERT": [EmbedCase("b32-s128-d768", 32, 128, 768, vocab=30522, positions="", types="bs")],
    "one token": [EmbedCase("b1-s1-d768", 1, 1, 768, vocab=50257, positions="")],
}

ADD_POSITIONS_BENCHMARKS = {
    "out of cache": [EmbedCase("b8-s1024-d768", 8, 1024, 768, positions="")],
    "in cache": [EmbedCase("b1-s256-d768", 1, 256, 768, positions="")],
}


@dataclass(frozen=True)
class LinearCase:
    """A linear layer: its inputs by name, with entries of the size that a trained layer has."""

    name: str
    lead: tuple[int, ...]  # leading axes of x
    d_in: int
    d_out: int
    layout: str = "rows"  # of the weight: "rows", "columns" (transposed), "padded" or "strided" (neither axis dense)
    bias: bool = True

    def __str__(self) -> str:
        return self.name

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        weight = normal(self.d_out, self.d_in) / max(1, self.d_in) ** 0.5
        if self.layout == "columns":
            weight = weight.t().contiguous().t()
        elif self.layout == "padded":
            weight = torch.cat([weight, weight], 1)[:, : self.d_in]
        elif self.layout == "strided":
            weight = weight.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
        inputs = {"x": normal(*self.lead, self.d_in), "weight": weight}
        if self.bias:
            inputs["bias"] = normal(self.d_out)
        return inputs


LINEAR = [
    LinearCase("one row", (1,), 100, 300),
    LinearCase("few rows, odd widths", (13,), 33, 129),
    LinearCase("batches", (2, 3, 40), 64, 192),
    LinearCase("no bias", (96,), 80, 70, bias=False),
    LinearCase("transposed weight", (100,), 96, 130, layout="columns"),
    LinearCase("weight in a wider matrix", (31,), 50, 70, layout="padded"),
    LinearCase("weight without a dense axis", (31,), 50, 70, layout="strided"),
    LinearCase("several blocks of rows", (1200,), 40, 70),
    LinearCase("several blocks of the depth", (50,), 2000, 90),
    LinearCase("GPT-2's projection in", (64,), 768, 2304),
]

# (rows, d_in, d_out) of GPT-2 and BERT-base at b 4, s 256
LINEAR_BENCHMARKS = [
    LinearCase("qkv 1024x768x2304", (1024,), 768, 2304),
    LinearCase("output 1024x768x768", (1024,), 768, 768),
    LinearCase("mlp in 1024x768x3072", (1024,), 768, 3072),
    LinearCase("mlp out 1024x3072x768", (1024,), 3072, 768),
]


@dataclass(frozen=True)
class QKVCase:
    """A projection to queries, keys and values: its inputs by name, and its options."""

    name: str
    b: int
    s: int
    d_model: int
    h: int
    h_kv: int
    d: int
    rotated: int = 0
    interleaved: bool = False
    positions: bool = False  # of every token, else 0 .. s - 1

    def __str__(self) -> str:
        return self.name

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict]:
        rows = (self.h + 2 * self.h_kv) * self.d
        inputs = LinearCase(self.name, (self.b, self.s), self.d_model, rows).make(dtype)
        options = {"num_heads": self.h, "num_kv_heads": self.h_kv, "interleaved": self.interleaved}
        if self.rotated:
            length = self.s + 20
            angle = torch.arange(length)[:, None] * 10000 ** -torch.linspace(0, 1, self.rotated // 2)
            options |= {"cos": angle.cos(), "sin": angle.sin()}
        if self.positions:
            generator = torch.Generator().manual_seed(0)
            options["positions"] = torch.randint(length, (self.b, self.s), generator=generator)
        return inputs, options


QKV = [
    QKVCase("GPT-2's heads", 2, 40, 96, 3, 3, 32),
    QKVCase("two key heads for six", 1, 33, 50, 6, 2, 20),
    QKVCase("rotated halves", 2, 37, 64, 4, 2, 64, rotated=64),
    QKVCase("rotated neighbours", 2, 37, 64, 2, 2, 128, rotated=128, interleaved=True),
    QKVCase("part of a head, odd sizes", 3, 19, 33, 4, 1, 10, rotated=6),
    QKVCase("positions of every token", 2, 37, 48, 4, 4, 40, rotated=40, positions=True),
]


@dataclass(frozen=True)
class NormCase:
    """Arguments of `layer_norm` and `rms_norm`."""

    name: str
    shape: tuple[int, ...]
    residual: str | None = None  # "same": in x's dtype; "float32": in float32 beside 16-bit x
    weight: bool = True
    bias: bool = True  # of layer norm
    float32_parameters: bool = False  # beside 16-bit x
    layout: str = "contiguous"  # rows: a stride leads from row to row; strides: no single one does; columns: last axis
    mean: float = 0.0  # of x

    def __str__(self) -> str:
        return self.name

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """x, and where the case has them residual, weight and bias; normal, the weight about 1."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = dtype, mean: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator) + mean).to(dtype)

        def rows(dtype: torch.dtype, mean: float = 0.0) -> Tensor:
            *lead, d = self.shape
            if self.layout == "rows":
                return normal(*lead, d + 5, dtype=dtype, mean=mean)[..., 3 : d + 3]
            if self.layout == "strides":
                return normal(*reversed(lead), d, dtype=dtype, mean=mean).permute(
                    *reversed(range(len(lead))), len(lead)
                )
            if self.layout == "columns":
                return normal(d, *lead, dtype=dtype, mean=mean).movedim(0, -1)
            return normal(*self.shape, dtype=dtype, mean=mean)

        wide = torch.promote_types(dtype, torch.float32)
        parameters = wide if self.float32_parameters else dtype
        inputs = {"x": rows(dtype, self.mean)}
        if self.residual is not None:
            inputs["residual"] = rows(wide if self.residual == "float32" else dtype)
        if self.weight:
            inputs["weight"] = normal(self.shape[-1], dtype=parameters, mean=1.0)
        if self.bias:
            inputs["bias"] = normal(self.shape[-1], dtype=parameters)
        return inputs


# Rows on both sides of a vector (4, 8, 16), of four of them (16, 32, 64) and of a block of sums (256 to
# 2048); numbers of rows
# on both sides of a group (8) and of a chunk of the backward (16, and 64 chunks at most).
NORM = [
    NormCase("one element", (60, 1)),
    NormCase("rows of 7", (40, 7)),
    NormCase("rows of 31", (4, 9, 31), residual="same"),
    NormCase("rows of 33", (33, 33)),
    NormCase("rows of 64, one axis", (64,)),
    NormCase("rows of 100", (5, 13, 100), residual="same"),
    NormCase("rows of 768", (2, 67, 768)),
    NormCase("rows of 768 and a residual", (2, 67, 768), residual="same"),
    NormCase("rows of 2049", (20, 2049), residual="same"),
    NormCase("rows of 50257", (3, 50257)),
    NormCase("many rows", (1100, 24), residual="same"),
    NormCase("no weight", (30, 96), weight=False),
    NormCase("no bias", (30, 96), bias=False, residual="same"),
    NormCase("neither", (30, 96), weight=False, bias=False, residual="same"),
    NormCase("float32 parameters", (30, 100), residual="same", float32_parameters=True),
    NormCase("float32 residual", (30, 100), residual="float32", float32_parameters=True),
    NormCase("rows with gaps", (3, 10, 50), residual="same", layout="rows"),
    NormCase("two strides", (3, 10, 50), residual="same", layout="strides"),
    NormCase("strided last axis", (3, 10, 50), residual="same", layout="columns"),
    NormCase("large mean", (40, 768), mean=1000.0),
]


# Beyond the caches, in the L3 cache, and a short prompt.
NORM_BENCHMARKS = {
    "memory": [NormCase("8192x768", (8192, 768)), NormCase("1920x4096", (1920, 4096))],
    "cache": [NormCase("1024x768", (1024, 768))],
    "short": [NormCase("64x768", (64, 768))],
}


@dataclass(frozen=True)
class DecodeCase:
    name: str
    lengths: tuple[int, ...]  # tokens in the cache before the call, one per sequence
    h: int
    d: int
    h_kv: int | None = None  # default h
    d_v: int | None = None  # default d
    s_q: int = 1
    s_new: int | None = None  # default s_q; 0 appends nothing
    room: int = 9  # tokens that the cache could still take
    layout: str = "bhsd"  # bhsd, bshd or padded: a view into a larger tensor
    page: int | None = None  # tokens per page
    rotary: int = 0  # columns that are rotated
    interleaved: bool = False
    scale: float | None = None
    softcap: float = 0.0
    window: tuple[int, int] = (-1, -1)
    alibi: bool = False
    sink: bool = False
    float32_options: bool = False  # tables, slopes and sink in float32 beside 16-bit q

    def __str__(self) -> str:
        return self.name

    @property
    def b(self) -> int:
        return len(self.lengths)

    @property
    def tokens_new(self) -> int:
        return self.s_q if self.s_new is None else self.s_new

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype, seed: int = 0) -> dict:
        """Arguments of `attention_decode`. Cache rows that hold no token are NaN."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        h_kv, d_v = self.h_kv or self.h, self.d_v or self.d
        capacity = max(self.lengths, default=0) + self.tokens_new + self.room
        outer, length = self.b, capacity
        arguments = {"q": normal(self.b, self.s_q, self.h, self.d)}
        if self.page:
            length, blocks = self.page, -(-capacity // self.page)
            outer = self.b * blocks + 2
            arguments["block_table"] = torch.randperm(outer, generator=generator)[: self.b * blocks].view(self.b, -1)
            arguments["block_table"] = arguments["block_table"].to(torch.int32)
        holds = torch.arange(capacity) < torch.tensor(self.lengths).reshape(-1, 1)  # (b, capacity)
        for name, width in (("k_cache", self.d), ("v_cache", d_v)):
            rows = normal(self.b, capacity, h_kv, width).masked_fill(~holds[..., None, None], torch.nan)
            cache = self._empty(outer, length, h_kv, width, dtype)
            if self.page:
                for j in range(capacity):
                    cache[arguments["block_table"][:, j // self.page].long(), j % self.page] = rows[:, j]
            else:
                cache.copy_(rows)
            arguments[name] = cache
        arguments["kv_lengths"] = torch.tensor(self.lengths, dtype=torch.int32)
        if self.tokens_new:
            arguments["k_new"] = normal(self.b, self.tokens_new, h_kv, self.d)
            arguments["v_new"] = normal(self.b, self.tokens_new, h_kv, d_v)
        option = torch.promote_types(dtype, torch.float32) if self.float32_options else dtype
        if self.rotary:
            angles = torch.arange(capacity)[:, None] * 0.7 ** torch.arange(self.rotary // 2)
            arguments |= {"cos": angles.cos().to(option), "sin": angles.sin().to(option)}
            arguments["interleaved"] = self.interleaved
        if self.alibi:
            arguments["alibi_slopes"] = (2.0 ** -torch.linspace(1, 8, self.h)).to(option)
        if self.sink:
            arguments["sink"] = torch.randn(self.h, generator=generator).to(option)
        return arguments | {"scale": self.scale, "softcap": self.softcap, "window": self.window}

    def _empty(self, outer: int, length: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
        """(outer, length, heads, width) of NaN in the layout of the case."""
        if self.layout == "bhsd":
            return torch.full((outer, heads, length, width), torch.nan, dtype=dtype).transpose(1, 2)
        if self.layout == "padded":
            shape = (outer + 2, length + 3, heads + 1, width + 5)
            return torch.full(shape, torch.nan, dtype=dtype)[1:-1, 2:-1, 1:, 3:-2]
        return torch.full((outer, length, heads, width), torch.nan, dtype=dtype)


# Scores are held for 64 keys at a time; shares of a sequence's keys are multiples of that, and rows (query heads of a
# key head times queries) come in chunks of 64: lengths and groups lie on both sides of these edges.
DECODE = [
    DecodeCase("first token", (0, 0), 4, 64),
    DecodeCase("one key in the cache", (1, 0, 2), 4, 64, s_new=0),
    DecodeCase("short", (30, 7, 63), 12, 64),
    DecodeCase("edges of a block", (62, 63, 64, 127), 2, 64, layout="bshd"),
    DecodeCase("several shares", (700, 1, 333), 8, 64, h_kv=8, layout="bshd"),
    DecodeCase("one key head", (300, 450), 6, 128, h_kv=1),
    DecodeCase("groups of three", (100, 200), 6, 80, h_kv=2, layout="padded"),
    DecodeCase("groups of four, d 128", (257, 64), 8, 128, h_kv=2),
    DecodeCase("groups of seven", (90,), 14, 32, h_kv=2),
    DecodeCase("head size 1", (40, 70), 2, 1),
    DecodeCase("head size 37, values of 19", (77, 130), 4, 37, d_v=19, h_kv=2),
    DecodeCase("head size 40, values of 72", (77, 130), 4, 40, d_v=72, h_kv=4, layout="padded"),
    DecodeCase("head size 256", (150,), 2, 256, h_kv=1),
    DecodeCase("two queries", (100, 0), 4, 64, h_kv=2, s_q=2),
    DecodeCase("five queries, two new tokens", (100, 70, 3), 4, 64, s_q=5, s_new=2),
    DecodeCase("eight queries", (130, 1), 8, 64, h_kv=2, s_q=8),
    DecodeCase("queries that precede the sequence", (1, 0), 2, 16, s_q=6, s_new=3),
    DecodeCase("more new tokens than queries", (20, 0), 4, 64, h_kv=2, s_q=1, s_new=150),
    DecodeCase("a prompt", (0, 5), 4, 64, h_kv=2, s_q=150),
    DecodeCase("pages of 16", (100, 37, 0), 4, 64, h_kv=2, page=16),
    DecodeCase("pages of 1", (20, 37), 4, 64, page=1, layout="bshd"),
    DecodeCase("pages of 5, padded", (64, 130), 4, 48, h_kv=2, page=5, layout="padded", s_q=3),
    DecodeCase("rotary", (50, 129), 4, 64, h_kv=2, rotary=64),
    DecodeCase("rotary, interleaved, partial", (50, 0), 4, 64, h_kv=2, rotary=20, interleaved=True),
    DecodeCase("rotary, partial, pages, prompt", (0, 40), 4, 80, rotary=32, page=16, s_q=40),
    DecodeCase("rotary of the queries alone", (50, 2), 4, 64, rotary=64, s_q=3, s_new=0),
    DecodeCase("scale", (50,), 4, 64, scale=0.5),
    DecodeCase("negative scale", (50, 70), 4, 64, scale=-0.1),
    DecodeCase("softcap", (50, 170), 4, 64, scale=0.3, softcap=2.0),
    DecodeCase("window", (50, 170, 300), 4, 64, window=(30, -1)),
    DecodeCase("window of one key, sink", (50, 64), 4, 64, window=(0, 5), sink=True),
    DecodeCase("window, three queries, pages", (500, 20), 4, 64, window=(100, 0), s_q=3, page=16),
    DecodeCase("alibi", (50, 170), 4, 64, h_kv=2, alibi=True, s_q=2),
    DecodeCase("sink", (0, 170), 4, 64, h_kv=2, sink=True, s_new=0),
    DecodeCase(
        "everything at once",
        (200, 3, 131),
        h=6,
        d=72,
        h_kv=2,
        d_v=40,
        s_q=3,
        layout="padded",
        page=7,
        rotary=24,
        interleaved=True,
        scale=0.2,
        softcap=5.0,
        window=(90, -1),
        alibi=True,
        sink=True,
    ),
    DecodeCase(
        "everything at once, float32 options",
        (140, 20),
        h=4,
        d=64,
        h_kv=1,
        s_q=2,
        layout="bshd",
        rotary=64,
        softcap=8.0,
        window=(100, -1),
        alibi=True,
        sink=True,
        float32_options=True,
    ),
]


DECODE_LONG = DecodeCase("20,000 keys", (20000,), 4, 64, h_kv=2, layout="bshd")


@dataclass(frozen=True)
class StepCase:
    name: str
    lengths: tuple[int, ...]  # tokens in the cache before the step, one per sequence
    starts: tuple[int, ...] | None = None  # places of padding before them, none by default
    layout: str = "columns"  # of the weights: columns as GPT-2 has them, rows, int8, int4
    vocab: int = 75
    d_model: int = 48
    d_ff: int = 100
    h: int = 3
    d: int = 16
    h_kv: int | None = None  # default h
    layers: int = 2
    rotary: int = 0  # columns that are rotated; 0 is learned positions
    interleaved: bool = False
    gated: bool = False
    rms: bool = False
    bias: bool = True
    activation: str = "gelu_tanh"
    scale_by_layer: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def quantized(self) -> bool:
        return self.layout.startswith("int")

    def make(self, dtype: torch.dtype, seed: int = 0) -> dict:
        """Arguments of `decode_step`. Places of the caches that hold no token are NaN."""
        generator = torch.Generator().manual_seed(seed)
        d_model, h_kv = self.d_model, self.h_kv or self.h
        qkv, room = (self.h + 2 * h_kv) * self.d, 5

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def weight(d_out: int, d_in: int, layout: str = self.layout) -> Tensor | QuantizedWeight:
            x = normal(d_out, d_in) / d_in**0.5
            if self.quantized:
                return quantize_weight(x, layout)
            return x.to(dtype).t().contiguous().t() if layout == "columns" else x.to(dtype)

        def vector(n: int, mean: float = 0.0, given: bool = True) -> Tensor | None:
            return (mean + 0.1 * normal(n)).to(dtype) if given else None

        def layer() -> StepLayer:
            inner = self.bias and not self.gated
            return StepLayer(
                norm1=vector(d_model, 1.0),
                norm1_bias=vector(d_model, given=self.bias and not self.rms),
                qkv=weight(qkv, d_model),
                qkv_bias=vector(qkv, given=self.bias),
                project=weight(d_model, self.h * self.d),
                project_bias=vector(d_model, given=self.bias),
                norm2=vector(d_model, 1.0),
                norm2_bias=vector(d_model, given=self.bias and not self.rms),
                up=weight(self.d_ff, d_model),
                up_bias=vector(self.d_ff, given=inner),
                gate=weight(self.d_ff, d_model) if self.gated else None,
                down=weight(d_model, self.d_ff),
                down_bias=vector(d_model, given=inner),
            )

        b, capacity = len(self.lengths), max(self.lengths) + room
        starts = torch.tensor(self.starts or [0] * b)
        lengths = torch.tensor(self.lengths)
        cos, sin = rotary_tables(capacity, self.rotary) if self.rotary else (None, None)
        tokens = weight(self.vocab, d_model, "rows" if self.layout == "columns" else self.layout)
        model = StepModel(
            tokens=tokens,
            positions=None if self.rotary else (0.1 * normal(capacity, d_model)).to(dtype),
            layers=tuple(layer() for _ in range(self.layers)),
            norm=vector(d_model, 1.0),
            norm_bias=vector(d_model, given=self.bias and not self.rms),
            head=tokens,
            heads=self.h,
            scale=self.d**-0.5,
            cos=cos,
            sin=sin,
            interleaved=self.interleaved,
            rms=self.rms,
            activation=self.activation,
            scale_by_layer=self.scale_by_layer,
        )
        slots = torch.arange(capacity)
        holds = (slots >= starts[:, None]) & (slots < lengths[:, None])  # (b, capacity)
        caches = [
            normal(2, b, h_kv, capacity, self.d).to(dtype).masked_fill(~holds[:, None, :, None], torch.nan)
            for _ in range(self.layers)
        ]
        return {
            "token_ids": torch.randint(self.vocab, (b,), generator=generator),
            "position_ids": lengths - starts,
            "starts": starts,
            "lengths": lengths,
            "caches": caches,
            "model": model,
        }


DECODE_STEP = [
    StepCase("first token", (0,)),
    StepCase("one row", (17,)),
    StepCase("weights by rows", (17,), layout="rows"),
    StepCase("16 rows, ragged", tuple(range(1, 33, 2)), tuple(i % 3 for i in range(16)), layout="rows"),
    StepCase("45 rows", tuple(i * i % 31 for i in range(45)), d_model=72, d_ff=1100, h=3, d=24),
    StepCase("7 rows, padded", (9, 9, 9, 9, 9, 9, 9), (0, 3, 9, 1, 0, 8, 2)),
    StepCase("many keys, in shares", (700, 256, 255, 30), (1, 0, 0, 29)),
    StepCase("odd sizes", (5, 40), vocab=67, d_model=35, d_ff=77, h=5, d=7, activation="gelu"),
    StepCase("odd sizes by rows", (5, 40), layout="rows", vocab=67, d_model=35, d_ff=77, h=5, d=7, activation="relu"),
    StepCase("deep enough for chunks", (20, 3), d_model=192, d_ff=1500, h=4, d=64, layers=1),
    StepCase("wide enough for blocks", (20,), d_model=40, d_ff=5000, h=2, d=20, layers=1, activation="tanh"),
    StepCase(
        "as Llama", (11, 300), (2, 0), h=6, h_kv=2, d=8, rotary=8, gated=True, rms=True, bias=False, activation="silu"
    ),
    StepCase(
        "as Llama, by rows", (11, 7), layout="rows", h=4, h_kv=1, d=24, rotary=10, interleaved=True, gated=True,
        rms=True, activation="gelu",
    ),
    StepCase("no biases, scaled by layer", (6, 6), bias=False, scale_by_layer=True, layers=3),
    StepCase("int8", (17, 300, 4), layout="int8"),
    StepCase("int4", (17, 300, 4), layout="int4"),
    StepCase("int8, odd sizes", (17,), layout="int8", vocab=67, d_model=35, d_ff=777, h=5, d=7),
    StepCase("int4, odd sizes", (17,), layout="int4", vocab=67, d_model=35, d_ff=777, h=5, d=7),
    StepCase(
        "int4 as Llama", (11, 3), layout="int4", h=6, h_kv=3, rotary=16, gated=True, rms=True, bias=False,
        activation="silu",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class SkinnyCase:
    """A linear layer x (m, k) -> (m, n)."""

    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"m{self.m}-n{self.n}-k{self.k}"


# GPT-2's layers and head with 1, 4 and 16 sequences, and a larger layer.
SKINNY_BENCHMARKS = [
    SkinnyCase(m, n, k)
    for m in (1, 4, 16)
    for n, k in ((768, 768), (2304, 768), (3072, 768), (768, 3072), (50257, 768), (4096, 4096))
]


# A prompt.
PREFILL_BENCHMARKS = [SkinnyCase(256, n, k) for n, k in ((2304, 768), (3072, 768), (768, 3072))]


@dataclass(frozen=True)
class SoftmaxCase:
    """Arguments of `softmax`."""

    name: str
    shape: tuple[int, ...]
    dim: int = -1
    scale: float = 3.0  # of the normal x
    hidden: float = 0.0  # the share of elements that are -inf; where it is not 0, one whole row is
    gaps: bool = False  # between rows

    def __str__(self) -> str:
        return self.name

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """x."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator) * self.scale
        if self.hidden > 0:
            x[torch.rand(self.shape, generator=generator) < self.hidden] = float("-inf")
            x.movedim(self.dim, -1)[..., 1, :] = float("-inf")
        x = x.to(dtype)
        if self.gaps:
            padded = x.new_full((*self.shape[:-1], self.shape[-1] + 3), float("nan"))
            padded[..., 2:-1] = x
            return {"x": padded[..., 2:-1]}
        return {"x": x}


SOFTMAX = [
    SoftmaxCase("one element", (50, 1)),
    SoftmaxCase("rows of 7", (40, 7)),
    SoftmaxCase("rows of 33", (3, 20, 33)),
    SoftmaxCase("rows of 64", (64,)),
    SoftmaxCase("rows of 100 with gaps", (4, 10, 100), gaps=True),
    SoftmaxCase("rows of 512", (2, 3, 20, 512)),
    SoftmaxCase("rows of 2049", (20, 2049), scale=1.0),
    SoftmaxCase("rows of 50257", (3, 50257)),
    SoftmaxCase("far apart", (30, 200), scale=40.0),
    SoftmaxCase("some -inf", (30, 100), hidden=0.5),
    SoftmaxCase("first axis", (70, 30), dim=0),
    SoftmaxCase("an axis between, some -inf", (3, 40, 20), dim=1, hidden=0.3),
]


SOFTMAX_BENCHMARKS = {
    "memory": [SoftmaxCase("8192x768", (8192, 768)), SoftmaxCase("128x50257", (128, 50257))],
    "cache": [SoftmaxCase("12x256x256", (12, 256, 256))],
    "short": [SoftmaxCase("64x768", (64, 768))],
}


def _decode(length: int, h: int, h_kv: int, d: int, **options) -> DecodeCase:
    """The last of `length` tokens of one sequence, in a cache that is full with it."""
    name = f"{length}-h{h}-kv{h_kv}-d{d}" + "".join(f"-{key}{value}" for key, value in options.items())
    return DecodeCase(name, (length - 1,), h, d, h_kv=h_kv, room=0, **options)


DECODE_BENCHMARKS = {
    "long": [
        case
        for length in (4096, 32768)
        for h, h_kv, d in ((12, 12, 64), (32, 8, 128))
        for case in (_decode(length, h, h_kv, d), _decode(length, h, h_kv, d, page=16))
    ],
    "long, (b, s, h, d)": [_decode(32768, 12, 12, 64, layout="bshd"), _decode(32768, 32, 8, 128, layout="bshd")],
    "one key head": [_decode(32768, 8, 1, 128)],
    "speculative": [_decode(4096, 32, 8, 128, s_q=4)],
    "short": [
        case for length in (32, 256) for case in (_decode(length, 12, 12, 64), _decode(length, 12, 12, 64, rotary=64))
    ],
}


@dataclass(frozen=True)
class LossCase:
    name: str
    t: int
    vocab: int
    d: int
    counted: float = 0.8  # share of the tokens whose label is not ignored
    bias: bool = False
    float32_weight: bool = False  # beside 16-bit hidden
    transposed: bool = False  # the weight lies as (d, vocab)
    spread: float = 2.0  # standard deviation of the logits
    reduction: str = "mean"
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict:
        names = ("reduction", "softcap", "z_loss", "label_smoothing")
        return {name: getattr(self, name) for name in names}

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """hidden, weight, labels and, where the case has one, bias."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        wide = torch.promote_types(dtype, torch.float32) if self.float32_weight else dtype
        weight = normal(self.vocab, self.d) * self.spread * self.d**-0.5
        if self.transposed:
            weight = weight.t().contiguous().t()
        labels = torch.randint(0, self.vocab, (self.t,), generator=generator)
        labels[torch.rand(self.t, generator=generator) >= self.counted] = -100
        # a weight in float32 holds what 16 bits hold, as what is rounded on the way is another question
        inputs = {"hidden": normal(self.t, self.d).to(dtype), "weight": weight.to(dtype).to(wide), "labels": labels}
        if self.bias:
            inputs["bias"] = normal(self.vocab).to(wide)
        return inputs


# A panel of tokens is 4 to 64 wide, a block of the vocabulary a multiple of 96, a slice of the depth 768 or 1536 deep;
# more than 768 tokens make several chunks. Up to 32 that count are few.
LINEAR_CROSS_ENTROPY = [
    LossCase("one token", 1, 1000, 64, counted=1.0),
    LossCase("one class", 9, 1, 16),
    LossCase("d 1", 33, 40, 1, reduction="none"),
    LossCase("everything odd", 47, 101, 33, bias=True),
    LossCase("one past a panel and a block", 65, 97, 31),
    LossCase("several blocks", 100, 1009, 64, counted=1.0),
    LossCase("several slices of the vocabulary", 70, 3301, 40),
    LossCase("several slices of the depth", 50, 130, 1601),
    LossCase("several chunks", 1601, 203, 20, counted=1.0),
    LossCase("several chunks, float32 weight", 1601, 203, 20, bias=True, float32_weight=True),
    LossCase("few labels", 300, 211, 48, counted=0.15),
    LossCase("transposed weight", 70, 150, 48, transposed=True),
    LossCase("float32 weight, odd d", 50, 150, 47, float32_weight=True),
    LossCase("sum", 60, 150, 48, reduction="sum"),
    LossCase("one loss per token", 60, 150, 48, bias=True, reduction="none"),
    LossCase("softcap, huge logits", 60, 150, 48, spread=300.0, softcap=30.0),
    LossCase("z-loss", 60, 150, 48, z_loss=0.01),
    LossCase("label smoothing", 60, 150, 48, label_smoothing=0.1),
    LossCase(
        "everything at once",
        t=850,
        vocab=307,
        d=50,
        bias=True,
        float32_weight=True,
        transposed=True,
        reduction="none",
        softcap=5.0,
        z_loss=0.1,
        label_smoothing=0.3,
    ),
]


# GPT-2's head on a batch, and BERT's: a share of the tokens is masked.
LINEAR_CROSS_ENTROPY_BENCHMARKS = [
    LossCase("t2048-v50257-d768", 2048, 50257, 768, counted=1.0),
    LossCase("t2048-v30522-d768-15%", 2048, 30522, 768, counted=0.15),
]
