"""Tokens of a whole model over its caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.decode_step import StepLayer, StepModel
from ...ops.quantize_weight import QuantizedWeight, quantize_weight
from ...ops.rotary import rotary_tables


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
