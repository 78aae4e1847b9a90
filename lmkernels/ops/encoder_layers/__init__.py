from .api import encoder_layers

__all__ = ["encoder_layers"]
