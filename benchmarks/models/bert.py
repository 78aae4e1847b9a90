"""BERT-base on 8 x 128 tokens, full or ragged: inference and a step of fine-tuning, against what is in use.

The peers hold the same weights. Of a ragged batch (lengths 16, 32, ... 128) they compute the padding too, as always.
Inference in bfloat16 has bfloat16 weights, training in bfloat16 is autocast; dropout is on in training.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext

import torch

from benchmarks import harness
from lmkernels.models import BertConfig, BertForSequenceClassification

B, S = 8, 128
LENGTHS = torch.arange(16, S + 1, 16)
DTYPES = ("float32", "bfloat16")


def lines() -> list[harness.Line]:
    return [
        line(direction, ragged, dtype)
        for direction in ("inference", "training")
        for ragged in (False, True)
        for dtype in DTYPES
    ]


def batch(ragged: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1000, 30000, (B, S))
    mask = (torch.arange(S) < LENGTHS[:, None]).long() if ragged else torch.ones_like(ids)
    return {"input_ids": ids * mask, "attention_mask": mask}


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """Those of a classifier, made once: initialising 110 million parameters takes seconds."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig()).state_dict()


def model(module, name: str, dtype: str = "float32", **options):
    """The class `name` of lmkernels.models or transformers with the common weights."""
    with torch.device("meta"):
        made = getattr(module, name)(module.BertConfig(**options))
    state = weights()
    if name == "BertModel":
        state = {key.removeprefix("bert."): x for key, x in state.items() if key.startswith("bert.")}
    made.load_state_dict({key: x.clone() for key, x in state.items()}, assign=True)
    for key, buffer in list(made.named_buffers()):  # transformers' are not in its state_dict
        fresh = torch.arange(buffer.numel()).view(buffer.shape) if "position" in key else torch.zeros(buffer.shape)
        owner, _, attribute = key.rpartition(".")
        setattr(made.get_submodule(owner), attribute, fresh.to(buffer.dtype))
    return made.to(harness.DTYPES[dtype])


@functools.lru_cache(maxsize=1)
def inference(dtype: str, ragged: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls that give the last hidden state, (b, s, d_model)."""
    import transformers

    import lmkernels.models

    inputs = batch(ragged)
    ours = model(lmkernels.models, "BertModel", dtype).eval()
    theirs = model(transformers, "BertModel", dtype, attn_implementation="sdpa").eval()

    def caller(module):
        def call():
            with torch.no_grad():
                return module(**inputs)[0]

        return call

    calls = {"ours": caller(ours), "transformers": caller(theirs)}
    if importlib.util.find_spec("openvino"):
        calls["OpenVINO"] = openvino(model(transformers, "BertModel", attn_implementation="sdpa").eval(), inputs, dtype)
    return calls


def openvino(module, inputs, dtype: str) -> Callable[[], torch.Tensor]:
    import openvino

    converted = openvino.convert_model(module, example_input=inputs)
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    arrays = {name: x.numpy() for name, x in inputs.items()}
    return lambda: torch.from_numpy(request.infer(arrays)[0])


@functools.lru_cache(maxsize=1)
def training(dtype: str, ragged: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """Steps: forward, backward and AdamW; a call returns the loss."""
    import transformers

    import lmkernels.models

    models = {
        "ours": (lmkernels.models, {}),
        "transformers, eager": (transformers, {"attn_implementation": "eager"}),
        "transformers, sdpa": (transformers, {"attn_implementation": "sdpa"}),
    }
    inputs = batch(ragged) | {"labels": torch.arange(B) % 2}
    return {
        name: Step(model(module, "BertForSequenceClassification", **options), inputs, dtype)
        for name, (module, options) in models.items()
    }


class Step:
    def __init__(self, module: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: str):
        self.module, self.inputs, self.dtype = module.train(), inputs, dtype
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=2e-5, fused=True)

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if self.dtype == "bfloat16" else nullcontext():
            loss = self.module(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def without_dropout(self, steps: int) -> torch.Tensor:
        self.module.eval()
        losses = torch.stack([self() for _ in range(steps)])
        self.module.train()
        return losses


def wrong(direction: str, ragged: bool, dtype: str) -> str | None:
    """Why a result is wrong: the hidden states of the real tokens, or the losses of steps without dropout."""
    if direction == "inference":
        real = batch(ragged)["attention_mask"].bool()
        results = {name: call()[real] for name, call in inference(dtype, ragged).items()}
    else:
        results = {name: step.without_dropout(2) for name, step in training(dtype, ragged).items()}
    limit = 1e-4 if dtype == "float32" else 3e-2
    ours = results["ours"].double()
    for name, result in results.items():
        error = ((ours - result.double()).norm() / ours.norm()).item()
        if not error < limit:
            return f"differs from {name} by {error:.1e}, more than {limit}"
    return None


def line(direction: str, ragged: bool, dtype: str) -> harness.Line:
    config = BertConfig()
    d = config.hidden_size
    lengths = LENGTHS if ragged else torch.full((B,), S)
    per_token = config.num_hidden_layers * (4 * d * d + 2 * d * config.intermediate_size)
    scores = config.num_hidden_layers * 2 * d * int((lengths**2).sum())
    return harness.Line(
        group=direction,
        case=f"{direction}, {'ragged' if ragged else 'dense'}, b {B} s {S}",
        dtype=dtype,
        direction="",
        competitors=lambda: {"inference": inference, "training": training}[direction](dtype, ragged),
        wrong=lambda: wrong(direction, ragged, dtype),
        flops=2 * (int(lengths.sum()) * per_token + scores) * (3 if direction == "training" else 1),
    )
