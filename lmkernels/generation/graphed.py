"""Decoding on a GPU: a step of the model through the ops, recorded as a CUDA graph and replayed for every token."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..ops.attention_decode import attention_decode
from ..ops.decode_step import StepModel
from ..ops.embed import embed
from ..ops.linear import linear
from ..ops.mlp import mlp
from ..ops.norms import layer_norm, rms_norm
from .cache import KVCache


def step_by_ops(
    token_ids: torch.Tensor,
    lengths: torch.Tensor,
    caches: list[torch.Tensor],
    model: StepModel,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode_step` where it has no kernel of its own, for sequences that begin at the first slot of the cache.

    token_ids, lengths: (rows,)   the new tokens, and how many tokens the cache holds before them: their positions
    caches, block_table           as in `decode_step`
    Returns the logits (rows, vocab), float32. Shapes are those of the arguments whatever they hold, and no value is
    read, so that a CUDA graph can record it.
    """
    rows, h, h_kv, d = token_ids.shape[0], model.heads, model.heads_kv, model.head_dim

    def norm(x, weight, bias):
        return rms_norm(x, weight, model.eps) if model.rms else layer_norm(x, weight, bias, model.eps)

    positions = {} if model.positions is None else {"position_table": model.positions, "positions": lengths}
    x = embed(token_ids, model.tokens, **positions)  # (rows, d_model)
    for i, (layer, cache) in enumerate(zip(model.layers, caches, strict=True)):
        qkv = linear(norm(x, layer.norm1, layer.norm1_bias), layer.qkv, layer.qkv_bias)
        q, k, v = qkv.view(rows, 1, h + 2 * h_kv, d).split((h, h_kv, h_kv), 2)
        attended = attention_decode(
            q,
            *(part[: rows if block_table is None else None].transpose(1, 2) for part in cache),
            lengths,
            k_new=k,
            v_new=v,
            cos=model.cos,
            sin=model.sin,
            interleaved=model.interleaved,
            block_table=block_table,
            scale=model.scale / (i + 1) if model.scale_by_layer else model.scale,
        )
        x = linear(attended.flatten(1), layer.project, layer.project_bias, residual=x)
        y = norm(x, layer.norm2, layer.norm2_bias)
        if layer.gate is None:
            x = mlp(y, layer.up, layer.up_bias, layer.down, layer.down_bias, activation=model.activation, residual=x)
        else:
            gate = linear(y, layer.gate, layer.gate_bias, activation=model.activation)
            hidden = gate * linear(y, layer.up, layer.up_bias)
            x = linear(hidden, layer.down, layer.down_bias, residual=x)
    return linear(norm(x, model.norm, model.norm_bias), model.head).float()


class CudaGraph:
    """A function of tensors that stay where they are, as one launch. A replay writes over what the last one returned.

    The function is called twice before the first replay.
    """

    def __init__(self, function: Callable[[], torch.Tensor]):
        # what a first call compiles or sets up must not be recorded
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = function()

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.result


class GraphedDecoder:
    """The steps of a model by `step_by_ops` in a graph, on the buffers of a cache, which must not move meanwhile.

    The graph is for as many rows as there are at first. When rows are done and left out, it goes on with what it has
    for them, which nobody reads: fewer rows would take as long, and a new graph longer.
    """

    def __init__(self, model: StepModel, record: Callable = CudaGraph):
        self.model, self.record = model, record
        self.graph, self.buffers = None, []
        self.first: int | None = None  # the slot of the cache that all sequences begin at, once they have been moved

    @property
    def aligned(self) -> bool:
        return self.first is not None

    def unsupported(self, cache: KVCache) -> str | None:
        """Why a step on this cache cannot run here."""
        if not all(isinstance(matrix, torch.Tensor) for matrix in self.model.matrices):
            return "quantised weights have kernels on the CPU only"
        return None

    def takes(self, ids: torch.Tensor, past: int) -> bool:
        """Whether a step takes new tokens (b, s) after `past` others: one of each row."""
        return past > 0 and ids.shape[1] == 1

    def step(self, ids: torch.Tensor, cache: KVCache, starts: torch.Tensor, count: int = 1) -> torch.Tensor:
        """The float32 logits (b, 1, vocab) after one token more of each row, ids (b, 1); as `FusedDecoder.step`."""
        ids = ids[:, 0]
        if self.first is None:
            # one sequence stays where it is, as the layers may add several tokens at once to it
            self.first = int(starts.min())
            cache.shift(starts - self.first)
        cache.reserve(cache.length + 1)
        rows, lengths = ids.shape[0], cache.length - starts
        if not self.buffers or self.buffers[0].data_ptr() != cache.buffers[0].data_ptr():
            self.tokens, self.lengths, self.buffers = ids.clone(), lengths.clone(), list(cache.buffers)
            seen = [buffer[:, :, :, self.first :] for buffer in self.buffers]
            self.graph = self.record(lambda: step_by_ops(self.tokens, self.lengths, seen, self.model))
        self.tokens[:rows], self.lengths[:rows] = ids, lengths
        logits = self.graph.replay()[:rows].clone()
        cache.advance(1)
        return logits[:, None]
