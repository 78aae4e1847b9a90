"""Linear, and transformers' Conv1D."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..ops.linear import linear
from ._scope import is_for_torch


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` by `lmkernels.linear`: (..., in_features) to (..., out_features).

    Where the input has 16 bits, the parameters may be float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_for_torch(input, self.weight, self.bias):
            return super().forward(input)
        return linear(input, self.weight, self.bias)


class Conv1D:
    """The forward of transformers' Conv1D, x weight + bias with weight (in, out), by `lmkernels.linear`.

    `conv1d_class` makes a subclass of theirs with it; this package does not import transformers.
    """

    def forward(self, x: Tensor) -> Tensor:
        if is_for_torch(x, self.weight, self.bias):
            return super().forward(x)
        return linear(x, self.weight.t(), self.bias)

    def __reduce_ex__(self, protocol):
        # the class has no name to be found under, its base has
        return _new_conv1d, (type(self).__mro__[2],), self.__dict__


@cache
def conv1d_class(base: type) -> type:
    """The subclass of transformers' Conv1D, `base`, that computes by `lmkernels.linear`."""
    return type("Conv1D", (Conv1D, base), {"__module__": __name__, "__doc__": Conv1D.__doc__})


def _new_conv1d(base: type):
    return conv1d_class(base).__new__(conv1d_class(base))
