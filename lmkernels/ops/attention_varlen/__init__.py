from .api import attention_varlen

__all__ = ["attention_varlen"]
