from .api import qkv_projection

__all__ = ["qkv_projection"]
