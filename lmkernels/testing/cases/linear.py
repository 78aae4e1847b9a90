"""Projections, and products of few rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drawing import drawn_on_the_cpu


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
