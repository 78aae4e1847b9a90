"""From logits to the next tokens, step for step as Hugging Face's generate does it."""

import numbers

import torch

NO = float("-inf")


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises for values that leave no distribution to draw from."""
    if not isinstance(temperature, numbers.Real) or not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature must be a positive number, got {temperature!r} (do_sample=False is greedy decoding)"
        )
    if top_k is not None and (not isinstance(top_k, int) or top_k < 0):
        raise ValueError(f"top_k must be a whole number, 0 or None for no limit, got {top_k!r}")
    if top_p is not None and (not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1):
        raise ValueError(f"top_p must lie in (0, 1], got {top_p!r}")


def filter_logits(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Temperature, then top-k, then top-p (Holtzman et al. 2020), in Hugging Face's order.

    logits: (b, vocab) float32. Returns (b, vocab) with -inf for the tokens that are out.
    """
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (b, 1)
        logits = logits.masked_fill(logits < kth, NO)
    if top_p is not None and top_p < 1:
        ascending, order = logits.sort()
        out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        # the most likely token always stays
        out[:, -1] = False
        logits = logits.masked_fill(out.scatter(1, order, out), NO)
    return logits


def sample(logits, temperature, top_k, top_p, generator: torch.Generator | None) -> torch.Tensor:
    """Draws one token per row: logits (b, vocab) float32 to (b,).

    One multinomial of (b, vocab) probabilities, so a seed gives the tokens that Hugging Face draws with it.
    """
    probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
