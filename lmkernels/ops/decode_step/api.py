"""One step of decoding: the public function and the weights that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import check_device, check_floating, check_indices
from ..linear.checks import check_activation
from ..quantize_weight import QuantizedWeight
from . import native, reference

BACKENDS = {"native": native, "reference": reference}


@dataclass(frozen=True)
class StepLayer:
    """The weights of one layer, each (d_out, d_in), dense along either axis, or from `quantize_weight`.

    qkv: ((h + 2 h_kv) d, d_model), project: (d_model, h d), up: (d_ff, d_model), down: (d_model, d_ff)
    gate: as up; then the hidden layer is activation(gate x) * (up x), else activation(up x)
    norm1, norm2: (d_model,), before the attention and before the feed-forward layer
    """

    norm1: Tensor
    qkv: Tensor | QuantizedWeight
    project: Tensor | QuantizedWeight
    norm2: Tensor
    up: Tensor | QuantizedWeight
    down: Tensor | QuantizedWeight
    gate: Tensor | QuantizedWeight | None = None
    norm1_bias: Tensor | None = None
    qkv_bias: Tensor | None = None
    project_bias: Tensor | None = None
    norm2_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def weights(self) -> list[Tensor | QuantizedWeight]:
        return [w for w in (self.qkv, self.project, self.up, self.gate, self.down) if w is not None]


@dataclass(frozen=True)
class StepModel:
    """A decoder-only transformer. Weights are read where they lie; norms and biases, when the model is first run.

    tokens: (vocab, d_model)          the table of token embeddings
    head: (vocab, d_model)            what the logits are made with; tokens itself where it is tied
    positions: (n, d_model)           learned positions, or None
    cos, sin: (n, d_rot / 2)          tables of rotary positions, or None
    rms                               norms are RMS norms, without bias
    scale, scale_by_layer             of the scores, divided by 1, 2, ... in turn
    """

    tokens: Tensor | QuantizedWeight
    layers: tuple[StepLayer, ...]
    norm: Tensor
    head: Tensor | QuantizedWeight
    heads: int
    scale: float
    norm_bias: Tensor | None = None
    positions: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False
    eps: float = 1e-5
    rms: bool = False
    activation: str | None = "gelu_tanh"
    scale_by_layer: bool = False

    def __post_init__(self):
        if not self.layers:
            raise ValueError("layers must hold a layer or more, got none")
        vocab, d_model = self.tokens.shape
        if not isinstance(self.heads, int) or self.heads < 1:
            raise ValueError(f"heads must be a positive whole number, got {self.heads!r}")
        check_activation(self.activation)
        d_ff, attended = self.layers[0].up.shape[0], self.layers[0].project.shape[1]
        if attended % self.heads:
            raise ValueError(
                f"project must be (d_model, h d) with h = {self.heads}, got {tuple(self.layers[0].project.shape)}"
            )
        qkv = self.layers[0].qkv.shape[0]
        d = attended // self.heads
        if qkv <= attended or (qkv - attended) % (2 * d) or self.heads % ((qkv - attended) // (2 * d)):
            raise ValueError(f"qkv must be ((h + 2 h_kv) d, d_model) with h = {self.heads}, d = {d}, got {qkv} rows")
        wanted = {
            "norm1": (d_model,), "norm1_bias": (d_model,), "norm2": (d_model,), "norm2_bias": (d_model,),
            "qkv": (qkv, d_model), "qkv_bias": (qkv,), "project": (d_model, attended), "project_bias": (d_model,),
            "up": (d_ff, d_model), "up_bias": (d_ff,), "gate": (d_ff, d_model), "gate_bias": (d_ff,),
            "down": (d_model, d_ff), "down_bias": (d_model,),
        }  # fmt: skip
        for i, layer in enumerate(self.layers):
            for name, shape in wanted.items():
                x = getattr(layer, name)
                if x is not None and tuple(x.shape) != shape:
                    raise ValueError(f"{name} of layer {i} must be {shape}, got {tuple(x.shape)}")
            if (layer.gate is None) != (self.layers[0].gate is None):
                raise ValueError(f"gate must be given in every layer or in none, layer {i} differs")
            if layer.gate is not None and isinstance(layer.gate, Tensor) != isinstance(layer.up, Tensor):
                raise ValueError(f"gate of layer {i} must be quantised where up is")
        if tuple(self.head.shape) != (vocab, d_model):
            raise ValueError(f"head must be (vocab, d_model) = {(vocab, d_model)}, got {tuple(self.head.shape)}")
        if self.positions is not None and self.positions.shape[1:] != (d_model,):
            raise ValueError(
                f"positions must be (n, d_model) with d_model = {d_model}, got {tuple(self.positions.shape)}"
            )
        if (self.cos is None) != (self.sin is None):
            raise ValueError("cos must be given with sin")
        if self.cos is not None and (
            self.cos.shape != self.sin.shape or self.cos.dim() != 2 or not 2 <= 2 * self.cos.shape[1] <= d
        ):
            raise ValueError(f"cos and sin must be (n, d_rot / 2) with d_rot up to {d}, got {tuple(self.cos.shape)}")

    @property
    def gated(self) -> bool:
        return self.layers[0].gate is not None

    @property
    def head_dim(self) -> int:
        return self.layers[0].project.shape[1] // self.heads

    @property
    def heads_kv(self) -> int:
        return (self.layers[0].qkv.shape[0] // self.head_dim - self.heads) // 2

    @cached_property
    def matrices(self) -> list[Tensor | QuantizedWeight]:
        """Every matrix that a step reads."""
        return [self.tokens, *(weight for layer in self.layers for weight in layer.weights()), self.head]

    @property
    def nbytes(self) -> int:
        """The bytes that a step reads, the keys and values left out: of the tables, next to nothing."""
        return sum(weight.nbytes for weight in self.matrices[1:])

    @cached_property
    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin in contiguous float32."""
        return tuple(None if x is None else x.detach().float().contiguous() for x in (self.cos, self.sin))

    @cached_property
    def packed(self) -> tuple[list[Tensor], Tensor]:
        """The matrices, and all norms and biases in one vector, as the compiled library takes them."""
        return native.pack(self)


def decode_step(
    token_ids: Tensor,
    position_ids: Tensor,
    starts: Tensor,
    lengths: Tensor,
    caches: list[Tensor],
    model: StepModel,
    *,
    block_table: Tensor | None = None,
    sequences: Tensor | None = None,
    logits_of: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The logits (rows, vocab), float32, after tokens that are new in their sequences; all of the model in one call.

    token_ids, position_ids: (rows,)          int64; positions choose what is learned or rotated
    lengths: (rows,)                          int64; slots of the cache that are taken: the token's key and value go to
                                              the next one, in place
    starts: (rows,)                           int64; the first slot that a sequence sees, after its padding
    caches: per layer (2, b, h_kv, capacity, d)  keys and values in the dtype of the weights, b at least rows; paged:
                                              (2, num_blocks, h_kv, block_size, d)
    block_table: (rows, max_blocks)           int32 or int64: slot j of a sequence is slot j % block_size of page
                                              block_table[row, j // block_size]; starts are 0 then. A page that is
                                              written must belong to one sequence
    sequences: (rows,)                        int64; the row of the caches, or of block_table, that a token belongs to;
                                              None: each its own. Of a sequence's tokens, `lengths` grow by 1 from one
                                              to the next, and each sees those before it
    logits_of: (n,)                           int64, n >= 1; the rows whose logits are wanted, which are then (n, vocab)
    backend: "native" or "reference"; None takes the first that can run this.

    Inference only. Sums are float32, of weights in their dtype; x is rounded to bfloat16 where these are, and to 8-bit
    integers, row by row, where these are quantised (`quantize_weight`). A row has the same bits in any batch, beside
    other tokens of its sequence or after them, on any number of threads, in a paged cache and in a contiguous one.

    Raises ValueError or TypeError for bad arguments, NotImplementedError when `backend` cannot run them.
    """
    if not isinstance(model, StepModel):
        raise TypeError(f"model must be a StepModel, got {type(model).__name__}")
    if len(caches) != len(model.layers):
        raise ValueError(f"caches must hold one tensor per layer, {len(model.layers)}, got {len(caches)}")
    for name, x in (("token_ids", token_ids), ("position_ids", position_ids), ("starts", starts), ("lengths", lengths)):
        check_indices(name, x, ((token_ids.numel(),),), "caches[0]", caches[0])
        if x.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {x.dtype}")
    shape = (2, None, model.heads_kv, None, model.head_dim)
    for i, cache in enumerate(caches):
        check_floating(f"caches[{i}]", cache)
        check_device(f"caches[{i}]", cache, "caches[0]", caches[0])
        fits = cache.dim() == 5 and all(want in (None, have) for want, have in zip(shape, cache.shape, strict=True))
        rows = token_ids.numel() if block_table is None and sequences is None else 0
        if not fits or cache.shape[1] < rows or cache.shape != caches[0].shape:
            raise ValueError(
                f"caches must be (2, b, h_kv, capacity, d) with b >= {rows}, h_kv = {model.heads_kv}, "
                f"d = {model.head_dim}, all alike, got {tuple(cache.shape)}"
            )
    if block_table is not None:
        is_table = isinstance(block_table, Tensor) and block_table.dim() == 2
        rows, blocks = block_table.shape if is_table else (token_ids.numel(), 0)
        rows = token_ids.numel() if sequences is None else rows
        check_indices("block_table", block_table, ((rows, blocks),), "caches[0]", caches[0])
        if caches[0].shape[3] == 0:
            raise ValueError(f"a page of caches must hold a token or more, got {tuple(caches[0].shape)}")
    for name, x in (("sequences", sequences), ("logits_of", logits_of)):
        if x is not None:
            own = x.numel() if name == "logits_of" and isinstance(x, Tensor) else token_ids.numel()
            check_indices(name, x, ((own,),), "caches[0]", caches[0])
            if x.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, got {x.dtype}")
    if logits_of is not None and logits_of.numel() == 0 < token_ids.numel():
        raise ValueError("logits_of must name a row or more, got none")
    module = _dispatch.choose("decode_step", BACKENDS, backend, model, caches)
    return module.forward(token_ids, position_ids, starts, lengths, caches, model, block_table, sequences, logits_of)
