"""The dropout of our models."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.dropout import drop


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`; on a CPU its decisions come from all cores, 16 bits each, and nothing is kept of them."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input, with what is dropped, + residual"""
        return drop(self, input, residual)
