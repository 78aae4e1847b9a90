"""What torch allows a product of float32 matrices to lose: nothing, unless its own switches say so."""

from __future__ import annotations

import torch

_PARTS = {"tf32": 2, "bf16": 1}
# what torch.backends.mkldnn.matmul.fp32_precision returns, which takes ten times as long
_precision_of = torch._C._get_fp32_precision_getter


def float32_parts() -> int:
    """How many bfloat16 a factor of a float32 product on the CPU may be rounded to the sum of; 3 lose nothing.

    "highest", "high" and "medium" of `torch.set_float32_matmul_precision` are 3, 2 and 1. A compiled graph keeps what
    was set when it was compiled, until that function leaves "highest" or returns to it.
    """
    return _PARTS.get(_precision_of("mkldnn", "matmul"), 3)


# what torch.compiler.assume_constant_result does, which imports Triton as well
float32_parts._dynamo_marked_constant = True


def cuda_float32() -> str:
    """How a Triton kernel multiplies float32: "tf32" or "ieee"."""
    # allow_tf32 raises where the precision was set by torch's newer names
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
