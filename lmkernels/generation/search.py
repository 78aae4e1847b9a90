"""One token at a time: greedy search and sampling."""

import torch

from .decoder import Decoder
from .plan import Plan, process, refuse


def search(plan: Plan, decoder: Decoder):
    """Continues each prompt `num_return_sequences` times. A prompt is read once; finished rows are computed no more."""
    samples, pad = plan.settings.num_return_sequences, plan.pad
    logits = decoder.logits(plan.ids)[:, -1].repeat_interleave(samples, 0)
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
        new = next_tokens(plan, scores, logits, rows, sequences.shape[0])
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
        logits = decoder.logits(ids)[:, -1]


def next_tokens(plan: Plan, scores, logits, rows, count: int) -> torch.Tensor:
    """The tokens (rows,) that the scores (rows, vocab) choose; `rows` are numbers below `count`.

    A draw is torch.multinomial's, of a (count, vocab) tensor whatever rows are left, so that a seed gives the same
    tokens whether or not finished rows are left out, and those that Hugging Face draws with it.
    """
    if not plan.settings.do_sample:
        best, new = scores.max(-1)
        if not best.isfinite().all():
            refuse(scores, logits, infinite=True)
        return new
    probabilities = scores.softmax(-1)
    # NaN or infinity anywhere in a row, or -inf everywhere, makes all of it NaN
    if probabilities[:, 0].isnan().any():
        refuse(scores, logits)
    noise = scores.new_empty(count, scores.shape[-1]).exponential_(generator=plan.generator)
    return (probabilities / (noise if rows.numel() == count else noise[rows])).argmax(-1)


def unfinished_in_front(finished: torch.Tensor) -> torch.Tensor:
    """Which row each place takes when the unfinished rows close up: those beyond the last place fill the gaps."""
    count = int((~finished).sum())
    rows = torch.arange(count, device=finished.device)
    rows[finished[:count]] = count + (~finished[count:]).nonzero().squeeze(1)
    return rows
