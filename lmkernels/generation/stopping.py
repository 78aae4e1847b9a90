"""When a row is finished. A criterion takes (ids, scores) and gives one bool per row, as Hugging Face's do.

ids: (rows, length)  prompt and new tokens; scores: tuple of (rows, vocab), or None unless output_scores is set.
"""

import os.path
import time
from collections.abc import Callable, Sequence

import torch


class EndToken:
    """The newest token is one of `ends`."""

    def __init__(self, ends: list[int], device: torch.device):
        self.ends = torch.tensor(ends, device=device)

    def __call__(self, ids, scores=None) -> torch.Tensor:
        return torch.isin(ids[:, -1], self.ends)


class MaxTime:
    """`seconds` have passed since this was made."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def __call__(self, ids, scores=None) -> bool:
        return time.monotonic() > self.end


class StopStrings:
    """One of the strings ends within the newest token. The string may begin in the prompt.

    tokenizer: Hugging Face's, or one of the package tokenizers
    """

    def __init__(self, strings: str | Sequence[str], tokenizer):
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        if not self.strings or not all(isinstance(string, str) and string for string in self.strings):
            raise ValueError(f"stop_strings must be a text or a list of texts that are not empty, got {strings!r}")
        self.tokenizer = tokenizer
        # a token holds a byte or more; those of a character before the string may be incomplete
        self.tokens = max(len(string.encode()) for string in self.strings) + 4

    def __call__(self, ids, scores=None) -> torch.Tensor:
        found = [self._found(row) for row in ids[:, -self.tokens :].tolist()]
        return torch.tensor(found, device=ids.device)

    def _found(self, tokens: list[int]) -> bool:
        before = self.tokenizer.decode(tokens[:-1], skip_special_tokens=False)
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        old = len(os.path.commonprefix([before, text]))
        return any((start := text.rfind(string)) >= 0 and start + len(string) > old for string in self.strings)


def any_of(criteria: list[Callable], ids: torch.Tensor, scores) -> torch.Tensor:
    """The rows that one of the criteria ends, (rows,) bool. A criterion may answer for all rows with one bool."""
    hit = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for criterion in criteria:
        hit |= torch.as_tensor(criterion(ids, scores), dtype=torch.bool, device=ids.device)
    return hit
