"""Speculative decoding: cheap guesses, several of which the model checks in one pass (Leviathan et al. 2023).

Greedy search gives the tokens it gives without guesses, to the bit where steps are fused; sampling draws from the same
distribution.
"""

from collections.abc import Callable

import torch

from .decoder import Decoder
from .plan import Plan, process
from .search import next_tokens
from .stopping import EndToken

# proposes tokens (n,) that may follow ids (1, length), with the distributions (n, vocab) they were drawn from, or None
# where they were not drawn
Proposer = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor | None]]


class PromptLookup:
    """Guesses that the text goes on as it did where its last tokens occurred before (Saxena 2023)."""

    def __init__(self, settings):
        self.most, self.ngram = settings.prompt_lookup_num_tokens, settings.max_matching_ngram_size

    def __call__(self, ids: torch.Tensor, room: int):
        """At most `room` tokens that followed the first occurrence of the longest of the row's ends."""
        row = ids[0]
        for size in range(min(self.ngram, row.numel() - 1), 0, -1):
            ends_so = (row[:-1].unfold(0, size, 1) == row[-size:]).all(-1).nonzero()
            if ends_so.numel() > 0:
                start = int(ends_so[0]) + size
                return row[start : start + min(self.most, room)], None
        return row[:0], None

    def accepted(self, count: int, proposed: int) -> None:
        """Nothing to learn."""


class Draft:
    """Guesses what a smaller model would write, up to a token that it is not sure of.

    The number of guesses grows by 2 when all are accepted and falls by 1 otherwise, unless it is to be constant.
    """

    def __init__(self, plan: Plan, model):
        s = plan.settings
        self.plan, self.decoder = plan, Decoder(model, plan.mask, plan.total)
        self.processors = plan.processors(plan.padding)
        self.most, self.adapts = s.num_assistant_tokens, s.num_assistant_tokens_schedule != "constant"
        self.sure = s.assistant_confidence_threshold

    def __call__(self, ids: torch.Tensor, room: int):
        start, distributions = ids.shape[1], []
        row = torch.zeros(1, dtype=torch.long, device=ids.device)
        # tokens that the model did not accept may be in the cache
        self.decoder.crop(start - 1)
        for _ in range(min(self.most, room)):
            logits = self.plan.logits_of(self.decoder, ids)[:, -1]
            scores = process(self.processors, ids, logits)
            token = next_tokens(self.plan, scores, row, 1)
            distributions.append(scores.softmax(-1)[0])
            ids = torch.cat([ids, token[:, None]], 1)
            if distributions[-1][token] < self.sure or int(token) in self.plan.ends:
                break
        drawn = torch.stack(distributions) if self.plan.settings.do_sample and distributions else None
        return ids[0, start:], drawn

    def accepted(self, count: int, proposed: int) -> None:
        """Told after each pass how many of the proposed tokens were right."""
        if self.adapts:
            self.most = self.most + 2 if count == proposed else max(1, self.most - 1)


def speculate(plan: Plan, decoder: Decoder, proposer):
    """Continues one prompt."""
    ids, processors = plan.ids, plan.processors(plan.padding)
    shown = plan.scores is not None or plan.all_logits is not None
    is_plain = not (processors or plan.settings.do_sample or shown)
    is_plain = is_plain and all(isinstance(criterion, EndToken) for criterion in plan.criteria)
    guess, drawn = ids[0, :0], None  # a pass over a prompt and more would give the prompt other bits
    while True:
        n = guess.numel()
        candidate = torch.cat([ids, guess[None]], 1)
        logits = plan.logits_of(decoder, candidate, n + 1)[0]  # (n + 1, vocab)
        if is_plain:
            new, finished = likeliest(plan, logits, guess)
        else:
            new, finished = chosen(plan, processors, candidate, logits, guess, drawn)
        ids = torch.cat([ids, new[None]], 1)
        plan.put(new[None])
        if finished or ids.shape[1] == plan.total:
            return plan.result(ids)
        if n > 0:
            proposer.accepted(new.numel() - 1, n)
        decoder.crop(ids.shape[1] - 1)
        # the model adds a token of its own to those that are right
        guess, drawn = proposer(ids, plan.total - ids.shape[1] - 1)


def chosen(plan: Plan, processors, candidate, logits, guess, drawn) -> tuple[torch.Tensor, bool]:
    """The new tokens (k,), up to the first that was not guessed or that ends the text, and whether it does.

    candidate: (1, length + n) the text with the guess (n,); logits: (n + 1, vocab)
    """
    n, new = guess.numel(), []
    ids = candidate[:, : candidate.shape[1] - n]
    while True:
        i = len(new)
        scores = process(processors, ids, logits[i : i + 1])  # (1, vocab)
        plan.record(scores, logits[i : i + 1])
        new.append(judge(plan, scores, guess[i : i + 1], None if drawn is None else drawn[i : i + 1]))
        ids = torch.cat([ids, new[-1][:, None]], 1)
        finished = bool(plan.finished(ids).all())
        if finished or ids.shape[1] == plan.total or i == n or bool(new[-1] != guess[i]):
            return torch.cat(new), finished


def likeliest(plan: Plan, logits, guess) -> tuple[torch.Tensor, bool]:
    """What `chosen` gives in greedy search without processors, where nothing but a token ends the text."""
    new = logits.max(-1).indices
    tokens, guessed, i = new.tolist(), guess.tolist(), 0
    while i < len(guessed) and tokens[i] == guessed[i] and tokens[i] not in plan.ends:
        i += 1
    return new[: i + 1], tokens[i] in plan.ends


def judge(plan: Plan, scores, guess, drawn) -> torch.Tensor:
    """The token (1,) at one place: the guess where it stands, else another, else (no guess left) the model's own.

    scores: (1, vocab); guess: (1,) or (0,); drawn: (1, vocab) the distribution of the guess, None = it is certain
    A guess x of probability q(x) is kept with probability min(1, p(x) / q(x)); in its stead the rest, max(0, p - q),
    is drawn from, so that the token comes from p. A guess that was not drawn has q(x) = 1.
    """
    if not plan.settings.do_sample or guess.numel() == 0:
        row = torch.zeros(1, dtype=torch.long, device=scores.device)
        return next_tokens(plan, scores, row, 1)
    p = scores.softmax(-1)
    q = torch.zeros_like(p).index_fill(1, guess, 1.0) if drawn is None else drawn
    chance = torch.rand(1, generator=plan.generator, device=p.device)
    if chance * q[:, guess[0]] <= p[:, guess[0]]:
        return guess
    rest = (p - q).clamp(min=0)
    return torch.multinomial(rest, 1, generator=plan.generator)[0]
