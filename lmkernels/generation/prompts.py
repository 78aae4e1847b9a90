"""Prompts as a batch, and how long its rows may grow."""

from collections.abc import Sequence

import torch


def as_batch(inputs, attention_mask, pad_token_id, bos_token_id, ends, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (b, s) int64 and their mask (b, s) bool, True = a token of the prompt."""
    if inputs is None:
        if bos_token_id is None:
            raise ValueError("`bos_token_id` has to be defined when no `input_ids` are provided.")
        inputs = torch.full((1, 1), bos_token_id)
    if isinstance(inputs, torch.Tensor):
        if inputs.dim() != 2 or inputs.is_floating_point():
            raise ValueError(f"input_ids must be integers (b, s), got {inputs.dtype} {tuple(inputs.shape)}")
        ids = inputs.to(device, torch.long)
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
    if not inputs or isinstance(inputs[0], int):
        raise ValueError(f"input_ids must be a tensor (b, s) or a list of prompts, got {inputs!r:.60}")
    prompts = [torch.as_tensor(prompt, dtype=torch.long, device=device) for prompt in inputs]
    width = max(prompt.numel() for prompt in prompts)
    ids = torch.full((len(prompts), width), 0 if pad_token_id is None else pad_token_id, device=device)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.numel() :] = prompt
        mask[row, width - prompt.numel() :] = True
    return ids, mask


def as_ends(eos_token_id: int | Sequence[int] | torch.Tensor | None) -> list[int]:
    if eos_token_id is None:
        return []
    return [int(token) for token in torch.as_tensor(eos_token_id).reshape(-1)]


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
    if max_new_tokens is None and max_length is None:
        max_new_tokens = min(20, n_positions - longest)
        if max_new_tokens < 1:
            raise ValueError(f"input_ids must leave room below n_positions = {n_positions}, got {longest} tokens")
    total = max_length if max_new_tokens is None else prompt + max_new_tokens
    if total <= prompt:
        raise ValueError(
            f"Input length of input_ids is {prompt}, but `max_length` is set to {total}. This can lead to unexpected "
            "behavior. You should consider increasing `max_length` or, better yet, setting `max_new_tokens`."
        )
    if total - prompt + longest > n_positions:
        raise ValueError(
            f"{'max_length' if max_new_tokens is None else 'max_new_tokens'} must keep prompt and new tokens within "
            f"n_positions = {n_positions}, got {longest} + {total - prompt}"
        )
    return total
