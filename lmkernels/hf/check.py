"""Whether a Hugging Face model computes the same on "lmkernels" as with its own eager attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.attention import capture_attention

EAGER, OURS = "eager", "lmkernels"
# relative error (root mean square) of what should be equal to rounding; a wrong mask changes an attention layer by more
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# gradients add up the errors of every layer above
GRADIENT_FACTOR = 5
NEW_TOKENS = 8


@dataclass(frozen=True)
class Line:
    """One comparison: passed (True or False), or None and a note that says why it could not be made."""

    what: str
    passed: bool | None
    error: float | None = None
    note: str = ""

    def __str__(self) -> str:
        verdict = {True: "equal", False: "DIFFERENT", None: "not checked"}[self.passed]
        error = "" if self.error is None else f"{self.error:.1e}"
        return f"{self.what:<28}{verdict:<13}{error:<9}{self.note}".rstrip()


@dataclass(frozen=True)
class Report:
    """What was compared. `ok`: the outputs at least were, and nothing differs. Prints as a table."""

    model: str
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        return self.lines[0].passed is not None and not self._differs

    @property
    def _differs(self) -> bool:
        return any(line.passed is False for line in self.lines)

    def __str__(self) -> str:
        head = f"{self.model}: lmkernels against eager attention (relative error, root mean square)"
        verdict = "agrees" if self.ok else "nothing was compared"
        if self._differs:
            verdict = "DOES NOT AGREE: keep this model on 'sdpa' or 'eager'"
        return "\n".join([head, *(f"  {line}" for line in self.lines), f"  {verdict}"])


def check(model, inputs: dict[str, Tensor] | None = None, *, verbose: bool = True) -> Report:
    """Compares a Hugging Face model on "lmkernels" with itself on eager attention, in seconds.

        print(lmkernels.hf.check(model).ok)

    In eval mode, on a small batch: the outputs (logits) with padding on both sides and without padding, the output of
    every attention layer, the gradient of every parameter, rows alone against the same rows in a padded batch, and
    `generate`, with the default and with a static cache. What cannot be compared is listed with the reason.

    inputs: a batch as the model's forward takes it; None draws one of random tokens, sound or pixels.
    verbose: print the table.

    The model is left as it was, its gradients, modes, hooks and attention implementation included, and so are torch's
    random numbers. Costs a few forward passes, and the memory of two sets of gradients.

    Raises TypeError for what is not a Hugging Face model, ValueError where no inputs can be made up for it, ImportError
    without transformers>=5.15,<6.
    """
    from . import register

    register()
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        raise TypeError(f"model must be a Hugging Face model (a PreTrainedModel), got {type(model).__name__}")
    with _unchanged(model), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        lines = tuple(_lines(model, inputs))
    report = Report(type(model).__name__, lines)
    if verbose:
        print(report)
    return report


def _lines(model, given: dict[str, Tensor] | None) -> Iterator[Line]:
    inputs = _example(model) if given is None else dict(given)
    allowed = ALLOWED.get(_dtype(model), ALLOWED[torch.float32])

    def compare(what: str, ours: list[Tensor], eager: list[Tensor], factor: float = 1, note: str = "") -> Line:
        error = _relative_error(ours, eager)
        return Line(what, error <= allowed * factor, error, note)

    try:
        with capture_attention() as maps:
            on_ours = _run(model, OURS, inputs)
    except Exception as error:
        _run(model, EAGER, inputs)  # if this fails too, the inputs are at fault, and the error says how
        yield Line("outputs", False, note=_failure(OURS, error))
        return
    if not maps:
        why = "its attention does not call transformers' AttentionInterface, so lmkernels is not used"
        yield Line("outputs", None, note=why)
        return
    on_eager = _run(model, EAGER, inputs)
    yield compare("outputs", on_ours.outputs, on_eager.outputs, note=", ".join(on_eager.names))
    unpadded = {name: x for name, x in inputs.items() if not name.endswith("attention_mask")}
    if len(unpadded) < len(inputs):
        outputs = (_run(model, implementation, unpadded).outputs for implementation in (OURS, EAGER))
        yield compare("outputs without padding", *outputs)
    layers, layers_eager = on_ours.layers, on_eager.layers
    if layers and len(layers) == len(layers_eager):
        worst = max(range(len(layers)), key=lambda i: _relative_error(layers[i][1:], layers_eager[i][1:]))
        note = f"the worst of {len(maps)} calls: {layers[worst][0]}"
        yield compare("attention layers", layers[worst][1:], layers_eager[worst][1:], note=note)
    else:
        yield Line("attention layers", None, note="no module is called ...Attention")
    if on_eager.gradients:
        note = f"of {len(on_eager.gradients)} parameters"
        yield compare("gradients", on_ours.gradients, on_eager.gradients, GRADIENT_FACTOR, note)
    else:
        yield Line("gradients", None, note="no parameter that reaches the outputs requires one")
    yield _alone_or_padded(model, inputs, given is not None, allowed)
    for cache in (None, "static"):
        what = "generate" if cache is None else f"generate, {cache} cache"
        yield _generate(model, inputs, what, cache, allowed)


@dataclass(frozen=True)
class _Result:
    names: list[str]
    outputs: list[Tensor]
    layers: list[tuple]  # (name of the attention module, its output)
    gradients: list[Tensor]


def _run(model, implementation: str, inputs: dict[str, Tensor]) -> _Result:
    """Outputs, attention layers and gradients, at the places where there is a token."""
    _use(model, implementation)
    layers, handles = [], []
    tokens: dict[tuple, Tensor] = {}  # of each shape (b, s), where both encoder and decoder have a token
    for name in ("attention_mask", "decoder_attention_mask"):
        if name in inputs:
            mask = inputs[name].bool()
            tokens[mask.shape] = mask & tokens.get(mask.shape, mask)

    def keep(name):
        def hook(module, arguments, output):
            x = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(x, Tensor) and x.is_floating_point():
                layers.append((name, _at_tokens(x.detach(), tokens)))

        return hook

    for name, module in model.named_modules():
        if "Attention" in type(module).__name__:
            handles.append(module.register_forward_hook(keep(name)))
    try:
        with torch.enable_grad():
            found = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    outputs = {
        name: _at_tokens(x, tokens)
        for name, x in found.items()
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0
    }
    generator = torch.Generator().manual_seed(1)
    weighted = [
        (x.float() * torch.randn(x.shape, generator=generator).to(x.device)).sum()
        for x in outputs.values()
        if x.requires_grad
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(weighted), parameters, allow_unused=True) if weighted and parameters else ()
    gradients = [g.detach() for g in gradients if g is not None]
    return _Result(list(outputs), [x.detach() for x in outputs.values()], layers, gradients)


def _at_tokens(x: Tensor, tokens: dict[tuple, Tensor]) -> Tensor:
    """x (b, s, ...) without its padding, where there is a mask (b, s): what a query of padding gives is undefined."""
    mask = tokens.get(x.shape[:2])
    return x if mask is None else x[mask]


def _alone_or_padded(model, inputs: dict[str, Tensor], given: bool, allowed: float) -> Line:
    """Each row alone against the same row in a batch that is padded on the right."""
    what = "padded = unpadded rows"
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if given or ids is None or mask is None:
        return Line(what, None, note="only with tokens of its own making" if given else "the inputs have no padding")
    lengths = mask.sum(1)
    right = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    others = {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}
    padding = _padding_id(model)
    _use(model, OURS)
    with torch.no_grad():
        name, padded = _first_output(
            model(input_ids=ids.masked_fill(~right, padding), attention_mask=right.long(), **others)
        )
        together, alone = [], []
        for i, n in enumerate(lengths.tolist()):
            row = {name: x[i : i + 1] for name, x in others.items()}
            _, x = _first_output(model(input_ids=ids[i : i + 1, :n], attention_mask=mask.new_ones(1, n), **row))
            together.append(padded[i, : x.shape[1]] if x.dim() > 2 else padded[i])
            alone.append(x[0])
    error = _relative_error(together, alone)
    return Line(what, error <= allowed, error, name)


def _generate(model, inputs: dict[str, Tensor], what: str, cache: str | None, allowed: float) -> Line:
    """The scores of greedy tokens, up to where the tokens of a row part: there they must be a tie within rounding."""
    if not hasattr(model, "can_generate") or not model.can_generate():
        return Line(what, None, note="the model does not generate")
    prompt = {name: x for name, x in inputs.items() if not name.startswith(("decoder_", "labels"))}
    if "attention_mask" in prompt and not model.config.is_encoder_decoder and "input_ids" in prompt:
        # generate continues the last token: the padding of every row goes to the left
        order = prompt["attention_mask"].argsort(dim=1, stable=True)
        prompt |= {name: prompt[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    options = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "num_beams": 1,
        "output_scores": True,
        "return_dict_in_generate": True,
        "cache_implementation": cache,
        "pad_token_id": _padding_id(model),
    }
    found = {}
    for implementation in (EAGER, OURS):
        _use(model, implementation)
        try:
            with torch.no_grad():
                found[implementation] = model.generate(**prompt, **options)
        except Exception as error:
            return Line(what, None if implementation == EAGER else False, note=_failure(implementation, error))
    eager, ours = found[EAGER], found[OURS]
    steps = len(eager.scores)
    if len(ours.scores) != steps:
        return Line(what, False, note=f"{len(ours.scores)} steps, eager {steps}")
    tokens, tokens_eager = ours.sequences[:, -steps:], eager.sequences[:, -steps:]
    agrees = (tokens == tokens_eager).long().cumprod(1).bool()  # (b, steps)
    comparable = torch.nn.functional.pad(agrees, (1, -1), value=True)  # the step at which they part is the last
    scores, scores_eager = (torch.stack(x.scores, 1).float()[comparable] for x in (ours, eager))  # (n, vocab)
    # processors hide tokens by -inf (the end of the text, here), in both
    finite = scores_eager.isfinite() & scores.isfinite()
    scores, scores_eager = scores[finite], scores_eager[finite]
    error = _relative_error([scores], [scores_eager])
    note = f"{int(agrees.sum())} of {agrees.numel()} tokens equal"
    if not agrees.all() and error <= allowed:
        note += ": the others follow on a tie within rounding"
    return Line(what, error <= allowed, error, note)


def _failure(implementation: str, error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"fails on {implementation}: {type(error).__name__}: {first_line[:120]}"


# --- the model


def _configs(model) -> list:
    """The configurations that say which attention runs: the model's, and those of the models in it."""
    owners = [model, *model.modules()]
    configs = [x.config for x in owners if hasattr(getattr(x, "config", None), "_attn_implementation_internal")]
    return list({id(config): config for config in configs}.values())


def _use(model, implementation: str) -> None:
    # not set_attn_implementation: that of T5 reaches neither encoder nor decoder in transformers 5.15
    for config in _configs(model):
        config._attn_implementation_internal = implementation


@contextmanager
def _unchanged(model) -> Iterator[None]:
    """Eval mode inside; modes and attention implementations as before behind it, whatever happens."""
    implementations = [(config, config._attn_implementation_internal) for config in _configs(model)]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for config, implementation in implementations:
            config._attn_implementation_internal = implementation
        for module, mode in modes:
            module.training = mode


def _dtype(model) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _padding_id(model) -> int:
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if padding is None else padding


def _first_output(found) -> tuple[str, Tensor]:
    return next((name, x) for name, x in found.items() if isinstance(x, Tensor) and x.is_floating_point())


def _relative_error(xs: list[Tensor], ys: list[Tensor]) -> float:
    """Root mean square of the differences over that of ys; infinite where shapes differ or something is not finite."""
    if len(xs) != len(ys) or any(x.shape != y.shape for x, y in zip(xs, ys)):
        return float("inf")
    difference = sum((x.double() - y.double()).square().sum().item() for x, y in zip(xs, ys))
    size = sum(y.double().square().sum().item() for y in ys)
    error = (difference / size) ** 0.5 if size > 0 else difference**0.5
    return error if error == error else float("inf")


# --- inputs


def _example(model) -> dict[str, Tensor]:
    """A batch of three random rows for the model's forward, of different lengths where it takes a mask."""
    config, name = model.config, model.main_input_name
    text, parameters = config.get_text_config(), inspect.signature(model.forward).parameters
    device, dtype, b = next(model.parameters()).device, _dtype(model), 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    inputs = {}
    s = min(24, _positions(text) // 2)
    if name == "input_ids":
        inputs["input_ids"] = _random_tokens(text, b, s).to(device)
        if "attention_mask" in parameters:
            inputs["attention_mask"] = _ragged(b, s).to(device)
    elif name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        inputs["input_features"] = normal(b, config.num_mel_bins, 2 * config.max_source_positions)
    elif name == "input_values":
        inputs["input_values"] = normal(b, 8000)
    elif name == "pixel_values" and isinstance(size := getattr(config, "image_size", None), int):
        inputs["pixel_values"] = normal(b, getattr(config, "num_channels", 3), size, size)
    else:
        raise ValueError(
            f"inputs must be given for {type(model).__name__}, whose main input is {name!r}: a batch, as a dict"
        )
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _random_tokens(text, b, s).to(device)
        if "decoder_attention_mask" in parameters:
            inputs["decoder_attention_mask"] = _ragged(b, s).to(device)
    return inputs


def _positions(config) -> int:
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    return min((n for name in names if isinstance(n := getattr(config, name, None), int) and n > 0), default=512)


def _ragged(b: int, s: int) -> Tensor:
    """(b, s) int64: a whole row, one padded on the left, one on the right."""
    mask = torch.ones(b, s, dtype=torch.int64)
    mask[1, : s // 3] = 0
    mask[2, s // 2 :] = 0
    return mask


def _random_tokens(config, b: int, s: int) -> Tensor:
    """(b, s) int64, none of them one that the configuration gives a meaning (padding, the end, an image)."""
    special = {value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))}
    ordinary = [i for i in range(min(config.vocab_size, 10_000)) if i not in special]
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (b, s))]
