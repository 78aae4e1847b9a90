"""Attention maps of a model as it runs, to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# what `capture_attention` has opened: the list of each, and whether its maps are detached
listening: list[tuple[list[Tensor], bool]] = []
# `_record` behind torch.compiler.disable, made when first wanted: that imports torch._dynamo, which takes a second
record: Callable[..., None] | None = None


@contextmanager
def capture_attention(*, detach: bool = True) -> Iterator[list[Tensor]]:
    """Inside it, every attention puts its map into the list that it gives, in the order of the calls.

        with lmkernels.capture_attention() as maps:
            model(input_ids)
        maps[2]     # of the third layer, (b, h, s_q, s_k)

    A map is what `attention_weights` returns: the softmax before dropout, rows of zeros where a query sees no key.
    Packed sequences (`attention_varlen`) give theirs padded to the longest, (number of sequences, h, s_q, s_k), with
    zeros beyond. `attention`, `attention_varlen` and `scaled_dot_product_attention` are heard, and so are the models
    and modules built on them and Hugging Face models on "lmkernels". `generate` then computes layer by layer, one map
    per layer and step. `attention_decode`, `decode_step` and the steps of an `Engine` make no maps and are not heard.

    detach: False keeps the maps differentiable.

    Each map costs its memory, in float32 while it is computed, and the time of plain torch. Under torch.compile the
    graph breaks at every attention as long as someone listens; outside, nothing is paid and nothing recompiled. Threads
    are not told apart: a map of another thread's model is recorded too.
    """
    global record
    if record is None:
        record = torch.compiler.disable(_record)
    maps: list[Tensor] = []
    mine = (maps, bool(detach))
    listening.append(mine)
    try:
        yield maps
    finally:
        del listening[next(i for i, each in enumerate(listening) if each is mine)]


def _record(weights: Callable[..., Tensor], *arguments) -> None:
    """Puts weights(*arguments) into every open list."""
    differentiable = not all(detach for _, detach in listening)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        x = weights(*arguments)
    for maps, detach in listening:
        maps.append(x.detach() if detach else x)
