"""Norms and softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drawing import drawn_on_the_cpu


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
