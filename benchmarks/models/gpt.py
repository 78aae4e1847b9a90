"""GPT-2 training and decoding: this library against the plain torch that a user would write instead.

Both hold the same weights and do the same mathematics in one process, turn by turn; a rate is the median of its turns.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from lmkernels.models import GPT2Config, GPT2LMHeadModel

DEMO = GPT2Config(vocab_size=4096, n_positions=256, n_embd=256, n_layer=4, n_head=4)
DTYPES = (torch.float32, torch.bfloat16)


class PlainBlock(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.attn_proj = nn.Linear(config.n_embd, config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.mlp_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x, past):
        b, s, d_model = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(b, s, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (b, h, s, d)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.attn_proj(out.transpose(1, 2).reshape(b, s, d_model))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")), (k, v)


class PlainGPT(nn.Module):
    """GPT-2 from torch's own modules, with the weights of `model`."""

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        config = model.config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for mine, theirs in ((self.wte, "wte"), (self.wpe, "wpe"), (self.ln_f, "ln_f")):
            mine.load_state_dict(getattr(model.transformer, theirs).state_dict())
        for mine, theirs in zip(self.blocks, model.transformer.h):
            mine.ln_1.load_state_dict(theirs.ln_1.state_dict())
            mine.ln_2.load_state_dict(theirs.ln_2.state_dict())
            for linear, conv in (
                (mine.c_attn, theirs.attn.c_attn),
                (mine.attn_proj, theirs.attn.c_proj),
                (mine.c_fc, theirs.mlp.c_fc),
                (mine.mlp_proj, theirs.mlp.c_proj),
            ):
                linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})

    def forward(self, ids, past=None, last=0):
        """ids: (b, s). Returns logits (b, s or last, vocab) and the cache, one (k, v) per block."""
        first = 0 if past is None else past[0][0].shape[2]
        x = self.wte(ids) + self.wpe.weight[first : first + ids.shape[1]]
        cache = []
        for i, block in enumerate(self.blocks):
            x, entry = block(x, None if past is None else past[i])
            cache.append(entry)
        return F.linear(self.ln_f(x)[:, -last:], self.wte.weight), cache

    @torch.no_grad()
    def generate(self, ids, n: int):
        """ids (b, s) and the n most likely tokens after them, (b, s + n)."""
        logits, cache = self(ids, last=1)
        for i in range(n):
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            if i + 1 < n:
                logits, cache = self(ids[:, -1:], cache, last=1)
        return ids


def run(args) -> list[dict]:
    """The table of `python -m benchmarks gpt`: GPT-2 with 124 M parameters."""
    config = GPT2Config.from_name("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    rows = [training(config, b=4, s=256, dtype=dtype, seconds=30.0) for dtype in DTYPES]
    return rows + [
        decoding(config, b=b, prompt=32, n=32, dtype=dtype, seconds=20.0) for dtype in DTYPES for b in (1, 8)
    ]


def compare(step_seconds_budget: float = 4.0) -> list[dict]:
    """A quick table for a small GPT; each of its rows measures for about so many seconds."""
    rows = [training(DEMO, b=8, s=256, dtype=dtype, seconds=step_seconds_budget) for dtype in DTYPES]
    return rows + [
        decoding(DEMO, b=b, prompt=64, n=128, dtype=torch.float32, seconds=step_seconds_budget) for b in (1, 8)
    ]


def training(config: GPT2Config, *, b: int, s: int, dtype: torch.dtype, seconds: float) -> dict:
    """Tokens per second of forward, backward and AdamW; bfloat16 runs under autocast."""
    ours = build(config).train()
    plain = PlainGPT(ours)
    ids = torch.randint(config.vocab_size, (b, s + 1))

    def stepper(model: nn.Module, logits: Callable) -> Callable:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
                y = logits(ids[:, :-1])
            loss = F.cross_entropy(y.flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    ours_step = stepper(ours, lambda x: ours(x, use_cache=False).logits)
    plain_step = stepper(plain, lambda x: plain(x)[0])
    # the steps also compare gradients: the losses after the first differ when these do
    agree("loss", [ours_step() for _ in range(3)], [plain_step() for _ in range(3)], dtype)
    name = f"training step, {short(dtype)}, b {b} s {s}"
    return row(name, config, b * s, *medians(ours_step, plain_step, seconds))


def decoding(config: GPT2Config, *, b: int, prompt: int, n: int, dtype: torch.dtype, seconds: float) -> dict:
    """Tokens per second of greedy decoding, reading the prompt included."""
    ours = build(config).to(dtype).eval()
    plain = PlainGPT(ours).to(dtype)
    ids = torch.randint(config.vocab_size, (b, prompt))
    with torch.no_grad():
        agree("logits", ours(ids).logits.float().flatten(), plain(ids)[0].float().flatten(), dtype)

    def ours_run():
        return ours.generate(ids, max_new_tokens=n, eos_token_id=[])

    def plain_run():
        return plain.generate(ids, n)

    name = f"decoding, {short(dtype)}, b {b}, {prompt} + {n} tokens"
    return row(name, config, b * n, *medians(ours_run, plain_run, seconds))


def build(config: GPT2Config) -> GPT2LMHeadModel:
    """A model without dropout, the same one each time."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attn_pdrop"):
            module.attn_pdrop = 0.0
    return model


def agree(name: str, ours, plain, dtype: torch.dtype) -> None:
    """Raises unless both computed the same: no time is given for a wrong result."""
    ours, plain = torch.as_tensor(ours), torch.as_tensor(plain)
    error = ((ours - plain).norm() / plain.norm()).item()
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    if not error < limit:
        raise AssertionError(f"{name} must agree with plain torch within {limit}, got a relative error of {error:.1e}")


def medians(ours: Callable, plain: Callable, seconds: float) -> tuple[float, float]:
    """Median seconds of both, run in turn for about `seconds` and at least three times each."""
    times = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for function, kept in zip((ours, plain), times):
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def row(name: str, config: GPT2Config, tokens: int, ours: float, plain: float) -> dict:
    shape = f"{config.n_layer} layers, width {config.n_embd}, vocabulary {config.vocab_size}"
    return {
        "name": name,
        "model": shape,
        "unit": "tokens/s",
        "ours": round(tokens / ours, 1),
        "plain torch": round(tokens / plain, 1),
        "ratio": round(plain / ours, 2),
    }


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
