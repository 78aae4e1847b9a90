"""Writing tokens with a causal language model, with Hugging Face's arguments and defaults."""

from collections.abc import Sequence

import torch

from .cache import KVCache
from .sampling import check_sampling, sample


@torch.no_grad()
def generate(
    model,
    input_ids: torch.Tensor | Sequence[Sequence[int] | torch.Tensor],
    *,
    attention_mask: torch.Tensor | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float | None = 1.0,
    num_return_sequences: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    use_cache: bool = True,
    streamer=None,
) -> torch.Tensor:
    """Continues every prompt until its end token or the maximal length.

    input_ids: (b, s)       prompts, shorter ones padded on the left with attention_mask 0;
                            or a list of b prompts of any lengths, which are padded here
    attention_mask: (b, s)  0 = padding; default: pad_token_id marks the padding when it is no end token
    max_length              tokens with the prompt; default: the prompt and 20 more
    max_new_tokens          tokens without the prompt; wins over max_length
    do_sample               draw from the distribution; otherwise the most likely token is taken
    temperature, top_k, top_p  narrow the distribution, in this order; 1.0, 0 and 1.0 leave it alone
    num_return_sequences    samples per prompt, side by side in the result
    eos_token_id            one or several; default: the model's; an empty list: never end early
    pad_token_id            follows the end token in rows that are done; default: the model's, else the end token
    seed                    makes the draw repeatable by itself; without it torch.manual_seed rules
    streamer                its put(tokens) gets the prompts, then each step's tokens (b,); then end() is called
    Returns (b * num_return_sequences, length), prompts included.
    """
    ends = as_ends(model.config.eos_token_id if eos_token_id is None else eos_token_id)
    if pad_token_id is None:
        pad_token_id = model.config.pad_token_id
    ids, mask = as_batch(input_ids, attention_mask, pad_token_id, ends, model.device)
    if pad_token_id is None:
        pad_token_id = ends[0] if ends else 0
    check_tokens(ids, mask, model.config.vocab_size)
    prompt = ids.shape[1]
    total = total_length(prompt, int(mask.sum(-1).max()), max_length, max_new_tokens, model.config.n_positions)
    if do_sample:
        check_sampling(temperature, top_k, top_p)
    check_return_sequences(num_return_sequences, do_sample)
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)

    if streamer is not None:
        streamer.put(ids.cpu())
    ids = ids.repeat_interleave(num_return_sequences, 0)
    rows = ids.shape[0]
    tokens = torch.cat([ids, ids.new_full((rows, total - prompt), pad_token_id)], 1)  # (rows, total)
    mask = mask.repeat_interleave(num_return_sequences, 0)
    padded = not bool(mask.all())
    mask = torch.cat([mask, mask.new_ones(rows, total - prompt)], 1)  # (rows, total)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)  # (rows, total)
    end_tokens = torch.tensor(ends, device=ids.device)
    finished = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    cache = KVCache(model.config.n_layer, capacity=total - 1) if use_cache else None

    length = prompt
    while length < total:
        logits = next_logits(model, tokens, mask if padded else None, positions, length, cache, num_return_sequences)
        if do_sample:
            new = sample(logits, temperature, top_k, top_p, generator)  # (rows,)
        else:
            new = logits.argmax(-1)  # (rows,)
        new = new.masked_fill(finished, pad_token_id)
        tokens[:, length] = new
        length += 1
        if streamer is not None:
            streamer.put(new.cpu())
        if ends:
            finished |= torch.isin(new, end_tokens)
            if finished.all():
                break
    if streamer is not None:
        streamer.end()
    return tokens[:, :length]


def next_logits(model, tokens, mask, positions, length: int, cache: KVCache | None, samples: int) -> torch.Tensor:
    """The float32 logits (rows, vocab) after the first `length` tokens; only what the cache lacks is computed.

    A prompt that is sampled several times, `samples` rows side by side, is read once and its cache repeated.
    """
    past = cache.length if cache is not None else 0
    first = samples if cache is not None and past == 0 else 1
    logits = model(
        tokens[::first, past:length],
        past_key_values=cache,
        attention_mask=None if mask is None else mask[::first, :length],
        position_ids=positions[::first, past:length],
        use_cache=cache is not None,
        logits_to_keep=1,
    ).logits[:, -1]
    if first > 1:
        cache.repeat(first)
    return logits.float().repeat_interleave(first, 0)


def as_batch(input_ids, attention_mask, pad_token_id, ends, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (b, s) int64 and their mask (b, s) bool, True = a token of the prompt."""
    if isinstance(input_ids, torch.Tensor):
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be integers (b, s), got {input_ids.dtype} {tuple(input_ids.shape)}")
        ids = input_ids.to(device, torch.long)
        if attention_mask is None:
            known = pad_token_id is not None and pad_token_id not in ends
            return ids, ids != pad_token_id if known else torch.ones_like(ids, dtype=torch.bool)
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must be {tuple(ids.shape)} like input_ids, got {tuple(attention_mask.shape)}"
            )
        return ids, attention_mask.to(device).bool()
    if attention_mask is not None:
        raise ValueError("attention_mask must be None when input_ids is a list of prompts: they are padded here")
    if not input_ids or isinstance(input_ids[0], int):
        raise ValueError(f"input_ids must be a tensor (b, s) or a list of prompts, got {input_ids!r:.60}")
    prompts = [torch.as_tensor(prompt, dtype=torch.long, device=device) for prompt in input_ids]
    width = max(prompt.numel() for prompt in prompts)
    ids = torch.full((len(prompts), width), 0 if pad_token_id is None else pad_token_id, device=device)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.numel() :] = prompt
        mask[row, width - prompt.numel() :] = True
    return ids, mask


def as_ends(eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else [int(token) for token in eos_token_id]


def check_tokens(ids: torch.Tensor, mask: torch.Tensor, vocab_size: int) -> None:
    if ids.shape[0] == 0 or not bool(mask.any(-1).all()):
        raise ValueError(f"input_ids must hold a token or more per prompt, got an empty prompt in {tuple(ids.shape)}")
    if not bool(mask[:, -1].all()):
        raise ValueError("attention_mask must end in 1 in every row: pad prompts on the left")
    prompt_ids = ids[mask]
    low, high = int(prompt_ids.min()), int(prompt_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids must lie in [0, {vocab_size}) (vocab_size), got {low if low < 0 else high}")


def total_length(prompt: int, longest: int, max_length, max_new_tokens, n_positions: int) -> int:
    """Tokens per row at most, padding and prompt included; `longest` is the longest prompt without its padding."""
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    if max_new_tokens is None and max_length is None:
        max_new_tokens = min(20, n_positions - longest)
        if max_new_tokens < 1:
            raise ValueError(f"input_ids must leave room below n_positions = {n_positions}, got {longest} tokens")
    total = max_length if max_new_tokens is None else prompt + max_new_tokens
    if total <= prompt:
        raise ValueError(f"max_length must exceed the prompt's {prompt} tokens, got {total} (or give max_new_tokens)")
    if total - prompt + longest > n_positions:
        raise ValueError(
            f"{'max_length' if max_new_tokens is None else 'max_new_tokens'} must keep prompt and new tokens within "
            f"n_positions = {n_positions}, got {longest} + {total - prompt}"
        )
    return total


def check_return_sequences(n: int, do_sample: bool) -> None:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"num_return_sequences must be a positive whole number, got {n!r}")
    if n > 1 and not do_sample:
        raise ValueError(
            "Greedy methods (do_sample != True) without beam search do not support "
            f"`num_return_sequences` different than 1 (got {n})."
        )
