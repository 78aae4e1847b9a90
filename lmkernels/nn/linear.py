"""Linear, and transformers' Conv1D."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.linear import linear
from ._scope import is_for_torch
from ._stand_in import StandIn


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` by `lmkernels.linear`: (..., in_features) to (..., out_features).

    Where the input has 16 bits, the parameters may be float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_for_torch(input, self.weight, self.bias):
            return super().forward(input)
        return linear(input, self.weight, self.bias)


class Conv1D(StandIn):
    """The forward of transformers' Conv1D, x weight + bias with weight (in, out), by `lmkernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        if is_for_torch(x, self.weight, self.bias):
            return super().forward(x)
        return linear(x, self.weight.t(), self.bias)
