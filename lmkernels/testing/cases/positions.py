"""Rotary and learned positions, and embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .drawing import drawn_on_the_cpu


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
