from .api import attention, attention_weights, scaled_dot_product_attention
from .capture import capture_attention

__all__ = ["attention", "attention_weights", "capture_attention", "scaled_dot_product_attention"]
