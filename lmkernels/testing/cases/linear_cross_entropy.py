"""The loss of a head without its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drawing import drawn_on_the_cpu


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
