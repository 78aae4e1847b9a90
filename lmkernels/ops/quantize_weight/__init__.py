from .api import QuantizedWeight, quantize_weight

__all__ = ["QuantizedWeight", "quantize_weight"]
