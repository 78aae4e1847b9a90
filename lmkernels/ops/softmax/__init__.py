from .api import softmax

__all__ = ["softmax"]
