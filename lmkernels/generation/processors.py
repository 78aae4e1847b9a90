"""From the model's logits to the scores that tokens are chosen by, in Hugging Face's order.

Each function takes ids (rows, length), the prompt with the new tokens, and scores (rows, vocab) float32, and returns
new scores; -inf is for tokens that are out. `at_least` tokens stay in whatever a filter says.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

NO = float("-inf")
FEW = 512
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def repetition_penalty(ids, scores, penalty: float, padding: torch.Tensor):
    """Divides positive scores of tokens that have occurred, multiplies negative ones (Keskar et al. 2019).

    padding: (rows,)  the first places of a row, which do not count
    """
    vocab = scores.shape[-1]
    counts = torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]  # (rows, length)
    ids = torch.where(counts, ids, vocab)
    # what does not count goes into a column more
    scores = F.pad(scores, (0, 1))
    seen = scores.gather(1, ids)  # (rows, length)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))[:, :vocab]


def presence_and_frequency_penalty(ids, scores, presence: float, frequency: float, prompt: int):
    """Subtracts `presence` from the tokens that have been generated, and `frequency` for each time (OpenAI's API)."""
    new = ids[:, prompt:]
    times = torch.zeros_like(scores).scatter_add(1, new, torch.ones_like(new, dtype=scores.dtype))  # (rows, vocab)
    return scores - presence * (times > 0) - frequency * times


def no_repeat_ngram(ids, scores, size: int):
    """Bars the tokens that would repeat a run of `size` tokens."""
    if ids.shape[1] < size:
        return scores
    vocab = scores.shape[-1]
    runs = ids.unfold(1, size, 1)  # (rows, length - size + 1, size)
    repeats = (runs[..., :-1] == ids[:, None, ids.shape[1] + 1 - size :]).all(-1)
    barred = torch.where(repeats, runs[..., -1], vocab)
    out = scores.new_zeros(scores.shape[0], vocab + 1, dtype=torch.bool).scatter(1, barred, True)
    return scores.masked_fill(out[:, :vocab], NO)


def sequence_bias(ids, scores, biases: dict[tuple[int, ...], float]):
    """Adds a bias to the last token of each sequence whose other tokens end the row."""
    bias = torch.zeros_like(scores)
    for (*start, last), value in biases.items():
        if len(start) <= ids.shape[1]:
            ends_so = (ids[:, ids.shape[1] - len(start) :] == ids.new_tensor(start)).all(-1)  # (rows,)
            bias[:, last] += torch.where(ends_so, value, 0.0)
    return scores + bias


def bar_until(ids, scores, tokens: torch.Tensor, length: int):
    """Bars tokens while the rows are shorter than `length`."""
    return scores.index_fill(1, tokens, NO) if ids.shape[1] < length else scores


def bar_at(ids, scores, tokens: torch.Tensor, length: int):
    """Bars tokens while the rows have exactly `length` tokens."""
    return scores.index_fill(1, tokens, NO) if ids.shape[1] == length else scores


def bar(ids, scores, tokens: torch.Tensor):
    return scores.index_fill(1, tokens, NO)


def force_at(ids, scores, tokens: torch.Tensor, length: int):
    """Leaves nothing but `tokens` while the rows have exactly `length` tokens."""
    return torch.full_like(scores, NO).index_fill(1, tokens, 0.0) if ids.shape[1] == length else scores


def allow_by_prefix(ids, scores, allowed: Callable[[int, torch.Tensor], list[int]], rows_per_prompt: int):
    """Leaves the tokens that allowed(prompt number, row) lists."""
    mask = torch.full_like(scores, NO)
    for row, tokens in enumerate(ids):
        choice = allowed(row // rows_per_prompt, tokens)
        if len(choice) == 0:
            raise ValueError(
                f"prefix_allowed_tokens_fn must allow a token or more, got none for prompt {row // rows_per_prompt}"
            )
        mask[row, choice] = 0
    left = scores + mask
    # where all rows of a prompt have lost what is allowed, the allowed tokens come back
    none = left.amax(-1).isneginf().view(-1, rows_per_prompt).all(-1).repeat_interleave(rows_per_prompt)
    return torch.where(none[:, None], mask, left)


def remove_invalid(ids, scores):
    limits = torch.finfo(scores.dtype)
    return scores.nan_to_num(nan=0.0, posinf=limits.max, neginf=limits.min)


def decay_length(ids, scores, start: int, factor: float, ends: torch.Tensor):
    """Raises the end tokens' scores exponentially once the rows are longer than `start`."""
    if ids.shape[1] <= start:
        return scores
    gain = scores[:, ends].abs() * (factor ** (ids.shape[1] - start) - 1)
    return scores.index_add(1, ends, gain.where(scores[:, ends].isfinite(), 0.0))


def temperature(ids, scores, value: float):
    return scores / value


def top_k(ids, scores, k: int, at_least: int = 1):
    kth = scores.topk(min(max(k, at_least), scores.shape[-1])).values[:, -1:]  # (rows, 1)
    return torch.where(scores < kth, NO, scores)


def top_p(ids, scores, p: float, at_least: int = 1):
    """The smallest set of tokens whose probabilities reach p (Holtzman et al. 2020)."""
    order, reached = _first(scores, -scores, p)  # (rows, many) each
    kept = torch.arange(order.shape[1], device=order.device) <= (reached < p).sum(1, keepdim=True)
    kept[:, :at_least] = True
    best = torch.where(kept, scores.gather(1, order), NO)
    return torch.full_like(scores, NO).scatter(1, order, best)


def min_p(ids, scores, p: float, at_least: int = 1):
    """Tokens at least p times as probable as the likeliest (Nguyen et al. 2024)."""
    probabilities = scores.softmax(-1)
    out = probabilities < p * probabilities.amax(-1, keepdim=True)
    best = probabilities.topk(min(at_least, probabilities.shape[-1])).indices
    return scores.masked_fill(out.scatter(1, best, False), NO)


def typical_p(ids, scores, p: float, at_least: int = 1):
    """The tokens whose surprise is nearest to the entropy, up to probability p (Meister et al. 2022)."""
    log_p = scores.log_softmax(-1)
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
    rank = (-log_p - entropy).abs()  # (rows, vocab)
    order, reached = _first(scores, rank, p)
    last = (reached < p).sum(1, keepdim=True).clamp(at_least - 1, order.shape[1] - 1)  # (rows, 1)
    return torch.where(rank > rank.gather(1, order.gather(1, last)), NO, scores)


def _first(scores, rank, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of the smallest ranks, enough to reach probability p: which, and the probability up to each."""
    log_sum = scores.logsumexp(-1, keepdim=True)
    # a few of a large vocabulary nearly always do, and are found sooner than all are sorted
    for many in (min(FEW, scores.shape[-1]), scores.shape[-1]):
        order = rank.topk(many, largest=False).indices  # (rows, many)
        reached = (scores.gather(1, order) - log_sum).exp().cumsum(-1)
        if bool((reached[:, -1] >= p).all()):
            break
    return order, reached


def epsilon_cutoff(ids, scores, epsilon: float, at_least: int = 1):
    """Tokens of probability epsilon or more (Hewitt et al. 2022)."""
    return _cut(scores, scores.softmax(-1) < epsilon, at_least)


def eta_cutoff(ids, scores, eta: float, at_least: int = 1):
    """Like epsilon_cutoff, with a threshold that falls as the entropy grows (Hewitt et al. 2022)."""
    limit = torch.tensor(eta, device=scores.device)
    entropy = torch.distributions.Categorical(logits=scores).entropy()  # (rows,)
    threshold = torch.min(limit, limit.sqrt() * (-entropy).exp())
    return _cut(scores, scores.softmax(-1) < threshold[:, None], at_least)


def _cut(scores, out, at_least):
    kth = scores.topk(min(at_least, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(out & (scores < kth), NO)


def normalize(ids, scores):
    return scores.log_softmax(-1)


def processors_for(
    s, ends: list[int], prompt: int, total: int, vocab: int, padding, custom, allowed
) -> list[Processor]:
    """The processors that settings `s` ask for, in order.

    padding: (rows,)  places before each row's first token
    custom            the caller's processors; allowed: the caller's prefix_allowed_tokens_fn
    """

    def tokens(choice) -> torch.Tensor:
        return torch.tensor(sorted({t for t in choice if 0 <= t < vocab}), dtype=torch.long, device=padding.device)

    steps: list[Processor] = []
    if s.sequence_bias is not None:
        steps.append(partial(sequence_bias, biases=s.sequence_bias))
    if s.repetition_penalty != 1:
        steps.append(partial(repetition_penalty, penalty=s.repetition_penalty, padding=padding))
    if s.presence_penalty or s.frequency_penalty:
        penalties = {"presence": s.presence_penalty, "frequency": s.frequency_penalty}
        steps.append(partial(presence_and_frequency_penalty, **penalties, prompt=prompt))
    if s.no_repeat_ngram_size:
        steps.append(partial(no_repeat_ngram, size=s.no_repeat_ngram_size))
    if s.bad_words_ids is not None:
        words = [tuple(word) for word in s.bad_words_ids if len(word) > 1 or word[0] not in ends]
        steps.append(partial(sequence_bias, biases=dict.fromkeys(words, NO)))
    shortest = s.min_length if s.min_new_tokens is None else prompt + s.min_new_tokens
    if shortest and ends:
        steps.append(partial(bar_until, tokens=tokens(ends), length=shortest))
    if allowed is not None:
        rows_per_prompt = max(s.num_beams, s.num_return_sequences)
        steps.append(partial(allow_by_prefix, allowed=allowed, rows_per_prompt=rows_per_prompt))
    if s.forced_bos_token_id is not None:
        steps.append(partial(force_at, tokens=tokens([s.forced_bos_token_id]), length=1))
    if s.forced_eos_token_id is not None:
        steps.append(partial(force_at, tokens=tokens(s.forced_eos_token_id), length=total - 1))
    if s.remove_invalid_values:
        steps.append(remove_invalid)
    if s.exponential_decay_length_penalty is not None:
        start, factor = s.exponential_decay_length_penalty
        steps.append(partial(decay_length, start=start + prompt, factor=factor, ends=tokens(ends)))
    if s.suppress_tokens is not None:
        steps.append(partial(bar, tokens=tokens(s.suppress_tokens)))
    if s.begin_suppress_tokens is not None:
        begin = prompt if prompt > 1 or s.forced_bos_token_id is None else prompt + 1
        steps.append(partial(bar_at, tokens=tokens(s.begin_suppress_tokens), length=begin))
    steps += custom
    if s.do_sample:
        steps += filters_for(s, 1 if s.num_beams == 1 else max(2, len(ends) + 1))
    if s.renormalize_logits:
        steps.append(normalize)
    return steps


def filters_for(s, at_least: int) -> list[Processor]:
    """What narrows the distribution that is drawn from."""
    steps: list[Processor] = []
    if s.temperature != 1:
        steps.append(partial(temperature, value=s.temperature))
    if s.top_k:
        steps.append(partial(top_k, k=s.top_k, at_least=at_least))
    if s.top_p < 1:
        steps.append(partial(top_p, p=s.top_p, at_least=at_least))
    if s.min_p is not None:
        steps.append(partial(min_p, p=s.min_p, at_least=at_least))
    if s.typical_p < 1:
        steps.append(partial(typical_p, p=s.typical_p, at_least=at_least))
    if s.epsilon_cutoff:
        steps.append(partial(epsilon_cutoff, epsilon=s.epsilon_cutoff, at_least=at_least))
    if s.eta_cutoff:
        steps.append(partial(eta_cutoff, eta=s.eta_cutoff, at_least=at_least))
    return steps
