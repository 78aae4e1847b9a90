"""Beam search, decision for decision as Hugging Face's, and beam sampling."""

from dataclasses import dataclass

import torch

from .decoder import Decoder
from .plan import Plan, process, refuse
from .processors import NO

# what puts a score behind all others; Hugging Face's value, since it takes part in the rounding
BEHIND = -1e9


@dataclass
class Beams:
    """Sequences of every prompt, best first.

    tokens: (b, n, total); scores: (b, n) sums of log probabilities, of finished ones with the length penalty
    origins: (b, n, new tokens) int32, the row of the step's scores that each token was chosen from, -1 = none yet
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    origins: torch.Tensor

    def take(self, index: torch.Tensor) -> "Beams":
        """index: (b, m), which sequences of each prompt"""
        return Beams(taken(self.tokens, index), taken(self.scores, index), taken(self.origins, index))

    def of(self, prompts: torch.Tensor) -> "Beams":
        return Beams(self.tokens[prompts], self.scores[prompts], self.origins[prompts])

    def followed_by(self, other: "Beams") -> "Beams":
        pairs = ((self.tokens, other.tokens), (self.scores, other.scores), (self.origins, other.origins))
        return Beams(*(torch.cat(pair, 1) for pair in pairs))


def taken(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tensor[i, index[i]] for every i"""
    return tensor[torch.arange(index.shape[0], device=index.device)[:, None], index]


def beam_search(plan: Plan, decoder: Decoder):
    """Continues each prompt by the `num_return_sequences` best of `num_beams` beams.

    A prompt is read once for all its beams, and its part of the cache never moves. A prompt whose beams cannot
    improve any more is computed no more.
    """
    s, prompt, total = plan.settings, plan.prompt, plan.total
    n, b, device = s.num_beams, plan.ids.shape[0], plan.ids.device
    # enough that n go on though every beam may end with each of the end tokens
    kept = max(2, 1 + len(plan.ends)) * n
    # a pad token 0 counts as none, as in Hugging Face's beam search
    fill = (plan.pad or plan.ends[0]) if plan.ends else -1
    tokens = plan.ids.new_full((b, n, total), fill)
    tokens[:, :, :prompt] = plan.ids[:, None]
    origins = torch.full((b, n, total - prompt), -1, dtype=torch.int32, device=device)
    # all beams are the same at first: only one of them counts
    scores = torch.full((b, n), BEHIND, device=device)
    closed = Beams(tokens, scores, origins)
    running = Beams(tokens, scores.clone(), origins)
    running.scores[:, 0] = 0
    done = torch.zeros(b, n, dtype=torch.bool, device=device)  # the places of `closed` that are taken
    improvable = torch.ones(b, 1, dtype=torch.bool, device=device)
    results = closed
    # what follows is about the prompts that still run, and `prompts` are their places in `results`
    prompts = torch.arange(b, device=device)
    logits = plan.logits_of(decoder, plan.ids)[:, -1].repeat_interleave(n, 0)
    decoder.repeat(n)
    processors = plan.processors(plan.padding.repeat_interleave(n))

    for length in range(prompt, total):
        ids = running.tokens[:, :, :length].flatten(0, 1)  # (b n, length)
        log_p = process(processors, ids, logits.log_softmax(-1))
        plan.record(log_p, logits)
        sums = (log_p.view(b, n, -1) + running.scores[..., None]).flatten(1)  # (b, n vocab)
        best, index = candidates(plan, sums, kept)  # (b, kept) each
        beam, token = index // plan.vocab, index % plan.vocab
        found = running.take(beam)
        found.scores = best
        found.tokens[:, :, length] = token
        found.origins[:, :, length - prompt] = beam + prompts[:, None] * n

        hits = plan.finished(found.tokens[:, :, : length + 1].flatten(0, 1)).view(b, kept)
        if length + 1 == total:
            hits = torch.ones_like(hits)
        open_scores = found.scores + hits.float() * BEHIND
        going = open_scores.topk(n)[1]  # (b, n)
        running = found.take(going)
        running.scores = taken(open_scores, going)

        # of those that end here, the ones among the n best compete for a place in `closed`
        ending = hits.clone()
        ending[:, n:] = False
        frozen = done.all(-1, keepdim=True) & (s.early_stopping is True)  # (b, 1)
        value = found.scores / (length + 1 - prompt) ** s.length_penalty
        for barred in (frozen, ~improvable, ~ending):
            value = value + barred.float() * BEHIND
        found.scores = value
        closed, done = closed.followed_by(found), torch.cat([done, ending], 1)
        places = closed.scores.topk(n)[1]
        closed, done = closed.take(places), taken(done, places)

        improvable = improvable & can_improve(
            s, running.scores[:, :1], closed.scores, done, length + 1 - prompt, total - prompt
        )
        if not improvable.any() or (s.early_stopping is True and done.all()) or hits.all():
            break
        local = (taken(beam, going) + torch.arange(b, device=device)[:, None] * n).flatten()  # (b n,)
        decoder.reorder(local, start=prompt)
        over = ~improvable[:, 0] | (done.all(-1) & (s.early_stopping is True))
        if plan.private and not s.do_sample and over.any():
            results = merged(results, closed, prompts)
            left = (~over).nonzero().squeeze(1)
            closed, running, done, improvable = closed.of(left), running.of(left), done[left], improvable[left]
            prompts, b = prompts[left], left.numel()
            rows = (left[:, None] * n + torch.arange(n, device=device)).flatten()
            decoder.reorder(rows)
            processors = plan.processors(plan.padding[prompts].repeat_interleave(n))
        logits = plan.logits_of(decoder, running.tokens[:, :, : length + 1].flatten(0, 1))[:, -1]

    results = merged(results, closed, prompts)
    best = slice(0, s.num_return_sequences)
    origins = results.origins[:, best].flatten(0, 1)
    new = int((origins >= 0).sum(1).max())
    return plan.result(
        results.tokens[:, best, : prompt + new].flatten(0, 1),
        sequences_scores=results.scores[:, best].flatten() if s.output_scores else None,
        beam_indices=origins[:, :new],
    )


def candidates(plan: Plan, sums: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `kept` best of the sums (b, n vocab), or a draw without replacement, best first: values and places."""
    if not plan.settings.do_sample:
        best, index = sums.topk(kept)
        if not (best[:, 0] > NO).all():
            refuse()
        return best, index
    probabilities = sums.softmax(-1)
    if probabilities[:, 0].isnan().any():
        refuse()
    index = torch.multinomial(probabilities, kept, generator=plan.generator)
    best, order = sums.gather(1, index).sort(descending=True)
    return best, index.gather(1, order)


def can_improve(s, best, scores, done, new: int, most: int) -> torch.Tensor:
    """Whether a running beam may still beat the worst finished one: (b, 1) bool.

    best: (b, 1) of the running beams, which have `new` tokens of `most`; scores, done: (b, n) of the finished ones
    """
    length = most if s.early_stopping == "never" and s.length_penalty > 0 else new
    worst = torch.where(done, scores.amin(1, keepdim=True), BEHIND)  # (b, n)
    return (best / length**s.length_penalty > worst).any(1, keepdim=True)


def merged(results: Beams, closed: Beams, prompts: torch.Tensor) -> Beams:
    """`results` with those of some prompts replaced."""
    pairs = ((results.tokens, closed.tokens), (results.scores, closed.scores), (results.origins, closed.origins))
    return Beams(*(whole.index_copy(0, prompts, part) for whole, part in pairs))
