"""The real tokens of a padded batch: found once, packed once, and everything between runs on them alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import attention
from ..ops.attention_varlen import attention_varlen
from ..ops.encoder_layers import encoder_layers
from ..ops.encoder_layers.autograd import Layer


def real_tokens(b: int, s: int, attention_mask: Tensor | None, device: torch.device) -> AllTokens | RealTokens:
    """What to run on, for a batch (b, s) of which attention_mask (b, s) marks the real tokens by nonzero.

    Without a mask no value is read, so that a CUDA graph can be captured; a mask is looked at, which stalls a GPU and
    breaks a compiled graph there.
    """
    if attention_mask is None:
        return AllTokens(b, s, device)
    mask = attention_mask.bool()
    return AllTokens(b, s, device) if mask.all() else RealTokens(mask)


class AllTokens:
    """A batch (b, s) without padding: t = b s."""

    def __init__(self, b: int, s: int, device: torch.device):
        self.b, self.s, self.device = b, s, device

    def places(self) -> Tensor:
        """(t,): where in its row each token stands."""
        return torch.arange(self.s, device=self.device).repeat(self.b)

    def pack(self, x: Tensor) -> Tensor:
        """(b, s, ...) to (t, ...)."""
        return x.reshape(self.b * self.s, *x.shape[2:])

    def unpack(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(t, ...) to (b, s, ...), with `fill` where there is no token."""
        return x.view(self.b, self.s, *x.shape[1:])

    def firsts(self, x: Tensor) -> Tensor:
        """(t, d) to (n, d): the first token of every row that has one."""
        return x.view(self.b, self.s, -1)[:, 0]

    def spread(self, x: Tensor) -> Tensor:
        """(n, ...) to (b, ...), with zeros for the rows without a token."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """q, k, v: (t, h, d). Tokens see the tokens of their own row."""
        q, k, v = (x.view(self.b, self.s, *x.shape[1:]) for x in (q, k, v))
        return attention(q, k, v, dropout_p=dropout_p).flatten(0, 1)

    def attend_from_firsts(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """As attend, with the queries of the first tokens alone: q (n, h, d)."""
        k, v = (x.view(self.b, self.s, *x.shape[1:]) for x in (k, v))
        return attention(q.unsqueeze(1), k, v, dropout_p=dropout_p).squeeze(1)

    def encode(self, x: Tensor, parameters: list, heads: int, activation: str, eps: float) -> Tensor:
        """(t, d_model) after layers, by `encoder_layers`."""
        x = x.view(self.b, self.s, -1)
        return encoder_layers(x, parameters, heads, activation=activation, eps=eps).flatten(0, 1)

    def train(self, x: Tensor, parameters: list, shape: tuple, chances: tuple) -> Tensor:
        """(t, d_model) after one layer, with its gradient."""
        return Layer(*shape, *chances, batch=self.b)(x, parameters)


class RealTokens:
    """The t real tokens of a padded batch (b, s), wherever in their rows they are; as AllTokens."""

    def __init__(self, mask: Tensor):
        """mask: (b, s) bool"""
        self.b, self.s = mask.shape
        self.index = mask.flatten().nonzero().squeeze(1)  # (t,), of (b s,)
        lengths = mask.sum(1)  # (b,)
        self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        self.longest = int(lengths.max()) if self.b else 0
        self.rows = lengths.nonzero().squeeze(1)  # (n,), those with a token

    def places(self) -> Tensor:
        return self.index % self.s

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, x: Tensor, fill: float = 0.0) -> Tensor:
        padded = x.new_full((self.b * self.s, *x.shape[1:]), fill)
        return padded.index_copy(0, self.index, x).view(self.b, self.s, *x.shape[1:])

    def firsts(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.cu_seqlens[:-1][self.rows])

    def spread(self, x: Tensor) -> Tensor:
        if len(self.rows) == self.b:
            return x
        return x.new_zeros(self.b, *x.shape[1:]).index_copy(0, self.rows, x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        bounds = (self.cu_seqlens, self.cu_seqlens, self.longest, self.longest)
        return attention_varlen(q, k, v, *bounds, dropout_p=dropout_p)

    def attend_from_firsts(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        cu_firsts = F.pad(self.cu_seqlens.diff().clamp(max=1).cumsum(0), (1, 0)).int()
        return attention_varlen(q, k, v, cu_firsts, self.cu_seqlens, 1, self.longest, dropout_p=dropout_p)

    def encode(self, x: Tensor, parameters: list, heads: int, activation: str, eps: float) -> Tensor:
        bounds = {"cu_seqlens": self.cu_seqlens, "max_seqlen": self.longest}
        return encoder_layers(x, parameters, heads, activation=activation, eps=eps, **bounds)

    def train(self, x: Tensor, parameters: list, shape: tuple, chances: tuple) -> Tensor:
        return Layer(*shape, *chances, cu_seqlens=self.cu_seqlens, max_seqlen=self.longest)(x, parameters)
