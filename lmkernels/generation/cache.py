"""Keys and values of the tokens seen so far, written in place."""

import torch


class KVCache:
    """The keys and values of every layer.

    Each layer holds two buffers (b, h, capacity, d), of which `update` hands out views (b, length, h, d):
    a head's keys lie one after the other in memory, and the attention kernels take any stride.
    The buffers double when they are full; nothing else ever copies them.
    `length` counts the tokens of finished forward passes, so a pass that is interrupted leaves no trace.
    """

    def __init__(self, n_layer: int, capacity: int = 64):
        self.length = 0
        self.capacity = capacity
        self._buffers: list[torch.Tensor | None] = [None] * n_layer  # each (2, b, h, capacity, d)

    def get_seq_length(self) -> int:
        """Hugging Face's name for `length`."""
        return self.length

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes k, v (b, s, h, d) behind the tokens of one layer and returns all of them, (b, length + s, h, d).

        `length` itself moves once per forward pass, by `advance`.
        """
        b, s, h, d = k.shape
        end = self.length + s
        buffer = self._buffers[layer]
        if buffer is None:
            self.capacity = max(self.capacity, end)
            buffer = k.new_empty(2, b, h, self.capacity, d)
        elif (buffer.shape[1], buffer.shape[2], buffer.shape[4]) != (b, h, d):
            raise ValueError(
                f"past_key_values was filled with batch, heads, head size "
                f"{buffer.shape[1]}, {buffer.shape[2]}, {buffer.shape[4]}, got {b}, {h}, {d}"
            )
        elif buffer.shape[3] < end:
            self.capacity = max(self.capacity, end, 2 * buffer.shape[3])
            grown = buffer.new_empty(2, b, h, self.capacity, d)
            grown[:, :, :, : self.length] = buffer[:, :, :, : self.length]
            buffer = grown
        self._buffers[layer] = buffer
        buffer[0, :, :, self.length : end] = k.transpose(1, 2)
        buffer[1, :, :, self.length : end] = v.transpose(1, 2)
        keys, values = buffer[:, :, :, :end].transpose(2, 3)  # (b, length + s, h, d) each
        return keys, values

    def advance(self, s: int) -> None:
        """Counts s tokens, after every layer has written them."""
        self.length += s

    def repeat_rows(self, n: int) -> None:
        """Repeats every sequence n times, side by side: (b, ...) becomes (n b, ...)."""
        if n > 1:
            self._buffers = [buffer.repeat_interleave(n, dim=1) for buffer in self._buffers]
