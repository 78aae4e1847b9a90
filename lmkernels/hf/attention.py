"""`attn_implementation="lmkernels"`: the attention function and the mask function that transformers call.

A mask goes from the second to the first through the model's own code, which hands on a tensor or None. Its form says
what it means:

    None                     nothing is hidden; causal where the layer is
    (b, 1, q, k)             or what broadcasts to it. bool: who may see whom; floating: added to the scores
    (b, n) bool              causal, and of the first n keys those are visible that are True
    (b, w, n) bool           the same in a sliding window of w keys; the axis w has stride 0 and costs nothing
    (m + 1,) int32           causal, in sequences that begin and end at these places of the batch, laid end to end
    (w, m + 1) int32         the same in a sliding window of w keys

Causality is aligned to the last of the n keys. Behind it lies what a static cache has not written yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import _active_collector

from ..ops.attention import attention, attention_weights
from ..ops.attention_varlen import attention_varlen

NAME = "lmkernels"


def register() -> None:
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' AttentionInterface calls it.

    query: (b, h, s_q, d), key: (b, h_kv, s_k, d), value: (b, h_kv, s_k, d_v), with any strides
    attention_mask: see the head of this file
    position_bias: T5's, broadcasts to (b, h, s_q, s_k), differentiable. s_aux: (h,), sinks
    cu_seq_lens_q, ...: where packed sequences begin and end; they count instead of the mask
    Returns (b, s_q, h, d_v), and the map (b, h, s_q, s_k) for those who asked for it.
    """
    if is_causal is None:
        # modules that do not say are encoders (LayoutLM, Splinter, ...): flash-attention insists on it elsewhere
        is_causal = getattr(module, "is_causal", False)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (b, s, h, d)
    wants_map = output_attentions or _maps_are_collected()
    options = {"scale": scaling, "softcap": softcap or 0.0, "sink": _for_scores(s_aux, q)}

    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        window = (-1, -1)
        if sliding_window is not None:
            window = (sliding_window - 1, -1 if is_causal else sliding_window - 1)
        packing = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        options |= {"causal": bool(is_causal), "window": window}
        return _packed(q, k, v, packing, position_bias, dropout, wants_map, options)
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        cu_seqlens, window = (attention_mask, -1) if attention_mask.dim() == 1 else _without_window(attention_mask, 0)
        options |= {"causal": True, "window": (window, -1)}
        return _packed(q, k, v, (cu_seqlens, cu_seqlens, None, None), position_bias, dropout, wants_map, options)

    s_q, s_k = q.shape[1], k.shape[1]
    seen, mask, bias = s_k, None, position_bias
    if attention_mask is None:
        options["causal"] = bool(is_causal) and s_q > 1
        if options["causal"] and s_k > s_q:
            seen = s_q  # the first tokens of a static cache: the other keys are not written yet
    elif attention_mask.dim() < 4:
        padding, window = (attention_mask, -1) if attention_mask.dim() == 2 else _without_window(attention_mask, 1)
        mask, seen = padding[:, None, None], padding.shape[-1]  # (b, 1, 1, n)
        options |= {"causal": True, "window": (window, -1)}
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask
    else:
        bias = attention_mask if bias is None else bias + attention_mask
    if seen < s_k:
        k, v = k[:, :seen], v[:, :seen]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., :seen]
    options |= {"mask": mask, "bias": _for_scores(bias, q)}
    out = attention(q, k, v, **options, dropout_p=dropout)  # (b, s_q, h, d_v)
    return out, F.pad(attention_weights(q, k, **options), (0, s_k - seen)) if wants_map else None


def _packed(q, k, v, packing, position_bias, dropout, wants_map, options) -> tuple[Tensor, Tensor | None]:
    """`attention_forward` of sequences that lie end to end: without padding, and without work between them.

    packing: cu_seqlens_q, cu_seqlens_k, and the greatest lengths, None where they are not known yet
    """
    cu_seqlens_q, cu_seqlens_k, *longest = packing
    longest = [
        int(cu_seqlens.diff().max() if most is None else most)
        for cu_seqlens, most in zip((cu_seqlens_q, cu_seqlens_k), longest, strict=True)
    ]
    bias = None
    if position_bias is not None:
        position_bias = _for_scores(position_bias, q).expand(-1, -1, q.shape[1], k.shape[1])
        bias = _bias_of_each(position_bias, cu_seqlens_q, cu_seqlens_k, *longest)
    tokens = (x.flatten(0, 1) for x in (q, k, v))  # (t, h, d)
    out = attention_varlen(*tokens, cu_seqlens_q, cu_seqlens_k, *longest, bias=bias, **options, dropout_p=dropout)
    out = out.unflatten(0, q.shape[:2])  # (b, s_q, h, d_v)
    if not wants_map:
        return out, None
    # sequence of each token, and how far it is from that sequence's end, to which causality is aligned
    sequence_q, left_q = (x.view(q.shape[:2])[:, None, :, None] for x in _places(cu_seqlens_q))  # (b, 1, s_q, 1)
    sequence_k, left_k = (x.view(k.shape[:2])[:, None, None] for x in _places(cu_seqlens_k))  # (b, 1, 1, s_k)
    (left, right), distance = options.pop("window"), left_k - left_q
    mask = sequence_q == sequence_k
    if options.pop("causal"):
        right = 0
    if left >= 0:
        mask = mask & (distance <= left)
    if right >= 0:
        mask = mask & (distance >= -right)
    return out, attention_weights(q, k, mask=mask, bias=position_bias, **options)


def _bias_of_each(bias: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, most_q: int, most_k: int) -> Tensor:
    """The bias that all packed sequences share, the upper left corner of `bias`, (1, h, most_q, most_k).

    bias: (1, h, s_q, s_k) of whole rows. One of distances, as T5's, is the same for every sequence, wherever it
    begins; for any other there is no name to tell the sequences apart by.
    """
    bounds = (x.tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    for (i, i_end), (j, j_end) in zip(*(zip(x, x[1:]) for x in bounds), strict=True):
        rows, columns = i_end - i, j_end - j
        i, j = i % max(1, bias.shape[2]), j % max(1, bias.shape[3])
        own = bias[:, :, i : i + rows, j : j + columns]
        if len(bias) > 1 or not torch.equal(own, bias[:, :, :rows, :columns]):
            raise NotImplementedError(
                "position_bias must depend on the distance of a key from its query alone, as T5's does, for packed "
                "sequences (cu_seq_lens_q and cu_seq_lens_k): pad them instead"
            )
    return bias[:, :, :most_q, :most_k]


def _places(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token: the number of its sequence, and how many tokens that has from it on."""
    i = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    end = torch.bucketize(i, cu_seqlens, right=True)
    return end, cu_seqlens[end] - i


def _without_window(mask: Tensor, axis: int) -> tuple[Tensor, int]:
    """The mask without its axis of a window's length, and how many keys before its own a query sees."""
    return mask.select(axis, 0), mask.shape[axis] - 1


def _for_scores(x: Tensor | None, q: Tensor) -> Tensor | None:
    """A sink or bias in a dtype that `attention` takes: q's, or for 16 bits float32."""
    if x is None or x.dtype == q.dtype or (x.dtype == torch.float32 and q.dtype != torch.float64):
        return x
    return x.to(torch.promote_types(q.dtype, torch.float32))


def _maps_are_collected() -> bool:
    """Whether the model was called with output_attentions=True; not every model tells its layers (GPT-2 does not)."""
    collected = _active_collector.get()
    return bool(collected) and any(name.endswith("attentions") for name in collected)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **kwargs,
) -> Tensor | None:
    """The mask as transformers' AttentionMaskInterface asks for it, in the smallest form that says it all.

    Whatever is not plainly causal, sliding, packed or padded gets the (b, 1, q, k) of transformers' `sdpa_mask`, and so
    do models that compute with the mask themselves (allow_is_causal_skip=False).
    """
    if attention_mask is not None and attention_mask.dim() == 3:
        return attention_mask  # generate asks for masks before the model does, and the model hands them back
    if not use_vmap:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)  # (b, at least kv_offset + kv_length)
        if mask_function is bidirectional_mask_function and allow_is_bidirectional_skip:
            padding = None if padding is None else padding[:, kv_offset : kv_offset + kv_length]
            return None if _hides_nothing(padding) else padding[:, None, None]
        pattern = _pattern(mask_function)
        if pattern is not None:
            window, sequences = pattern
            if sequences is not None:
                if attention_mask is None and not _computes_with_its_mask(kwargs.get("config")):
                    return _packed_form(window, sequences)
            elif allow_is_causal_skip:
                seen = q_offset + q_length - kv_offset  # keys up to that of the last query
                if not is_tracing(seen) and q_length <= seen <= kv_length:
                    padding = None if padding is None else padding[:, kv_offset : kv_offset + seen]
                    return _causal_form(q_length, kv_length, int(seen), window, padding, kwargs.get("device"))
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        **kwargs,
    )


def _causal_form(
    q_length: int, kv_length: int, seen: int, window: int | None, padding: Tensor | None, device
) -> Tensor | None:
    """None, (b, n) or (b, w, n); padding: (b, n) of the n keys that are seen, or None."""
    slides = window is not None and window < seen
    if _hides_nothing(padding):
        if not slides and (q_length == seen or q_length == 1 and seen == kv_length):
            return None
        padding = torch.ones(1, seen, dtype=torch.bool, device=device)
    return padding[:, None].expand(-1, window, -1) if slides else padding


def _packed_form(window: int | None, sequences: Tensor) -> Tensor:
    """(m + 1,) or (w, m + 1); sequences: (b, s), the number of each token's sequence within its row."""
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    cu_seqlens = F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=sequences.numel()).to(torch.int32)
    return cu_seqlens if window is None else cu_seqlens.expand(window, -1)


def _pattern(mask_function: Callable) -> tuple[int | None, Tensor | None] | None:
    """(window, numbers of packed sequences) where these, each None if there is none, and causality are the whole mask.

    transformers composes its masks of closures; each is known by the function that made it.
    """
    if mask_function is causal_mask_function:
        return None, None
    if torch.compiler.is_compiling():
        return None
    match _closure(mask_function):
        case "and_masks", {"mask_functions": (overlay, last)} if last is causal_mask_function:
            match _closure(overlay):
                case "sliding_window_overlay", {"sliding_window": int(window)}:
                    return window, None
        case "and_masks", {"mask_functions": (remapped, packed)}:
            match _closure(remapped), _closure(packed):
                case (
                    ("remap_positions_for_packed_sequence", {"mask_function": inner}),
                    ("packed_sequence_mask_function", {"packed_sequence_mask": Tensor() as sequences}),
                ) if (pattern := _pattern(inner)) is not None and pattern[1] is None:
                    return pattern[0], sequences
    return None


def _closure(function: Callable) -> tuple[str, dict]:
    """The function of transformers that made this one, "" where none did, and what this one remembers of it."""
    code = getattr(function, "__code__", None)
    if code is None or function.__module__ != causal_mask_function.__module__:
        return "", {}
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return function.__qualname__.partition(".")[0], dict(zip(code.co_freevars, cells, strict=True))


def _hides_nothing(padding: Tensor | None) -> bool:
    return padding is None or (not is_tracing(padding) and bool(padding.all()))


def _computes_with_its_mask(config) -> bool:
    """Whether the model's own code looks into the mask: these models choose keys by a second attention, an indexer."""
    return "indexed_attention" in (getattr(config, "layer_types", None) or ())
