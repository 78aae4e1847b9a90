"""Text as it is written."""

import sys
from typing import TextIO

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStreamer:
    """Prints the text of one sequence while `generate` writes it; bytes of half a character wait for the rest.

    skip_prompt: print only what is new.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_prompt: bool = True, file: TextIO | None = None):
        self.tokenizer, self.skip_prompt, self.file = tokenizer, skip_prompt, file or sys.stdout
        self.stream = DecodeStream(skip_special_tokens=True)
        self.in_prompt = True

    def put(self, tokens: torch.Tensor) -> None:
        """tokens: (1, s), the prompt, in the first call and (1,) after it."""
        if self.in_prompt and tokens.shape[0] != 1:
            raise ValueError(f"streamer must get one prompt at a time, got {tokens.shape[0]}")
        for token in tokens.flatten().tolist():
            text = self.stream.step(self.tokenizer, token)
            if text and not (self.in_prompt and self.skip_prompt):
                print(text, end="", file=self.file, flush=True)
        self.in_prompt = False

    def end(self) -> None:
        print(file=self.file, flush=True)
        self.stream = DecodeStream(skip_special_tokens=True)
        self.in_prompt = True
