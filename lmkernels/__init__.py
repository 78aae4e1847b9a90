"""Fast GPT- and BERT-class models in plain PyTorch: fused ops for the CPU and the GPU, and a thin model package."""

from ._library import backends
from .ops.attention import attention, attention_weights, scaled_dot_product_attention
from .ops.linear import linear

__version__ = "0.1.0"

__all__ = ["attention", "attention_weights", "backends", "linear", "scaled_dot_product_attention"]
