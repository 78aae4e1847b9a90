"""Hugging Face models on "lmkernels" against the same models on eager attention."""

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import lmkernels

from .tiny_models import DECODERS, ENCODERS, MODELS, SEQ2SEQ, VOCAB, build

S = 9
IDS = torch.randint(4, VOCAB, (3, S), generator=torch.Generator().manual_seed(3))
LEFT = torch.tensor([[0] * 3 + [1] * 6, [0] + [1] * 8, [1] * 9])
RIGHT = LEFT.flip(1)
# transformers renames it on the way to version 6
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"


def inputs(name, padding=True):
    """A batch for the model, and the mask of its queries (3, S)."""
    if name in ENCODERS:
        return {"input_ids": IDS, **({"attention_mask": RIGHT} if padding else {})}, RIGHT
    if name in DECODERS:
        return {"input_ids": IDS, **({"attention_mask": LEFT} if padding else {})}, LEFT
    targets = {"decoder_input_ids": IDS.flip(1), **({"decoder_attention_mask": LEFT} if padding else {})}
    if name == "whisper":
        return targets | {"input_features": torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(4))}, LEFT
    return targets | {"input_ids": IDS, **({"attention_mask": RIGHT} if padding else {})}, LEFT


def prompts(name):
    return {key: x for key, x in inputs(name)[0].items() if not key.startswith("decoder")}


def switch(model, implementation):
    for each in model.modules():  # transformers 5.15 does not hand it on to the parts of T5
        if isinstance(each, transformers.PreTrainedModel):
            each.set_attn_implementation(implementation)
            assert each.config._attn_implementation == implementation


def on_both(model, function):
    """function(model) on eager and on lmkernels."""
    results = []
    for implementation in ("eager", "lmkernels"):
        switch(model, implementation)
        results.append(function(model))
    return results


def close(actual, expected, tolerance=2e-5):
    """To rounding: relative to the largest entry, in float32."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def logits_and_gradients(model, batch, mask):
    model.zero_grad()
    logits = model(**batch).logits[mask.bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * weights).sum().backward()
    return {"logits": logits.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(tiny, name, padding):
    batch, mask = inputs(name, padding)
    mask = mask if padding else torch.ones_like(mask)
    eager, ours = on_both(tiny(name), lambda model: logits_and_gradients(model, batch, mask))
    assert ours.keys() == eager.keys()
    scale = max(x.abs().max() for x in eager.values())
    for key, expected in eager.items():
        if expected.abs().max() > 1e-4 * scale:  # of what is zero but for rounding, nothing is close to nothing
            close(ours[key], expected, 1e-4)
    assert any("relative_attention_bias" in key for key in ours) == (name == "t5")


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", DECODERS + SEQ2SEQ)
def test_generate(tiny, name, beams, cache):
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "num_beams": beams, "do_sample": False}
    eager, ours = on_both(
        tiny(name), lambda model: model.generate(**prompts(name), **options, cache_implementation=cache)
    )
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", DECODERS)
def test_chunks_of_a_prompt_into_a_cache(tiny, name):
    """Several queries behind cached keys, with a padded prompt: causality is aligned to the end."""

    def run(model):
        cache = transformers.DynamicCache(config=model.config)
        first = model(IDS[:, :5], attention_mask=LEFT[:, :5], **{CACHE: cache}).logits
        second = model(IDS[:, 5:], attention_mask=LEFT, **{CACHE: cache}).logits
        return torch.cat([first, second], 1)[LEFT.bool()]

    eager, ours = on_both(tiny(name), lambda model: torch.no_grad()(run)(model))
    close(ours, eager)


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_chunks_of_a_prompt_into_a_static_cache(tiny, padding):
    def run(model):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        parts = []
        for part in (slice(0, 4), slice(4, 8), slice(8, 9)):
            mask = LEFT[:, : part.stop] if padding else None
            parts.append(model(IDS[:, part], attention_mask=mask, **{CACHE: cache}).logits)
        return torch.cat(parts, 1)[LEFT.bool()]

    eager, ours = on_both(tiny("llama"), lambda model: torch.no_grad()(run)(model))
    close(ours, eager)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bert", "bart", "t5", "whisper"])
def test_output_attentions(tiny, name):
    batch, mask = inputs(name, padding=False)

    def run(model):
        found = model(**batch, output_attentions=True)
        kinds = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
        return {kind: found[kind] for kind in kinds if found.get(kind)}

    eager, ours = on_both(tiny(name), run)
    assert ours.keys() == eager.keys() and eager
    for kind, maps in eager.items():
        assert len(ours[kind]) == len(maps) == 2
        for actual, expected in zip(ours[kind], maps):
            close(actual, expected)
    assert not tiny(name)(**batch).get("attentions")


def test_output_attentions_of_a_static_cache_have_its_length(tiny):
    def run(model):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        return model(IDS, attention_mask=LEFT, **{CACHE: cache}, output_attentions=True).attentions[0]

    eager, ours = on_both(tiny("llama"), run)
    seen = LEFT.bool()[:, None, :, None].expand_as(eager[:, :, :S])
    assert ours.shape == (3, 4, S, 16)
    close(ours[seen], eager[seen])


def test_capture_attention_hears_a_model_that_does_not_return_its_maps(tiny):
    model = tiny("gpt2")
    switch(model, "eager")
    expected = model(IDS, output_attentions=True).attentions
    switch(model, "lmkernels")
    with lmkernels.capture_attention() as maps:
        model(IDS)
    assert len(maps) == 2
    for actual, each in zip(maps, expected):
        close(actual, each)


# --- packed sequences

LENGTHS = [4, 1, 7, 3]


def sequences():
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(4, VOCAB, (n,), generator=generator) for n in LENGTHS]


def alone(model):
    """Each sequence by itself, on eager attention."""
    switch(model, "eager")
    found = torch.cat([model(x[None]).logits[0] for x in sequences()])
    switch(model, "lmkernels")
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gpt_oss", "bert"])
def test_packed_by_the_collator(tiny, name):
    """cu_seq_lens of transformers' own collator, causal and not, in float32 on the CPU."""
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": x.tolist()} for x in sequences()])
    del batch["labels"]
    model = tiny(name)
    expected = alone(model)
    close(model(**batch).logits[0], expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2_moe"])
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_by_positions_alone(tiny, name, rows):
    """Restarting position_ids and no mask; a row holds several sequences, a batch several rows."""
    ids = torch.cat(sequences())[None].expand(rows, -1)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].expand(rows, -1)
    model = tiny(name)
    expected = alone(model)
    found = model(ids, position_ids=positions, output_attentions=True, use_cache=False)
    for row in found.logits:
        close(row, expected)
    switch(model, "eager")
    for actual, each in zip(
        found.attentions, model(ids, position_ids=positions, output_attentions=True, use_cache=False).attentions
    ):
        close(actual, each)


def test_packed_gradients(tiny):
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": x.tolist()} for x in sequences()])

    def run(model):
        keys = ("input_ids", "position_ids", "labels")
        model.zero_grad()
        # eager attention takes no cu_seq_lens: the positions tell it the same
        own = batch if model.config._attn_implementation == "lmkernels" else {key: batch[key] for key in keys}
        model(**own, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    eager, ours = on_both(tiny("llama"), run)
    close(ours, eager)


PACKING = {
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()),
    **dict.fromkeys(("max_length_q", "max_length_k"), max(LENGTHS)),
}


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_packed_sequences_with_the_bias_of_t5(tiny, part):
    """Output, maps and gradients, that of the bias's table among them."""
    model = getattr(tiny("t5"), part)
    ids = torch.cat(sequences())[None]
    weights = torch.randn(len(ids[0]), 32, generator=torch.Generator().manual_seed(5))
    options = {} if part == "encoder" else {"use_cache": False}

    def run(hidden):
        model.zero_grad()
        (hidden * weights).sum().backward()
        return {"hidden": hidden.detach()} | {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    switch(model, "eager")
    each = [model(x[None], output_attentions=True, **options) for x in sequences()]
    expected = run(torch.cat([x.last_hidden_state[0] for x in each]))
    switch(model, "lmkernels")
    whole = model(ids, output_attentions=True, **PACKING, **options)
    found = run(whole.last_hidden_state[0])
    assert found.keys() == expected.keys() and any("relative_attention_bias" in name for name in found)
    for name, x in found.items():
        close(x, expected[name])
    for layer, maps in enumerate(whole.attentions):
        blocks = torch.block_diag(*(x.attentions[layer][0, 0] for x in each))
        close(maps[0, 0], blocks)


def test_packed_sequences_take_no_bias_that_tells_their_places():
    q = torch.randn(1, 2, sum(LENGTHS), 8)
    bias = torch.arange(float(sum(LENGTHS)))[:, None].expand(1, 2, -1, sum(LENGTHS))
    with pytest.raises(NotImplementedError, match="position_bias must depend on the distance of a key from its query"):
        attend(q, q, q, None, position_bias=bias, **PACKING)
    attend(q, q, q, None, position_bias=torch.zeros(1, 2, 1, 1), **PACKING)


# --- masks


def mask(function=masking_utils.causal_mask_function, q=S, k=S, **options):
    return AttentionMaskInterface()["lmkernels"](
        batch_size=3, q_length=q, kv_length=k, mask_function=function, device=torch.get_default_device(), **options
    )


def test_masks_are_no_larger_than_what_they_say():
    both_ways, padding = masking_utils.bidirectional_mask_function, LEFT.bool()
    sliding = masking_utils.sliding_window_causal_mask_function(4)
    assert mask() is None
    assert mask(attention_mask=torch.ones_like(padding)) is None
    assert mask(both_ways, allow_is_causal_skip=False, allow_is_bidirectional_skip=True) is None
    assert mask(sliding, q=4, k=4, local_size=4) is None
    assert torch.equal(mask(attention_mask=padding), padding)
    found = mask(both_ways, attention_mask=padding, allow_is_causal_skip=False, allow_is_bidirectional_skip=True)
    assert torch.equal(found, padding[:, None, None])
    for found in (mask(sliding, local_size=4), mask(sliding, attention_mask=padding, local_size=4)):
        assert found.shape[1:] == (4, S) and found.stride(1) == 0


@pytest.mark.parametrize(
    "pattern",
    ["chunked", "sliding both ways", "or", "and", "whole"],
)
def test_any_other_mask_is_whole(pattern):
    functions = {
        "chunked": masking_utils.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.int64)),
        "sliding both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
        "or": masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, i, j: j < 2),
        "and": masking_utils.and_masks(lambda b, h, i, j: j != 1, masking_utils.causal_mask_function),
        "whole": masking_utils.causal_mask_function,
    }
    options = {"attention_mask": LEFT.bool(), "allow_is_causal_skip": pattern in ("chunked", "and")}
    found = mask(functions[pattern], **options)
    assert torch.equal(found, masking_utils.sdpa_mask(3, S, S, mask_function=functions[pattern], **options))
    assert found.shape == (3, 1, S, S)


def attend(q, k, v, attention_mask, **options):
    module = torch.nn.Module()
    module.is_causal = True
    return AttentionInterface()["lmkernels"](module, q, k, v, attention_mask, **options)


def heads(s, h=4, generator=torch.Generator().manual_seed(8)):  # noqa: B008
    return torch.randn(3, s, h, 8, generator=generator).transpose(1, 2)


def test_a_row_of_padding_gives_zeros():
    q, k, v = heads(S), heads(S), heads(S)
    padding = LEFT.bool().clone()
    padding[1] = False
    out, _ = attend(q, k, v, mask(attention_mask=padding))
    assert torch.equal(out[1], torch.zeros_like(out[1])) and torch.equal(out[0, :3], torch.zeros_like(out[0, :3]))
    assert out.isfinite().all()


def test_floating_masks_are_added():
    q, k, v, bias = heads(S), heads(S, 2), heads(S, 2), torch.randn(3, 1, S, S)
    position_bias = torch.randn(1, 4, S, S, requires_grad=True)
    out, _ = attend(q, k, v, bias, position_bias=position_bias, scaling=1.0)
    expected = F.scaled_dot_product_attention(q, k, v, bias + position_bias, scale=1.0, enable_gqa=True).transpose(1, 2)
    close(out, expected)
    gradients = (torch.autograd.grad(x.square().sum(), position_bias)[0] for x in (out, expected))
    close(*gradients)


def test_dropout_follows_torchs_generator():
    q, k, v = heads(S), heads(S), heads(S)

    def draw(seed):
        torch.manual_seed(seed)
        return attend(q, k, v, None, dropout=0.5)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    expected = attend(q, k, v, None)[0]
    assert not torch.equal(draw(1), expected)
    mean = torch.stack([draw(seed) for seed in range(400)]).mean(0)
    assert (mean - expected).abs().max() < 0.5  # five standard deviations


def test_training_drops_attention():
    model = build("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    switch(model, "lmkernels")
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_bfloat16_and_autocast(tiny):
    model = tiny("t5")
    batch, mask = inputs("t5")
    switch(model, "lmkernels")
    expected = model(**batch).logits[mask.bool()]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        close(model(**batch).logits[mask.bool()], expected, 0.1)


def test_compiled_whole():
    """One graph, mask and all, and no second one for a batch of another padding."""
    model = build("llama")
    switch(model, "lmkernels")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda ids, mask: model.model(ids, attention_mask=mask, use_cache=False)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        for padding in (LEFT, LEFT.flip(0)):
            expected = model.model(IDS, attention_mask=padding, use_cache=False)[0]
            close(compiled(IDS, padding)[padding.bool()], expected[padding.bool()])


@pytest.mark.parametrize("version", ["5.14.2", "6.0.0"])
def test_a_version_that_is_not_understood(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # it replaces itself while it is imported
    with pytest.raises(ImportError, match=rf"transformers>=5.15,<6, found {version}.*lmkernels\[hf\]"):
        lmkernels.hf.register()


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers.*lmkernels\[hf\]"):
        lmkernels.hf.register()
