from .api import RelativeBias, relative_bias

__all__ = ["RelativeBias", "relative_bias"]
