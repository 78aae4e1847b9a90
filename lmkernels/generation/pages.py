"""Keys and values in pages of fixed size: who has which, and a sequence's pages as a forward pass sees them."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch

from .cache import KVCache


class Pages:
    """Which pages are free, how many sequences share each, and which begin of a prompt each holds.

    Only pages that a prompt fills are shared. Nobody writes to them again, so there is nothing to copy. A page that is
    free keeps what it holds until it is taken for something else, the longest unused first.
    """

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.users = [0] * count
        self._free = OrderedDict.fromkeys(range(count))  # in the order in which they are taken
        self._holder: dict[bytes, int] = {}
        self._held: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def names(self, prompt: Sequence[int]) -> list[bytes]:
        """One for each page that the prompt fills, of all tokens up to the end of that page."""
        digest, names = hashlib.sha256(), []
        for end in range(self.size, len(prompt) + 1, self.size):
            digest.update(b"".join(token.to_bytes(8, "little") for token in prompt[end - self.size : end]))
            names.append(digest.digest())
        return names

    def find(self, names: list[bytes]) -> list[int]:
        """The pages that hold the first of `names`, as many as there are."""
        found = []
        for name in names:
            if name not in self._holder:
                break
            found.append(self._holder[name])
        return found

    def take(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """`shared` and so many fresh pages that it is `count`; None, and nothing is taken, where they are not free."""
        if count - len(shared) > self.free - sum(self.users[page] == 0 for page in shared):
            return None
        for page in shared:
            self._free.pop(page, None)
            self.users[page] += 1
        fresh = [self._free.popitem(last=False)[0] for _ in range(count - len(shared))]
        for page in fresh:
            self.users[page] = 1
            if (name := self._held.pop(page, None)) is not None:
                del self._holder[name]
        return [*shared, *fresh]

    def hold(self, page: int, name: bytes) -> None:
        """Offers a taken page, which has been filled, to later prompts that begin alike."""
        if name not in self._holder:
            self._holder[name], self._held[page] = page, name

    def give_back(self, pages: Sequence[int]) -> None:
        # the end of a prompt is of no use without its begin, so it goes first
        for page in reversed(pages):
            self.users[page] -= 1
            if self.users[page] == 0:
                self._free[page] = None
                if page not in self._held:
                    self._free.move_to_end(page, last=False)


class SequenceCache(KVCache):
    """One sequence's pages as a forward pass sees them: it writes new tokens there, and gathers all that it reads.

    buffers: per layer (2, count, h_kv, size, d)   all pages
    pages                 (n,) int64, the sequence's own in their order
    length                tokens that they hold
    """

    def __init__(self, buffers: list[torch.Tensor], pages: torch.Tensor, length: int):
        self._buffers, self.pages, self.length = buffers, pages, length
        self.capacity = pages.numel() * buffers[0].shape[3]

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        buffer, end = self._buffers[layer], self.length + k.shape[1]
        size = buffer.shape[3]
        places = torch.arange(self.length, end, device=k.device)
        pages, slots = self.pages[places // size], places % size
        buffer[0, pages, :, slots], buffer[1, pages, :, slots] = k[0], v[0]
        if self.length == 0:
            return k, v
        # (2, h, n, size, d), of whole pages
        read = buffer.transpose(1, 2)[:, :, self.pages[: -(-end // size)]]
        keys, values = read.flatten(2, 3)[:, None, :, :end].transpose(2, 3)  # (1, length + s, h, d) each
        return keys, values
