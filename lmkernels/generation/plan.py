"""One call of `generate`, checked and ready to run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .config import Settings
from .outputs import GenerateOutput
from .processors import NO, Processor, processors_for
from .stopping import any_of


@dataclass
class Plan:
    """What every strategy works by.

    ids: (b, s)       prompts; mask: (b, s) bool, True = a token of the prompt
    total             tokens per row at most, padding and prompt included
    ends, pad         end tokens, and what follows them
    criteria          end a row, the end tokens among them; `custom` and `allowed` change scores
    private           nothing but this library looks at the rows, so that finished ones may be left out of them
    """

    settings: Settings
    ids: torch.Tensor
    mask: torch.Tensor
    total: int
    vocab: int
    ends: list[int]
    pad: int
    criteria: list[Callable]
    custom: list[Callable]
    allowed: Callable | None
    generator: torch.Generator | None
    streamer: object | None
    private: bool
    scores: tuple | None = field(init=False)
    logits: tuple | None = field(init=False)

    def __post_init__(self):
        s = self.settings
        self.scores = () if s.return_dict_in_generate and s.output_scores else None
        self.logits = () if s.return_dict_in_generate and s.output_logits else None

    @property
    def prompt(self) -> int:
        return self.ids.shape[1]

    @cached_property
    def padding(self) -> torch.Tensor:
        """(b,) places before each prompt's first token."""
        return self.mask.int().argmax(1)

    def processors(self, padding: torch.Tensor) -> list[Processor]:
        """padding: (rows,)  of the rows that will be given"""
        return processors_for(
            self.settings, self.ends, self.prompt, self.total, self.vocab, padding, self.custom, self.allowed
        )

    def record(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Keeps the scores (rows, vocab) and logits of one step if the caller wants them."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def finished(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows (rows,) bool that their newest token ends."""
        return any_of(self.criteria, ids, self.scores)

    def put(self, tokens: torch.Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())

    def result(self, sequences: torch.Tensor, **more) -> torch.Tensor | GenerateOutput:
        if self.streamer is not None:
            self.streamer.end()
        if not self.settings.return_dict_in_generate:
            return sequences
        return GenerateOutput(sequences=sequences, scores=self.scores, logits=self.logits, **more)


def process(processors: list[Processor], ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def refuse(scores: torch.Tensor, logits: torch.Tensor, infinite: bool = False) -> None:
    """Raises for rows (rows, vocab) that leave nothing to choose, which the caller has found.

    infinite: a logits processor may have raised a score to infinity
    """
    bad = ~logits.isfinite().all(-1)
    if bad.any():
        raise FloatingPointError(
            f"the model's logits hold NaN or infinity in row {int(bad.nonzero()[0])}: its weights are broken, or too "
            "large for its dtype (float16 ends at 65504; bfloat16 and float32 reach further)"
        )
    if not (infinite and (scores.amax(-1) > NO).all()):
        raise ValueError("the logits processors leave no token to choose: all scores of a row are -inf, or one is NaN")
