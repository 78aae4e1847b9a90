"""What generation asks of a model: the logits that follow rows of tokens."""

import torch

from .cache import KVCache, PackedCache, RowCache
from .fused import FusedDecoder, fused_decoder


class Decoder:
    """The logits of the next positions; owns the cache, the mask and the positions of every row.

    This is the only place where generation calls the model: whatever has these methods decodes in its stead.

    mask: (b, s)  bool, True = a token of the prompt
    total         tokens per row at most, padding and prompt included
    """

    def __init__(self, model, mask: torch.Tensor, total: int, use_cache: bool = True):
        self.model = model
        self.cache = KVCache(model.config.n_layer, capacity=total - 1) if use_cache else None
        self.mask = self.positions = None
        self.starts = mask.long().argmax(-1)  # (b,), the padding before each row
        if not bool(mask.all()):
            self.mask = torch.cat([mask, mask.new_ones(mask.shape[0], total - mask.shape[1])], 1)  # (b, total)
            self.positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)  # (b, total)
        # a step knows of no holes in a prompt
        whole = torch.equal(mask.sum(-1), mask.shape[1] - self.starts)
        self.fused = fused_decoder(model) if use_cache and whole else None

    def logits(self, ids: torch.Tensor, count: int = 1) -> torch.Tensor:
        """The float32 logits (b, count, vocab) after each of the last `count` tokens of ids (b, s).

        Only what the cache lacks is computed.
        """
        past, end = self.cache.length if self.cache is not None else 0, ids.shape[1]
        if self.fused is not None and self.fused.unsupported(self.cache) is not None:
            self.fused = None
        if self.fused is not None and self.fused.takes(ids[:, past:], past):
            return self.fused.step(ids[:, past:], self.cache, self.starts, count)
        if isinstance(self.fused, FusedDecoder) and past == 0 and count == 1 and self.mask is not None:
            return self.logits_without_padding(ids)
        return self.model(
            ids[:, past:],
            past_key_values=self.cache,
            attention_mask=None if self.mask is None else self.mask[:, :end],
            position_ids=None if self.positions is None else self.positions[:, past:end],
            use_cache=self.cache is not None,
            logits_to_keep=count,
        ).logits.float()

    def logits_without_padding(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits (b, 1, vocab) after prompts of several lengths, which are read side by side."""
        b, s = ids.shape
        model, counts = self.fused.model, (s - self.starts).tolist()
        self.cache.allocate(self.starts, model.heads_kv, model.head_dim, s, model.norm)
        rows = [RowCache(self.cache, row, s - n) for row, n in enumerate(counts)]
        real = self.mask[:, :s]
        logits = self.model(
            ids[real][None],
            past_key_values=PackedCache(rows, counts),
            position_ids=self.positions[:, :s][real][None],
            use_cache=True,
            logits_to_keep=torch.tensor(counts).cumsum(0) - 1,
        ).logits.float()
        self.cache.advance(s)
        return logits.view(b, 1, -1)

    def repeat(self, n: int) -> None:
        """Every row n times, side by side."""
        self.starts = self.starts.repeat_interleave(n, 0)
        if self.mask is not None:
            self.mask, self.positions = self.mask.repeat_interleave(n, 0), self.positions.repeat_interleave(n, 0)
        if self.cache is not None:
            self.cache.repeat(n)

    def reorder(self, rows: torch.Tensor, start: int = 0) -> None:
        """Row i becomes what row rows[i] was, see `KVCache.reorder`."""
        self.starts = self.starts[rows]
        if self.mask is not None:
            self.mask, self.positions = self.mask[rows], self.positions[rows]
        if self.cache is not None:
            aligned = self.fused is not None and self.fused.aligned
            self.cache.reorder(rows, 0 if aligned else start)

    def crop(self, length: int) -> None:
        """Forgets what was computed for all but the first `length` tokens."""
        if self.cache is not None:
            self.cache.crop(length)
