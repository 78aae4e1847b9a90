"""Speculative decoding: fewer passes, the same tokens when greedy, the same distribution when sampled."""

from collections import Counter

import pytest
import torch

from lmkernels.generation.decoder import Decoder
from lmkernels.generation.speculative import PromptLookup
from lmkernels.models import GPT2LMHeadModel
from lmkernels.models.quantized import quantize

from .conftest import random_model

REPETITIVE = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2]])


@pytest.fixture(scope="module")
def draft() -> GPT2LMHeadModel:
    return random_model(seed=1, n_embd=16, n_layer=1, n_head=2)


def passes_of(monkeypatch, model) -> list[int]:
    """A list that gets the number of tokens of every pass through `model`."""
    passes, logits = [], Decoder.logits

    def counting(self, ids, *arguments):
        if self.model is model:
            passes.append(ids.shape[1] - self.cache.length)
        return logits(self, ids, *arguments)

    monkeypatch.setattr(Decoder, "logits", counting)
    return passes


def ways(model, draft) -> list[dict]:
    """By look-up, by another model, and by the model itself, whose guesses are all right."""
    eager = {"assistant_confidence_threshold": 0.0, "num_assistant_tokens": 5}
    return [
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": draft, **eager},
        {"assistant_model": draft, **eager, "num_assistant_tokens_schedule": "heuristic"},
        {"assistant_model": draft},
        {"assistant_model": model, **eager},
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 38, "eos_token_id": []},
        {"eos_token_id": [5, 7, 9, 12]},
        {"repetition_penalty": 1.4, "eos_token_id": []},
        {"no_repeat_ngram_size": 3, "max_new_tokens": 30},
        {"min_new_tokens": 12, "eos_token_id": [5, 31, 4]},
        {"stopping_criteria": [lambda ids, scores: ids[:, -1] % 7 == 0]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_tokens_are_those_without_guesses(model, draft, ids, options, padded):
    for prompt in (ids[:1], REPETITIVE) if padded else (ids[1:2], REPETITIVE, ids[:1, :1]):
        mask = torch.ones_like(prompt)
        if padded:
            mask[0, : prompt.shape[1] // 2] = 0
        expected = model.generate(prompt, attention_mask=mask, **options)
        for way in ways(model, draft):
            assert torch.equal(model.generate(prompt, attention_mask=mask, **way, **options), expected)


def test_right_guesses_save_passes(model, ids, monkeypatch):
    passes = passes_of(monkeypatch, model)
    model.generate(ids[:1], max_new_tokens=24, eos_token_id=[], prompt_lookup_num_tokens=6)
    free = len(passes)
    passes.clear()
    # a draft with the model's own weights is always right: 1 + 5 tokens a pass
    twin = random_model()
    twin.load_state_dict(model.state_dict())
    twin_options = {"assistant_confidence_threshold": 0.0, "num_assistant_tokens": 5}
    model.generate(ids[:1], max_new_tokens=24, eos_token_id=[], assistant_model=twin, **twin_options)
    assert passes == [8, 6, 6, 6, 5] and free <= 24


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("length", [10, 30])
def test_guesses_change_no_bits(kind, length, draft):
    model = random_model()
    quantize(model, kind) if kind.startswith("int") else model.to(getattr(torch, kind))
    prompt = REPETITIVE.repeat(1, 3)[:, :length]
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 14, "eos_token_id": []}
    expected = model.generate(prompt, **options).logits
    for way in ways(model, draft):
        assert all(map(torch.equal, model.generate(prompt, **options, **way).logits, expected))


def test_prompt_lookup_saves_passes_where_the_text_repeats_itself(model, monkeypatch):
    options = {"max_new_tokens": 30, "eos_token_id": [], "suppress_tokens": [t for t in range(50) if t not in (7, 8)]}
    passes = passes_of(monkeypatch, model)
    tokens = model.generate(REPETITIVE, prompt_lookup_num_tokens=8, **options)
    assert len(passes) < 20
    assert torch.equal(tokens, model.generate(REPETITIVE, **options))


def test_prompt_lookup_proposes_what_followed_the_longest_match():
    class Settings:
        prompt_lookup_num_tokens, max_matching_ngram_size = 3, 2

    lookup = PromptLookup(Settings)
    guess = lambda tokens, room=9: lookup(torch.tensor([tokens]), room)[0].tolist()  # noqa: E731
    assert guess([5, 1, 9, 9, 2, 1, 7, 7, 2, 1]) == [7, 7, 2]
    assert guess([5, 1, 9, 8, 1]) == [9, 8, 1]
    assert guess([5, 1, 9, 8, 1], room=1) == [9]
    assert guess([1, 1]) == [1]
    assert guess([1, 2, 3]) == guess([1]) == guess([1, 2, 1], room=0) == []


@pytest.mark.parametrize("way", range(2), ids=["look-up", "draft"])
def test_samples_follow_the_models_distribution(model, draft, way):
    """Chi-square over pairs of tokens, against the exact probabilities."""
    options = {"max_new_tokens": 2, "do_sample": True, "top_k": 3, "eos_token_id": []}
    draws = 700
    torch.manual_seed(0)
    way = ways(model, draft)[way]
    pairs = Counter(tuple(model.generate(REPETITIVE, **options, **way)[0, -2:].tolist()) for _ in range(draws))

    def top(ids):
        best = model(ids).logits[0, -1].topk(3)
        return zip(best.indices.tolist(), best.values.softmax(-1).tolist())

    expected = {
        (first, second): draws * p * q
        for first, p in top(REPETITIVE)
        for second, q in top(torch.cat([REPETITIVE, torch.tensor([[first]])], 1))
    }
    assert pairs.keys() <= expected.keys()
    statistic = sum((pairs[pair] - count) ** 2 / count for pair, count in expected.items())
    # 8 degrees of freedom: 26.1 is passed once in a thousand
    assert statistic < 26.1


def test_streamer_and_outputs_hold_every_token(model, draft):
    class Recorder:
        tokens, ended = [], False

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 12}
    for way in ways(model, draft):
        streamer = Recorder()
        streamer.tokens = []
        out = model.generate(REPETITIVE, streamer=streamer, **wanted, **way)
        assert streamer.tokens == out.sequences[0].tolist() and streamer.ended
        expected = model.generate(REPETITIVE, **wanted)
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.cat(out[name]), torch.cat(expected[name]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_beams": 2}, ValueError, "num_beams must be 1"),
        ({"do_sample": True, "num_return_sequences": 2}, ValueError, "num_return_sequences has to be 1"),
        ({"use_cache": False}, ValueError, "requires a cache"),
        ({"prompt_lookup_num_tokens": 0}, ValueError, "prompt_lookup_num_tokens must be a positive whole number"),
        ({"assistant_model": object()}, TypeError, "assistant_model must be a GPT2LMHeadModel, got object"),
        ({"assistant_model": random_model(vocab_size=40)}, ValueError, "vocabulary of 50 tokens, got 40"),
        ({"assistant_model": random_model(n_positions=9)}, ValueError, "n_positions = 9"),
        ({"assistant_model": random_model(), "prompt_lookup_num_tokens": 2}, ValueError, "give one of them"),
    ],
)
def test_conflicts_are_named_errors(model, options, error, message):
    lookup = {} if "assistant_model" in options else {"prompt_lookup_num_tokens": 2}
    with pytest.raises(error, match=message):
        model.generate(REPETITIVE, **(lookup | options))
