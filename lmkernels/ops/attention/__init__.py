from .api import attention, attention_weights, scaled_dot_product_attention

__all__ = ["attention", "attention_weights", "scaled_dot_product_attention"]
