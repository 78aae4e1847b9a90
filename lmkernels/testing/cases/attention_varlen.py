"""Packed sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import AttentionCase, AttentionInputs
from .drawing import drawn_on_the_cpu


@dataclass(frozen=True)
class AttentionVarlenCase:
    """Sequences of these lengths, the first tokens of each entry of a padded batch; its options are theirs too."""

    padded: AttentionCase
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]

    def __str__(self) -> str:
        return self.padded.name

    @drawn_on_the_cpu
    def make(self, dtype: torch.dtype, seed: int = 0) -> AttentionInputs:
        """q (t_q, h, d), dout (t_q, h, d_v), dlse (h, t_q), and k and v (t_k, ...); cu_seqlens are options."""
        padded = self.padded.make(dtype, seed)
        q, dout, dlse = (pack(x, self.lengths_q) for x in (padded.q, padded.dout, padded.dlse.transpose(1, 2)))
        k, v = (pack(x, self.lengths_k) for x in (padded.k, padded.v))
        lengths = {
            "cu_seqlens_q": cu_seqlens(self.lengths_q),
            "cu_seqlens_k": cu_seqlens(self.lengths_k),
            "max_seqlen_q": self.padded.s_q,
            "max_seqlen_k": self.padded.s_k,
        }
        return AttentionInputs(q, k, v, dout, dlse.T.contiguous(), lengths | padded.options)

    def visible_pairs(self) -> int:
        """As AttentionCase's, of all sequences together."""
        lengths = zip(self.lengths_q, self.lengths_k, strict=True)
        return sum(replace(self.padded, s_q=s_q, s_k=s_k).visible_pairs() for s_q, s_k in lengths)


def pack(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The first tokens of each sequence of (b, s, ...), end to end: (t, ...)."""
    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])


def cu_seqlens(lengths: tuple[int, ...]) -> Tensor:
    """(b + 1,) int32: 0 and the ends of the sequences."""
    return torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)


def _varlen(
    name: str, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...] | None = None, h: int = 2, d: int = 64, **options
) -> AttentionVarlenCase:
    """lengths_k: lengths_q where not given."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    padded = AttentionCase(name, len(lengths_q), h, max(lengths_q), max(lengths_k), d, **options)
    return AttentionVarlenCase(padded, lengths_q, lengths_k)


_RAGGED_Q, _RAGGED_K = (5, 0, 70, 33, 1, 64, 9), (9, 30, 90, 33, 200, 0, 4)

# Among the lengths are 0 and 1 on either side, more queries than keys, few queries on many keys (the split path), and
# both sides of the edges of blocks and vectors.
ATTENTION_VARLEN = [
    _varlen("one sequence", (77,)),
    _varlen("sixteen to seventeen tokens", (16, 17, 15, 16, 1)),
    _varlen("different lengths of keys", _RAGGED_Q, _RAGGED_K),
    _varlen("causal", (40, 7, 0, 113, 64), causal=True),
    _varlen("causal, different lengths of keys", _RAGGED_Q, _RAGGED_K, causal=True),
    _varlen("one query each, long caches", (1, 1, 1), (300, 1025, 7), h=4, h_kv=2),
    _varlen("more keys than one block", (300, 20, 270), (270, 600, 300), causal=True),
    _varlen("heads of 1", _RAGGED_Q, _RAGGED_K, d=1),
    _varlen("heads of 37, values of 19", _RAGGED_Q, _RAGGED_K, d=37, d_v=19),
    _varlen("heads of 40, values of 72", (50, 45), d=40, d_v=72, causal=True),
    _varlen("heads of 256", (30, 66), d=256),
    _varlen("two key heads for six", _RAGGED_Q, _RAGGED_K, h=6, h_kv=2, d=32, causal=True),
    _varlen("window", (90, 17, 60), (60, 40, 90), window=(10, 3), d=32),
    _varlen("softcap, negative scale", (40, 70), softcap=2.0, scale=-0.3),
    _varlen("mask per key", (60, 30), (70, 41), mask="k"),
    _varlen("mask per sequence and query", (60, 30), (70, 41), mask="bq"),
    _varlen("mask of every axis", _RAGGED_Q, _RAGGED_K, mask="bhqk"),
    _varlen("bias of every axis that hides", (60, 30, 8), (70, 41, 8), bias="bhqk", bias_hides=True),
    _varlen("bias per head", (60, 5, 130), (50, 300, 220), h=3, bias="hqk"),
    _varlen("bias per sequence and key", (60, 30, 0), (70, 41, 9), bias="bk"),
    _varlen("bias per query", (60, 30), (70, 41), bias="q"),
    _varlen("bias of one element", (20, 12), bias=""),
    _varlen("alibi, causal", _RAGGED_Q, _RAGGED_K, h=4, alibi="h", causal=True),
    _varlen("alibi per sequence", (70, 31), (80, 80), h=4, alibi="bh"),
    _varlen("sink, rows that see no key", _RAGGED_Q, _RAGGED_K, h=4, sink=True, causal=True),
    _varlen("lengths", (60, 30, 7, 20), (70, 41, 7, 30), kv_lengths=(33, 70, 0, 1)),
    _varlen("dropout", (60, 31, 1), (70, 41, 9), dropout_p=0.2),
    _varlen(
        "everything at once",
        (70, 0, 33, 2, 64),
        (90, 20, 45, 301, 30),
        h=4,
        d=48,
        h_kv=2,
        d_v=40,
        causal=True,
        window=(50, -1),
        scale=0.2,
        softcap=5.0,
        mask="bqk",
        bias="hqk",
        bias_hides=True,
        alibi="bh",
        sink=True,
        kv_lengths=(80, 20, 12, 300, 301),
        dropout_p=0.1,
    ),
    _varlen(
        "everything at once, float32 options",
        (65, 20, 5),
        h=4,
        h_kv=1,
        window=(20, 40),
        softcap=8.0,
        mask="k",
        bias="bhk",
        alibi="h",
        sink=True,
        float32_options=True,
        kv_lengths=(65, 19, 3),
    ),
]

# A batch of BERT with a mean length of 0.56 of the longest, and GPT's documents in one pass.
ATTENTION_VARLEN_BENCHMARKS = {
    "bert": [_varlen("b8-s16..128-h12-d64-full", tuple(range(16, 129, 16)), h=12)],
    "gpt": [_varlen("b6-s100..2048-h12-d64-causal", (100, 2048, 250, 1500, 400, 900), h=12, causal=True)],
}
