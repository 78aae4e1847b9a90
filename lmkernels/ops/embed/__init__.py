from .api import embed

__all__ = ["embed"]
