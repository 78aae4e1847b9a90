"""Decoding with all of the model in one call per step."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.attention import capture
from ..ops.decode_step import StepModel, native
from .cache import KVCache
from .graphed import GraphedDecoder

# Tokens of a step; more are computed layer by layer.
MOST_ROWS = 64
# A prompt of so many tokens is read by a step, beside whatever else is in it. Longer ones are read layer by layer, in
# passes over more tokens than these: `linear` sums over fewer in another order.
FEW_TOKENS = 32


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

    aligned = False  # sequences lie in the cache with their padding

    def __init__(self, model: StepModel):
        self.model = model

    def unsupported(self, cache: KVCache) -> str | None:
        """Why a step on this cache cannot run here."""
        return native.unsupported(self.model, cache.buffers if cache.length else [self.model.norm])

    def takes(self, ids: torch.Tensor, past: int) -> bool:
        """Whether a step takes new tokens (b, s) after `past` others."""
        return ids.numel() <= MOST_ROWS and (past > 0 or ids.shape[1] <= FEW_TOKENS)

    def step(self, ids: torch.Tensor, cache: KVCache, starts: torch.Tensor, count: int = 1) -> torch.Tensor:
        """The float32 logits (b, count, vocab) after the last `count` new tokens; the cache grows by keys and values.

        ids: (b, s)   the new tokens
        starts: (b,)  int64, places of padding before each row, which are no tokens
        """
        (b, s), past = ids.shape, cache.length
        if past == 0:
            cache.allocate(starts, self.model.heads_kv, self.model.head_dim, s, self.model.norm)
        cache.reserve(past + s)
        if s == 1:
            lengths, own = torch.full_like(starts, past), {}
        else:
            slots = torch.arange(past, past + s).expand(b, s)
            real = slots >= starts[:, None]
            last = torch.arange(b * s).view(b, s)[:, s - count :].flatten()
            sequences, lengths, ids = real.nonzero()[:, 0], slots[real], ids[real]
            starts = starts[sequences]
            own = {"sequences": sequences, "logits_of": real.flatten().cumsum(0)[last] - 1}
        logits = native.forward(ids.flatten(), lengths - starts, starts, lengths, cache.buffers, self.model, **own)
        cache.advance(s)
        return logits.view(b, count, -1)


def fused_decoder(model: nn.Module) -> FusedDecoder | GraphedDecoder | None:
    """The fused steps of a model as it is now, or None where `unsupported` has a reason. Costs less than a step."""
    if unsupported(model) is not None:
        return None
    step_model = model.step_model()
    if step_model is None:
        return None
    return GraphedDecoder(step_model) if step_model.norm.is_cuda else FusedDecoder(step_model)
