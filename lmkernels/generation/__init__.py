"""Generation: the KV cache, sampling, and the loop behind `GPT2LMHeadModel.generate`."""

from .cache import KVCache
from .loop import generate
from .streaming import TextStreamer

__all__ = ["KVCache", "TextStreamer", "generate"]
