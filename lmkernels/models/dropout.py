"""Dropout of hidden states, four random numbers to a draw."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 2**16


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, in a third of its time on a CPU, where torch draws a number for each element in turn.

    16 bits of a number decide about an element, so that p is rounded to a multiple of 2^-16, and the rest is divided by
    the rounded 1 - p. Reproducible by torch.manual_seed. Elsewhere, and under torch.compile, it is torch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0 or not input.is_cpu or torch.compiler.is_compiling():
            return super().forward(input)
        return _Dropout.apply(input, min(round(self.p * STEPS), STEPS - 1))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropped):
        """dropped: of STEPS elements, on average"""
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - STEPS // 2
        ctx.save_for_backward(keep)
        ctx.scale = STEPS / (STEPS - dropped)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, dout):
        (keep,) = ctx.saved_tensors
        return dout * keep * ctx.scale, None
