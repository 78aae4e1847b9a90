"""The one list of shapes and feature sets that tests and benchmarks run through."""

from .attention import ATTENTION, ATTENTION_BENCHMARKS, AttentionCase, AttentionInputs
from .attention_decode import DECODE, DECODE_BENCHMARKS, DECODE_LONG, DecodeCase
from .attention_varlen import ATTENTION_VARLEN, ATTENTION_VARLEN_BENCHMARKS, AttentionVarlenCase, cu_seqlens, pack
from .decode_step import DECODE_STEP, StepCase
from .drawing import drawn_on_the_cpu, moved
from .linear import (
    LINEAR,
    LINEAR_BENCHMARKS,
    PREFILL_BENCHMARKS,
    QKV,
    SKINNY_BENCHMARKS,
    LinearCase,
    QKVCase,
    SkinnyCase,
)
from .linear_cross_entropy import LINEAR_CROSS_ENTROPY, LINEAR_CROSS_ENTROPY_BENCHMARKS, LossCase
from .norms import NORM, NORM_BENCHMARKS, SOFTMAX, SOFTMAX_BENCHMARKS, NormCase, SoftmaxCase
from .positions import (
    ADD_POSITIONS_BENCHMARKS,
    EMBED,
    EMBED_BENCHMARKS,
    ROTARY,
    ROTARY_BENCHMARKS,
    EmbedCase,
    RotaryCase,
)

__all__ = [
    "ADD_POSITIONS_BENCHMARKS",
    "ATTENTION",
    "ATTENTION_BENCHMARKS",
    "ATTENTION_VARLEN",
    "ATTENTION_VARLEN_BENCHMARKS",
    "AttentionCase",
    "AttentionInputs",
    "AttentionVarlenCase",
    "DECODE",
    "DECODE_BENCHMARKS",
    "DECODE_LONG",
    "DECODE_STEP",
    "DecodeCase",
    "EMBED",
    "EMBED_BENCHMARKS",
    "EmbedCase",
    "LINEAR",
    "LINEAR_BENCHMARKS",
    "LINEAR_CROSS_ENTROPY",
    "LINEAR_CROSS_ENTROPY_BENCHMARKS",
    "LinearCase",
    "LossCase",
    "NORM",
    "NORM_BENCHMARKS",
    "NormCase",
    "PREFILL_BENCHMARKS",
    "QKV",
    "QKVCase",
    "ROTARY",
    "ROTARY_BENCHMARKS",
    "RotaryCase",
    "SKINNY_BENCHMARKS",
    "SOFTMAX",
    "SOFTMAX_BENCHMARKS",
    "SkinnyCase",
    "SoftmaxCase",
    "StepCase",
    "cu_seqlens",
    "drawn_on_the_cpu",
    "moved",
    "pack",
]
