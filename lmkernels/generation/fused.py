"""Decoding with all of the model in one call per token."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.attention import capture
from ..ops.decode_step import StepModel, native
from .cache import KVCache
from .graphed import GraphedDecoder

# Of a step; more are computed layer by layer.
MOST_ROWS = 64


def unsupported(model: nn.Module) -> str | None:
    """Why the steps of a model are not fused as it is now, or None."""
    if not hasattr(model, "step_model"):
        return f"{type(model).__name__} has no step_model()"
    if model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return "the model is in training mode, with dropout"
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        return "autocast is on"
    if capture.listening:
        return "capture_attention wants maps, which steps do not make"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has a hook, or a forward of its own"
    return None


class FusedDecoder:
    """The steps of a model by `decode_step`: matrices are read where the model has them, norms and biases copied."""

    most_rows = MOST_ROWS
    aligned = False  # sequences lie in the cache with their padding

    def __init__(self, model: StepModel):
        self.model = model

    def unsupported(self, cache: KVCache) -> str | None:
        """Why a step on this cache, which holds a prompt, cannot run here."""
        return native.unsupported(self.model, cache.buffers)

    def step(self, ids: torch.Tensor, cache: KVCache, starts: torch.Tensor) -> torch.Tensor:
        """The float32 logits (b, vocab) after one token more of each row; the cache grows by its keys and values.

        ids: (b,)     the tokens
        starts: (b,)  int64, places of padding before each row
        """
        cache.reserve(cache.length + 1)
        lengths = torch.full_like(starts, cache.length)
        logits = native.forward(ids, lengths - starts, starts, lengths, cache.buffers, self.model)
        cache.advance(1)
        return logits


def fused_decoder(model: nn.Module) -> FusedDecoder | GraphedDecoder | None:
    """The fused steps of a model as it is now, or None where `unsupported` has a reason. Costs less than a step."""
    if unsupported(model) is not None:
        return None
    step_model = model.step_model()
    if step_model is None:
        return None
    return GraphedDecoder(step_model) if step_model.norm.is_cuda else FusedDecoder(step_model)
