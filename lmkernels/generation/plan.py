"""One call of `generate`, checked and ready to run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .config import Settings
from .decoder import Decoder
from .outputs import GenerateOutput
from .processors import Processor, processors_for
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
    all_logits: tuple | None = field(init=False)

    def __post_init__(self):
        s = self.settings
        self.scores = () if s.return_dict_in_generate and s.output_scores else None
        self.all_logits = () if s.return_dict_in_generate and s.output_logits else None

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

    def logits_of(self, decoder: Decoder, ids: torch.Tensor, count: int = 1) -> torch.Tensor:
        """The decoder's logits (rows, count, vocab). Raises FloatingPointError if they are not finite."""
        logits = decoder.logits(ids, count)
        self.check(logits)
        return logits

    def check(self, logits: torch.Tensor) -> None:
        """Raises FloatingPointError if logits (rows, count, vocab) are not finite."""
        # one pass over memory: a sum has NaN or infinity when a term has
        if not self.settings.remove_invalid_values and not logits.sum().isfinite():
            row = int((~logits.isfinite()).flatten(1).any(1).nonzero()[0])
            raise FloatingPointError(
                f"the model's logits hold NaN or infinity in row {row}: its weights are broken, or too large for its "
                "dtype (float16 ends at 65504; bfloat16 and float32 reach further)"
            )

    def record(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Keeps the scores (rows, vocab) and logits of one step if the caller wants them."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.all_logits is not None:
            self.all_logits += (logits,)

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
        return GenerateOutput(sequences=sequences, scores=self.scores, logits=self.all_logits, **more)


def process(processors: list[Processor], ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def refuse() -> None:
    """Raises for scores of which the caller has found that they leave nothing to choose."""
    raise ValueError("the logits processors leave no token to choose: all scores of a row are -inf, or one is NaN")
