"""A step of decoding in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from ..linear.native import CODES

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM, MAX_GROUP = 256, 64

# weights: the table of tokens, that of positions (or an empty tensor), of each layer qkv, project, up, gate where there
# is one, down; the head. A quantised weight is its data and its scales.
# vectors: of each layer norm1 and its bias, the biases of qkv and project, norm2 and its bias, the biases of up, gate
# where there is one, and down; then the last norm and its bias. Biases that a model lacks are zeros.
_library.LIBRARY.define(
    "decode_step(Tensor token_ids, Tensor position_ids, Tensor starts, Tensor lengths, Tensor(a!)[] caches, "
    "Tensor? block_table, Tensor? sequences, Tensor? logits_of, Tensor[] weights, Tensor vectors, Tensor? cos, "
    "Tensor? sin, SymInt vocab, SymInt d_model, SymInt d_ff, int heads, float eps, bool rms, int activation, "
    "bool gated, float scale, bool scale_by_layer, bool interleaved) -> Tensor"
)
_step = torch.ops.lmkernels.decode_step.default


@torch.library.register_fake("lmkernels::decode_step", lib=_library.LIBRARY)
def _(token_ids, position_ids, starts, lengths, caches, block_table, sequences, logits_of, weights, vectors, *rest):
    rows = token_ids if logits_of is None else logits_of
    return vectors.new_empty(rows.shape[0], rest[2])


def pack(model) -> tuple[list[Tensor], Tensor]:
    """The matrices in the order of the schema, and the vectors in one."""
    device = model.norm.device
    matrices, *others = ([m] if isinstance(m, Tensor) else [m.data, m.scales] for m in model.matrices)
    positions = torch.empty(0, device=device) if model.positions is None else model.positions
    weights = [*matrices, positions, *(tensor for matrix in others for tensor in matrix)]

    def vector(x: Tensor | None, n: int) -> Tensor:
        return torch.zeros(n, device=device) if x is None else x.detach().float()

    d, vectors = model.norm.shape[0], []
    for layer in model.layers:
        vectors += [vector(layer.norm1, d), vector(layer.norm1_bias, d)]
        vectors += [vector(layer.qkv_bias, layer.qkv.shape[0]), vector(layer.project_bias, d)]
        vectors += [vector(layer.norm2, d), vector(layer.norm2_bias, d)]
        vectors += [vector(layer.up_bias, layer.up.shape[0])]
        if layer.gate is not None:
            vectors += [vector(layer.gate_bias, layer.gate.shape[0])]
        vectors += [vector(layer.down_bias, d)]
    vectors += [vector(model.norm, d), vector(model.norm_bias, d)]
    return [x.detach() for x in weights], torch.cat(vectors)


def unsupported(model, caches: list[Tensor]) -> str | None:
    if _library.native_error is not None:
        return _library.native_error
    dtype, device = caches[0].dtype, caches[0].device
    if device.type != "cpu":
        return f"the compiled library has no kernel for device {device.type!r}"
    if dtype not in _DTYPES:
        return f"dtype {dtype} is not one of float32, bfloat16, float16"
    if model.head_dim > MAX_HEAD_DIM or model.heads > MAX_GROUP * model.heads_kv:
        return (
            f"heads have up to {MAX_HEAD_DIM} columns and a key head serves up to {MAX_GROUP} of them, got "
            f"{model.head_dim} columns, {model.heads} heads on {model.heads_kv}"
        )
    for matrix in (*model.matrices, *([] if model.positions is None else [model.positions])):
        if not isinstance(matrix, Tensor):
            continue
        if matrix.dtype != dtype:
            return f"weights must have the dtype of the caches, {dtype}, or be quantised, got {matrix.dtype}"
        if 1 not in matrix.stride() or min(matrix.shape) == 0:
            return f"weights must be dense along an axis, got strides {matrix.stride()} of {tuple(matrix.shape)}"
    for name in ("tokens", "head", "positions"):
        matrix = getattr(model, name)
        if isinstance(matrix, Tensor) and matrix.stride(1) != 1:
            return f"{name} must have a contiguous last axis, got strides {matrix.stride()}"
    return None


def forward(
    token_ids: Tensor,
    position_ids: Tensor,
    starts: Tensor,
    lengths: Tensor,
    caches: list[Tensor],
    model,
    block_table: Tensor | None = None,
    sequences: Tensor | None = None,
    logits_of: Tensor | None = None,
) -> Tensor:
    """logits (rows or logits_of, vocab)"""
    weights, vectors = model.packed
    return _step(
        token_ids.contiguous(),
        position_ids.contiguous(),
        starts.contiguous(),
        lengths.contiguous(),
        caches,
        None if block_table is None else block_table.to(torch.int32).contiguous(),
        None if sequences is None else sequences.contiguous(),
        None if logits_of is None else logits_of.contiguous(),
        weights,
        vectors,
        *model.tables,
        *model.tokens.shape,
        model.layers[0].up.shape[0],
        model.heads,
        model.eps,
        model.rms,
        CODES[model.activation],
        model.gated,
        model.scale,
        model.scale_by_layer,
        model.interleaved,
    )
