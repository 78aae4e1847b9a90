"""Keys and values of the tokens seen so far, written in place."""

import torch

from ..ops.attention import attention


class KVCache:
    """The keys and values of every layer.

    Each layer holds its keys and its values as (b, h, capacity, d), of which `update` hands out views
    (b, length, h, d): a head's keys lie one after the other in memory, and the attention kernels take any stride.
    The buffers double when they are full; `reorder` and `repeat` copy no more than the rows and tokens they must.
    `length` counts the tokens of finished forward passes, so a pass that is interrupted leaves no trace.
    """

    def __init__(self, n_layer: int, capacity: int = 64):
        self.length = 0
        self.capacity = capacity
        self._buffers: list[torch.Tensor | None] = [None] * n_layer  # each (2, b, h, capacity, d)

    def get_seq_length(self) -> int:
        """Hugging Face's name for `length`."""
        return self.length

    @property
    def buffers(self) -> list[torch.Tensor]:
        """Keys and values of every layer, (2, b, h, capacity, d), once all have been written; for writing in place."""
        return self._buffers

    def keys(self, layer: int) -> torch.Tensor:
        """The buffer (b, h, capacity, d) of a layer that has been written; the first `length` places are tokens."""
        return self._buffers[layer][0]

    def values(self, layer: int) -> torch.Tensor:
        """Like `keys`."""
        return self._buffers[layer][1]

    def allocate(self, starts: torch.Tensor, h: int, d: int, length: int, like: torch.Tensor) -> None:
        """Makes room for `length` tokens of sequences that have none yet, to be written in place.

        starts: (b,) int64  places of padding before each, which hold zeros: nobody sees them, but 0 * NaN is NaN
        """
        self.capacity = max(self.capacity, length)
        for layer in range(len(self._buffers)):
            buffer = like.new_empty(2, starts.numel(), h, self.capacity, d)
            for row, start in enumerate(starts.tolist()):
                buffer[:, row, :, :start] = 0
            self._buffers[layer] = buffer

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        """Writes k, v as `update` does; then the attention (b, s, h, d) of q, which sees them and all before.

        options: those of `attention`
        """
        keys, values = self.update(layer, k, v)
        return attention(q, keys, values, causal=True, **options)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes k, v (b, s, h, d) behind the tokens of one layer and returns all of them, (b, length + s, h, d).

        `length` itself moves once per forward pass, by `advance`.
        """
        b, s, h, d = k.shape
        end = self.length + s
        buffer = self._buffers[layer]
        if buffer is None:
            self.capacity = max(self.capacity, end)
            self._buffers[layer] = k.new_empty(2, b, h, self.capacity, d)
        elif (buffer.shape[1], buffer.shape[2], buffer.shape[4]) != (b, h, d):
            raise ValueError(
                f"past_key_values was filled with batch, heads, head size "
                f"{buffer.shape[1]}, {buffer.shape[2]}, {buffer.shape[4]}, got {b}, {h}, {d}"
            )
        elif buffer.shape[3] < end:
            self._grow(layer, max(self.capacity, end, 2 * buffer.shape[3]))
        buffer = self._buffers[layer]
        buffer[0, :, :, self.length : end] = k.transpose(1, 2)
        buffer[1, :, :, self.length : end] = v.transpose(1, 2)
        keys, values = buffer[:, :, :, :end].transpose(2, 3)  # (b, length + s, h, d) each
        return keys, values

    def advance(self, s: int) -> None:
        """Counts s tokens, after every layer has written them."""
        self.length += s

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens in every layer that has been written, so that they can be written in place."""
        for layer, buffer in enumerate(self._buffers):
            if buffer is not None and buffer.shape[3] < length:
                self._grow(layer, length)

    def _grow(self, layer: int, capacity: int) -> None:
        self.capacity = max(self.capacity, capacity)
        buffer = self._buffers[layer]
        grown = buffer.new_empty(*buffer.shape[:3], self.capacity, buffer.shape[4])
        grown[:, :, :, : self.length] = buffer[:, :, :, : self.length]
        self._buffers[layer] = grown

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` tokens; a negative length counts from the end."""
        if length < 0:
            length += self.length
        self.length = max(0, min(length, self.length))

    def shift(self, starts: torch.Tensor) -> None:
        """Moves the slots of sequence i by starts[i], (b,) int64, to the front; those before are lost.

        `length` still counts them, so that a sequence then has length - starts[i] tokens.
        """
        slots = torch.arange(self.length, device=starts.device) + starts[:, None]  # (b, length)
        slots = slots.clamp(max=self.length - 1)[None, :, None, :, None]
        for buffer in self._buffers:
            if buffer is not None:
                tokens = buffer[:, :, :, : self.length]
                tokens.copy_(tokens.gather(3, slots.expand_as(tokens)))

    def repeat(self, n: int) -> None:
        """Repeats every sequence n times, side by side: (b, ...) becomes (n b, ...)."""
        for layer, buffer in enumerate(self._buffers):
            if buffer is not None and n > 1:
                tokens = buffer[:, :, :, : self.length]
                _, b, h, _, d = buffer.shape
                repeated = buffer.new_empty(2, b, n, h, self.capacity, d)
                repeated[:, :, :, :, : self.length] = tokens.unsqueeze(2)
                self._buffers[layer] = repeated.flatten(1, 2)

    def reorder(self, rows: torch.Tensor, start: int = 0) -> None:
        """Sequence i becomes what sequence rows[i] was; with fewer rows than sequences the rest is dropped.

        rows: (b',)  int64, b' <= b
        start        the tokens before it are left as they are: each sequence shares them with the one it becomes
        Only sequences that change are copied.
        """
        into = (rows != torch.arange(rows.numel(), device=rows.device)).nonzero().squeeze(1)
        source = rows[into]
        for layer, buffer in enumerate(self._buffers):
            if buffer is not None:
                tokens = buffer[:, :, :, start : self.length]
                if into.numel() > 0:
                    tokens.index_copy_(1, into, tokens.index_select(1, source))
                self._buffers[layer] = buffer[:, : rows.numel()]


class RowCache(KVCache):
    """One sequence of a cache, from slot `start` on, as a pass over its prompt sees it."""

    def __init__(self, cache: KVCache, row: int, start: int):
        self.cache, self.row, self.start, self.length = cache, row, start, 0

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        begin, end = self.start + self.length, self.start + self.length + k.shape[1]
        buffer = self.cache.buffers[layer][:, self.row]  # (2, h, capacity, d)
        buffer[0, :, begin:end], buffer[1, :, begin:end] = k[0].transpose(0, 1), v[0].transpose(0, 1)
        if self.length == 0:
            return k, v
        keys, values = buffer[:, None, :, self.start : end].transpose(2, 3)  # (1, length + s, h, d) each
        return keys, values


class PackedCache(KVCache):
    """The caches of several sequences as a pass over new tokens of all of them, one after the other, sees them.

    counts: new tokens of each
    Each attends by itself, and so gets the bits that it gets alone.
    """

    def __init__(self, caches: list[KVCache], counts: list[int]):
        self.caches, self.counts, self.length = caches, counts, 0

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        parts = zip(self.caches, *(x.split(self.counts, 1) for x in (q, k, v)), strict=True)
        return torch.cat([cache.attend(layer, *part, **options) for cache, *part in parts], 1)

    def advance(self, s: int) -> None:
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.advance(count)
