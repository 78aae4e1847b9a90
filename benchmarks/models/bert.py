"""BERT-base on full or ragged batches: inference and a step of fine-tuning, against what is in use.

The peers hold the same weights; int8 weights, the rest in bfloat16, are compared with our own model without them. Of a
ragged batch (lengths s / b, 2 s / b, ... s) the others compute the padding too, as always. Inference in bfloat16 has
bfloat16 weights, training in bfloat16 is autocast; dropout is on in training.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

import lmkernels.models
from benchmarks import harness
from lmkernels.models.quantized import quantize

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Shape:
    b: int = 8
    s: int = 128
    ragged: bool = False
    layers: int = 12
    width: int = 768

    def config(self, module=lmkernels.models, **options):
        """Of lmkernels.models or transformers."""
        return module.BertConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            intermediate_size=4 * self.width,
            **options,
        )

    @property
    def lengths(self) -> torch.Tensor:
        """(b,), from s / b to s where they differ."""
        return torch.arange(1, self.b + 1) * self.s // self.b if self.ragged else torch.full((self.b,), self.s)

    def batch(self) -> dict[str, torch.Tensor]:
        ids = torch.randint(1000, 30000, (self.b, self.s), generator=torch.Generator().manual_seed(1), device="cpu")
        mask = (torch.arange(self.s, device="cpu") < self.lengths.cpu()[:, None]).long()
        return {"input_ids": (ids * mask).to(harness.device), "attention_mask": mask.to(harness.device)}


# one at a time: of BERT-base, and of a model for embeddings
SENTENCES = tuple(
    Shape(b=1, s=s, layers=layers, width=width) for layers, width in ((12, 768), (6, 384)) for s in (16, 64)
)


def lines() -> list[harness.Line]:
    return [
        line(direction, Shape(ragged=ragged), dtype)
        for direction in ("inference", "classification", "training")
        for ragged in (False, True)
        for dtype in DTYPES
    ] + [
        *(line("int8 inference", Shape(ragged=ragged), "bfloat16") for ragged in (False, True)),
        *(line("sentence", shape, dtype) for shape in SENTENCES for dtype in DTYPES),
    ]


@functools.cache
def weights(shape: Shape) -> dict[str, torch.Tensor]:
    """Those of a classifier, made once: initialising 110 million parameters takes seconds."""
    torch.manual_seed(0)
    with harness.device:
        return lmkernels.models.BertForSequenceClassification(shape.config()).state_dict()


def model(module, name: str, shape: Shape, dtype: str = "float32", **options):
    """The class `name` of lmkernels.models or transformers with the common weights."""
    with torch.device("meta"):
        made = getattr(module, name)(shape.config(module, **options))
    state = weights(Shape(layers=shape.layers, width=shape.width))
    if name == "BertModel":
        state = {key.removeprefix("bert."): x for key, x in state.items() if key.startswith("bert.")}
    made.load_state_dict({key: x.clone() for key, x in state.items()}, assign=True)
    for key, buffer in list(made.named_buffers()):  # transformers' are not in its state_dict
        with harness.device:
            fresh = torch.arange(buffer.numel()).view(buffer.shape) if "position" in key else torch.zeros(buffer.shape)
        owner, _, attribute = key.rpartition(".")
        setattr(made.get_submodule(owner), attribute, fresh.to(buffer.dtype))
    return made.to(harness.DTYPES[dtype])


@functools.lru_cache(maxsize=1)
def inference(dtype: str, shape: Shape, name: str = "BertModel") -> dict[str, Callable[[], torch.Tensor]]:
    """Calls that give the last hidden state, (b, s, d_model), or what the model `name` returns first."""
    import transformers

    inputs = shape.batch()
    ours = model(lmkernels.models, name, shape, dtype).eval()
    theirs = model(transformers, name, shape, dtype, attn_implementation="sdpa").eval()
    calls = {"ours": first_output(ours, inputs), "transformers": first_output(theirs, inputs)}
    if harness.device.type == "cpu" and importlib.util.find_spec("openvino"):
        theirs = model(transformers, name, shape, attn_implementation="sdpa").eval()
        calls["OpenVINO"] = openvino(theirs, inputs, dtype)
    return calls


def classification(dtype: str, shape: Shape) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls that give logits of two classes, (b, 2)."""
    return inference(dtype, shape, "BertForSequenceClassification")


@functools.lru_cache(maxsize=1)
def int8_inference(dtype: str, shape: Shape) -> dict[str, Callable[[], torch.Tensor]]:
    inputs = shape.batch()
    ours, wide = (model(lmkernels.models, "BertModel", shape, dtype).eval() for _ in range(2))
    quantize(ours, "int8")
    return {"ours": first_output(ours, inputs), f"ours, {dtype}": first_output(wide, inputs)}


def first_output(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    def call():
        with torch.no_grad():
            return module(**inputs)[0]

    return call


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
def training(dtype: str, shape: Shape) -> dict[str, Callable[[], torch.Tensor]]:
    """Steps: forward, backward and AdamW; a call returns the loss."""
    import transformers

    models = {
        "ours": (lmkernels.models, {}),
        "transformers, eager": (transformers, {"attn_implementation": "eager"}),
        "transformers, sdpa": (transformers, {"attn_implementation": "sdpa"}),
    }
    inputs = shape.batch() | {"labels": torch.arange(shape.b, device=harness.device) % 2}
    return {
        name: Step(model(module, "BertForSequenceClassification", shape, **options), inputs, dtype)
        for name, (module, options) in models.items()
    }


class Step:
    def __init__(self, module: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: str):
        self.module, self.inputs, self.dtype = module.train(), inputs, dtype
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=2e-5, fused=True)

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(harness.device.type, torch.bfloat16) if self.dtype == "bfloat16" else nullcontext():
            loss = self.module(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def without_dropout(self, steps: int) -> torch.Tensor:
        self.module.eval()
        losses = torch.stack([self() for _ in range(steps)])
        self.module.train()
        return losses


COMPETITORS = {
    "inference": inference,
    "classification": classification,
    "training": training,
    "int8 inference": int8_inference,
    "sentence": inference,
}


def wrong(direction: str, shape: Shape, dtype: str) -> str | None:
    """Why a result is wrong: the hidden states of the real tokens, logits, or the losses of steps without dropout."""
    if direction == "training":
        results = {name: step.without_dropout(2) for name, step in training(dtype, shape).items()}
    elif direction == "classification":
        results = {name: call() for name, call in classification(dtype, shape).items()}
    else:
        real = shape.batch()["attention_mask"].bool()
        results = {name: call()[real] for name, call in COMPETITORS[direction](dtype, shape).items()}
    limit = 1e-4 if dtype == "float32" else 0.1 if direction == "int8 inference" else 3e-2
    ours = results["ours"].double()
    for name, result in results.items():
        error = ((ours - result.double()).norm() / ours.norm()).item()
        if not error < limit:
            return f"differs from {name} by {error:.1e}, more than {limit}"
    return None


def name_of(shape: Shape) -> str:
    if shape.b == 1:
        return f"{shape.layers} layers of {shape.width}, s {shape.s}"
    return f"{'ragged' if shape.ragged else 'dense'}, b {shape.b} s {shape.s}"


def line(direction: str, shape: Shape, dtype: str) -> harness.Line:
    d, lengths = shape.width, shape.lengths
    tokens = int(lengths.sum())
    per_token, scores = 12 * d * d, 2 * d * int((lengths**2).sum())  # of a layer
    work = shape.layers * (tokens * per_token + scores)
    if direction in ("classification", "training"):  # of the last layer, keys, values and what the first tokens take
        work -= (tokens - shape.b) * 10 * d * d + scores - 2 * d * tokens
    return harness.Line(
        group=direction,
        case=f"{direction}, {name_of(shape)}",
        dtype=dtype,
        direction="",
        competitors=lambda: COMPETITORS[direction](dtype, shape),
        wrong=lambda: wrong(direction, shape, dtype),
        flops=2 * work * (3 if direction == "training" else 1),
    )
