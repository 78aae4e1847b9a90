"""GPT and BERT as plain modules with Hugging Face's parameter names."""

from .gpt2 import GPT2Config, GPT2LMHeadModel

__all__ = ["GPT2Config", "GPT2LMHeadModel"]
