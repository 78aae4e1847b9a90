from .api import attention_decode

__all__ = ["attention_decode"]
