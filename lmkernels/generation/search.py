"""One token at a time: greedy search and sampling."""

from functools import cache

import torch

from .decoder import Decoder
from .plan import Plan, process, refuse
from .processors import FEW, NO


def search(plan: Plan, decoder: Decoder):
    """Continues each prompt `num_return_sequences` times. A prompt is read once; finished rows are computed no more."""
    samples, pad = plan.settings.num_return_sequences, plan.pad
    logits = plan.logits_of(decoder, plan.ids)[:, -1].repeat_interleave(samples, 0)
    decoder.repeat(samples)
    ids, padding = plan.ids.repeat_interleave(samples, 0), plan.padding.repeat_interleave(samples)
    sequences = ids.new_full((ids.shape[0], plan.total), pad)  # (all rows, total)
    sequences[:, : plan.prompt] = ids
    # what follows is about the rows that are still computed, and `rows` are their places in `sequences`
    rows = torch.arange(ids.shape[0], device=ids.device)
    finished = torch.zeros_like(rows, dtype=torch.bool)
    processors = plan.processors(padding)
    while True:
        scores = process(processors, ids, logits)
        plan.record(scores, logits)
        new = next_tokens(plan, scores, rows, sequences.shape[0])
        if plan.ends:
            new = new.masked_fill(finished, pad)
        length = ids.shape[1]
        sequences[rows, length] = new
        ids = torch.cat([ids, new[:, None]], 1)
        finished |= plan.finished(ids)
        plan.put(sequences[:, length])
        if length + 1 == plan.total or finished.all():
            return plan.result(sequences[:, : length + 1])
        if plan.private and plan.ends and finished.any():
            left = unfinished_in_front(finished)
            decoder.reorder(left)
            ids, rows, finished, padding = ids[left], rows[left], finished[left], padding[left]
            processors = plan.processors(padding)
        logits = plan.logits_of(decoder, ids)[:, -1]


def next_tokens(plan: Plan, scores: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens (rows,) that the scores (rows, vocab) choose; `rows` are numbers below `count`."""
    if not plan.settings.do_sample:
        best, new = scores.max(-1)
        if not (best > NO).all():
            refuse()
        return new
    probabilities = scores.softmax(-1)
    # NaN or infinity anywhere in a row, or -inf everywhere, makes all of it NaN
    if probabilities[:, 0].isnan().any():
        refuse()
    return draw(probabilities, rows, count, plan.generator)


def draw(probabilities: torch.Tensor, rows: torch.Tensor, count: int, generator) -> torch.Tensor:
    """One token per row: probabilities (rows, vocab) to (rows,).

    It is torch.multinomial's draw, the largest quotient of the probabilities and exponential noise, from a tensor of
    `count` rows of which these are left: a seed gives the tokens that Hugging Face draws with it, whether or not
    finished rows are left out.
    """
    shape = (count, probabilities.shape[1])
    if probabilities.device.type != "cpu" or not exponential_is_log_of_uniform():
        noise = probabilities.new_empty(shape).exponential_(generator=generator)[rows]
        return (probabilities / noise).argmax(-1)
    # the logarithms cost the most: they are taken where a token can be drawn
    uniform = torch.empty(shape, dtype=torch.float64).uniform_(generator=generator)
    possible = probabilities
    if int(possible.count_nonzero()) > FEW * rows.numel():
        # in float32 a quotient is at most 2.3 times too large, where the noise ends at 16.6 instead of 36.7
        rough = uniform[rows].float().clamp_(2**-60, 1 - 2**-24).neg_().log1p_().neg_()
        quotients = probabilities / rough
        possible = quotients >= quotients.amax(-1, keepdim=True) / 8
    row, token = possible.nonzero(as_tuple=True)
    noise = -torch.log1p(-uniform[rows[row], token])
    quotients = torch.zeros_like(probabilities)
    quotients[row, token] = probabilities[row, token] / noise.float()
    return quotients.argmax(-1)


@cache
def exponential_is_log_of_uniform() -> bool:
    """Whether this torch makes float32 exponential numbers on a CPU from float64 uniform ones, bit for bit."""
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    exponential = torch.empty(4096).exponential_(generator=one)
    uniform = torch.empty(4096, dtype=torch.float64).uniform_(generator=other)
    same_state = torch.equal(one.get_state(), other.get_state())
    return same_state and torch.equal(exponential, -torch.log1p(-uniform).float())


def unfinished_in_front(finished: torch.Tensor) -> torch.Tensor:
    """Which row each place takes when the unfinished rows close up: those beyond the last place fill the gaps."""
    count = int((~finished).sum())
    rows = torch.arange(count, device=finished.device)
    rows[finished[:count]] = count + (~finished[count:]).nonzero().squeeze(1)
    return rows
