"""GPT-2 training and decoding: this library against the plain torch that a user would write instead, and training with
dropout against transformers, where that is installed.

Both hold the same weights and do the same mathematics in one process, turn by turn; a rate is the median of its turns.
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from benchmarks import harness
from benchmarks.models.bert import Step
from lmkernels import attention
from lmkernels.models import GPT2Config, GPT2LMHeadModel

DEMO = GPT2Config(vocab_size=4096, n_positions=256, n_embd=256, n_layer=4, n_head=4)


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


def run(options: harness.Options) -> list[dict]:
    """The table of `python -m benchmarks gpt`: GPT-2 with 124 M parameters."""
    config = GPT2Config.from_name("gpt2")
    against_transformers = [training_with_dropout] if importlib.util.find_spec("transformers") else []
    return measured(
        [
            line
            for dtype in options.dtypes
            for line in (
                *((what, {"config": config, "b": 4, "s": 256, "dtype": dtype}) for what in against_transformers),
                (training, {"config": config, "b": 4, "s": 256, "dtype": dtype}),
                (decoding, {"config": config, "b": 1, "prompt": 32, "n": 32, "dtype": dtype}),
                (decoding, {"config": config, "b": 8, "prompt": 32, "n": 32, "dtype": dtype}),
            )
            if options.cases in title(*line)
        ],
        options.seconds,
    )


def compare(step_seconds_budget: float = 3.0) -> list[dict]:
    """A quick table for attention and a small GPT; each row measures for about so many seconds."""
    lines = [(attending, {"b": 1, "h": 8, "s": 1024, "d": 64, "dtype": dtype}) for dtype in ("float32", "bfloat16")]
    lines += [(training, {"config": DEMO, "b": 4, "s": 256, "dtype": dtype}) for dtype in ("float32", "bfloat16")]
    lines += [(decoding, {"config": DEMO, "b": b, "prompt": 64, "n": 64, "dtype": "float32"}) for b in (1, 8)]
    return measured(lines, step_seconds_budget)


def title(function: Callable, shape: dict) -> str:
    """A line's name: what is measured, and the shape it is measured at."""
    what = {
        attending: "attention forward+backward",
        training: "training step",
        training_with_dropout: "training step with dropout",
        decoding: "greedy decoding",
    }[function]
    sizes = " ".join(f"{name} {value}" for name, value in shape.items() if isinstance(value, int))
    config = shape.get("config")
    model = f", {config.n_layer} layers, width {config.n_embd}" if config else ""
    return f"{what}, {shape['dtype']}, {sizes}{model}"


def measured(lines: list[tuple[Callable, dict]], seconds: float) -> list[dict]:
    """Runs each line: its function makes both competitors, the work of one call and a complaint if they disagree."""
    rows = []
    for function, shape in tqdm(lines, unit="case", file=sys.stderr, leave=False):
        torch.manual_seed(0)
        competitors, work, unit, error = function(**shape)
        row = {"name": title(function, shape)}
        # no time is given for a wrong result
        if error:
            rows.append(row | {"error": error})
            continue
        timings = harness.interleaved(competitors, seconds, least=3)
        (peer,) = timings.keys() - {"ours"}
        ours, theirs = timings["ours"].median, timings[peer].median
        row |= {"unit": unit, "ours": round(work / ours, 1), peer: round(work / theirs, 1)}
        rows.append(row | {"ratio": round(theirs / ours, 2)})
    return rows


def attending(*, b: int, h: int, s: int, d: int, dtype: str) -> tuple:
    """Causal attention against SDPA, forward and backward, in GFLOP/s."""
    q, k, v = (torch.randn(b, s, h, d, dtype=harness.DTYPES[dtype], requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)

    def ours():
        out = attention(q, k, v, causal=True)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    def plain():
        transposed = (x.transpose(1, 2) for x in (q, k, v))  # (b, h, s, d)
        out = F.scaled_dot_product_attention(*transposed, is_causal=True).transpose(1, 2)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    error = disagreement(ours(), plain(), dtype)
    # seven matrix products over the lower half of the score matrix, two of them forward
    return {"ours": ours, "plain torch": plain}, 7 * b * h * s * s * d / 1e9, "GFLOP/s", error


def training(*, config: GPT2Config, b: int, s: int, dtype: str) -> tuple:
    """Forward, backward and AdamW, in tokens per second; bfloat16 runs under autocast."""
    ours = without_dropout(config).train()
    plain = PlainGPT(ours)
    ids = torch.randint(config.vocab_size, (b, s + 1))

    def stepper(model: nn.Module, logits: Callable) -> Callable:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
                y = logits(ids[:, :-1])
            loss = F.cross_entropy(y.flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    ours_step = stepper(ours, lambda x: ours(x, use_cache=False).logits)
    plain_step = stepper(plain, lambda x: plain(x)[0])
    # losses after the first step differ when the gradients do
    error = disagreement([ours_step() for _ in range(3)], [plain_step() for _ in range(3)], dtype)
    return {"ours": ours_step, "plain torch": plain_step}, b * s, "tokens/s", error


def training_with_dropout(*, config: GPT2Config, b: int, s: int, dtype: str) -> tuple:
    """Forward, backward and AdamW of transformers' own model, as its defaults are, in tokens per second."""
    import transformers

    ours = GPT2LMHeadModel(config)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_dict(), attn_implementation="eager"))
    theirs.transformer.load_state_dict(ours.transformer.state_dict())  # the head is tied
    ids = torch.randint(config.vocab_size, (b, s))
    steps = {
        name: Step(model, {"input_ids": ids, "labels": ids, "use_cache": False}, dtype)
        for name, model in (("ours", ours), ("transformers, eager", theirs))
    }
    error = disagreement(*([step.without_dropout(2)] for step in steps.values()), dtype)
    return steps, b * s, "tokens/s", error


def decoding(*, config: GPT2Config, b: int, prompt: int, n: int, dtype: str) -> tuple:
    """Greedy decoding, reading the prompt included, in new tokens per second."""
    ours = without_dropout(config).to(harness.DTYPES[dtype]).eval()
    plain = PlainGPT(ours).to(harness.DTYPES[dtype])
    ids = torch.randint(config.vocab_size, (b, prompt))
    with torch.no_grad():
        error = disagreement([ours(ids).logits], [plain(ids)[0]], dtype)
    competitors = {
        "ours": lambda: ours.generate(ids, max_new_tokens=n, eos_token_id=[]),
        "plain torch": lambda: plain.generate(ids, n),
    }
    return competitors, b * n, "tokens/s", error


def without_dropout(config: GPT2Config) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(replace(config, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def disagreement(ours, plain, dtype: str) -> str | None:
    """What is wrong when the tensors of both differ by more than rounding, else None."""
    limit = 1e-4 if dtype == "float32" else 3e-2
    for i, (x, y) in enumerate(zip(ours, plain)):
        x, y = x.detach().double(), y.detach().double()
        error = ((x - y).norm() / y.norm()).item()
        if not error < limit:
            return f"result {i} differs from plain torch's by {error:.1e}, more than {limit}"
    return None
