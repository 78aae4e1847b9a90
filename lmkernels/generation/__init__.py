"""Generation: the KV cache, sampling, and the loop behind `GPT2LMHeadModel.generate`."""

from .cache import KVCache
from .engine import Engine, QueueFull, Request
from .loop import generate
from .outputs import GenerateOutput
from .streaming import TextStreamer

__all__ = ["Engine", "GenerateOutput", "KVCache", "QueueFull", "Request", "TextStreamer", "generate"]
