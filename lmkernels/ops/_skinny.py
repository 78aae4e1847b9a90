"""Linear layers on few rows, where reading the weight is the cost: the op of the compiled library.

`lmkernels::skinny_linear_fwd(x, weight, bias, residual, activation)` is activation(x weight^T + bias) + residual:
x (m, k), any m; it is written for few rows
weight (n, k) in x's dtype; contiguous along either axis, it is read where it is
bias (n,), residual (m, n): in x's dtype or, for 16 bits, in float32
activation: as `linear.native.CODES` numbers them
Returns (m, n) in the dtype of residual, or of x.
Sums are float32 (float64 for float64), the result is rounded once. A row has the same bits in every batch and for every
number of threads.
"""

from __future__ import annotations

import torch

from .. import _library

_library.LIBRARY.define(
    "skinny_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation) -> Tensor"
)


@torch.library.register_fake("lmkernels::skinny_linear_fwd", lib=_library.LIBRARY)
def _(x, weight, bias, residual, activation):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=x.dtype if residual is None else residual.dtype)
