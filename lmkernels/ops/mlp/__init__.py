from .api import mlp, swiglu_mlp

__all__ = ["mlp", "swiglu_mlp"]
