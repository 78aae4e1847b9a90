"""Fast GPT- and BERT-class models in plain PyTorch: fused ops for the CPU and the GPU, and a thin model package."""

from . import hf, nn
from ._library import backends
from .ops.attention import attention, attention_weights, capture_attention, scaled_dot_product_attention
from .ops.attention_decode import attention_decode
from .ops.attention_varlen import attention_varlen
from .ops.embed import embed
from .ops.linear import linear
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.mlp import mlp, swiglu_mlp
from .ops.norms import layer_norm, rms_norm
from .ops.output_projection import output_projection
from .ops.positions import add_positions, alibi_slopes, sinusoidal
from .ops.qkv_projection import qkv_projection
from .ops.quantize_weight import QuantizedWeight, quantize_weight
from .ops.relative_bias import RelativeBias, relative_bias
from .ops.rotary import rotary, rotary_tables
from .ops.softmax import softmax

__version__ = "0.1.0"

__all__ = [
    "QuantizedWeight",
    "RelativeBias",
    "add_positions",
    "alibi_slopes",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "backends",
    "capture_attention",
    "embed",
    "hf",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "nn",
    "output_projection",
    "qkv_projection",
    "quantize_weight",
    "relative_bias",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "scaled_dot_product_attention",
    "sinusoidal",
    "softmax",
    "swiglu_mlp",
]
