"""What the ops do not take: there a module leaves the work to the torch module that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops._checks import FLOATS

_PLAIN = (Tensor, torch.nn.Parameter)


def is_for_torch(*tensors: Tensor | None) -> bool:
    """Whether torch has to compute with these itself.

    Tensor subclasses (DTensor and the like); nested, sparse, meta, integer and complex tensors; the transforms of
    torch.func; forward-mode derivatives.
    """
    if torch.compiler.is_compiling():  # the tensors are stand-ins for what the compiled code will get
        return any(x is not None and x.dtype not in FLOATS for x in tensors)
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    return any(
        x is not None
        and (type(x) not in _PLAIN or x.dtype not in FLOATS or x.layout != torch.strided or x.is_nested or x.is_meta)
        for x in tensors
    )
