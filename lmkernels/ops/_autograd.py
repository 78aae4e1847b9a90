"""What the gradients of all ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to be entered: it costs more than a small op computes."""
    if torch.is_grad_enabled():
        for x in tensors:  # any() over a generator would take a microsecond
            if x is not None and x.requires_grad:
                return True
    return False


def reference_gradients(
    forward: Callable, inputs: Sequence[Tensor | None], needs: Sequence[bool], douts: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of forward(*inputs) that can be differentiated again, by recomputing the reference.

    For the backward of an autograd.Function that runs with gradients enabled (create_graph=True); a kernel's gradients
    are constants to autograd.

    forward: the reference, with everything but its tensors bound; returns a tensor or a tuple of them
    needs: which of the inputs want a gradient; the others get None
    douts: the gradients that arrive at the results; None where a result was not used
    """
    with torch.enable_grad():
        # one alias for each argument: the same tensor may be passed twice, and one may be computed from another
        aliases = [
            x if not needed else x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            for x, needed in zip(inputs, needs, strict=True)
        ]
        outs = forward(*aliases)
        outs = (outs,) if isinstance(outs, Tensor) else outs
        used = [(out, dout) for out, dout in zip(outs, douts, strict=True) if dout is not None and out.requires_grad]
        wanted = [x for x, needed in zip(aliases, needs, strict=True) if needed]
        if not used or not wanted:
            return [None] * len(inputs)
        gradients = iter(
            torch.autograd.grad(
                [out for out, _ in used], wanted, [d for _, d in used], create_graph=True, allow_unused=True
            )
        )
    return [next(gradients) if needed else None for needed in needs]
