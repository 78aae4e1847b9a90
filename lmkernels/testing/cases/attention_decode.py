"""Queries over a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drawing import drawn_on_the_cpu


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
