"""generate() writes what the model says, with Hugging Face's arguments, defaults and random numbers."""

import io

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lmkernels.generation import TextStreamer, processors

from .conftest import VOCAB


def test_greedy_takes_the_most_likely_token_each_time(model, ids):
    tokens = ids
    for _ in range(10):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=10, eos_token_id=[]), tokens)


@pytest.mark.parametrize("do_sample", [False, True])
def test_cached_decoding_equals_uncached(model, ids, do_sample):
    options = {"max_new_tokens": 30, "do_sample": do_sample, "seed": 5, "eos_token_id": []}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_ragged_prompts_give_what_each_gives_alone(model, ids):
    prompts = [ids[0, 5:], ids[1].tolist(), ids[2, 7:]]
    together = model.generate(prompts, max_new_tokens=12, eos_token_id=[])
    for row, prompt in zip(together, prompts):
        alone = model.generate([prompt], max_new_tokens=12, eos_token_id=[])
        assert torch.equal(row[-12:], alone[0, -12:])


def test_padding_is_told_by_the_mask_or_by_the_pad_token(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = ids.masked_fill(mask == 0, 7)
    by_mask = model.generate(padded, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(by_mask[0, 5:], model.generate(ids[:1, 5:], max_new_tokens=6)[0])
    padded = (ids + (ids == 7)).masked_fill(mask == 0, 7)
    by_token = model.generate(padded, pad_token_id=7, max_new_tokens=6)
    assert torch.equal(by_token, model.generate(padded, attention_mask=mask, pad_token_id=7, max_new_tokens=6))


def test_rows_that_are_done_are_padded_and_the_loop_stops_early(model, ids):
    free = model.generate(ids, max_new_tokens=20, eos_token_id=[])
    ends = free[:, 10].tolist()
    tokens = model.generate(ids, max_new_tokens=20, eos_token_id=ends, pad_token_id=3)
    assert tokens.shape[1] <= 11
    for row, expected in zip(tokens[:, 8:], free[:, 8:]):
        end = next(i for i, token in enumerate(expected.tolist()) if token in ends)
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert (row[end + 1 :] == 3).all()


def test_samples_of_a_prompt_lie_side_by_side(model, ids):
    tokens = model.generate(ids, do_sample=True, num_return_sequences=4, max_new_tokens=5, seed=1)
    assert tokens.shape == (12, 13)
    assert torch.equal(tokens[:, :8], ids.repeat_interleave(4, 0))
    assert len({tuple(row.tolist()) for row in tokens[:4]}) > 1


def test_seed_repeats_the_draw_and_leaves_torchs_generator_alone(model, ids):
    state = torch.get_rng_state()
    first = model.generate(ids, do_sample=True, seed=9)
    assert torch.equal(first, model.generate(ids, do_sample=True, seed=9))
    assert not torch.equal(first, model.generate(ids, do_sample=True, seed=10))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(9)
    assert torch.equal(first, model.generate(ids, do_sample=True))


def test_lengths_follow_hugging_face(model, ids):
    def length(**options):
        return model.generate(ids, eos_token_id=[], **options).shape[1]

    assert length() == 8 + 20
    assert length(max_length=12) == 12
    with pytest.warns(UserWarning, match="`max_new_tokens` will take precedence"):
        assert length(max_length=12, max_new_tokens=9) == 17
    assert model.generate(ids.repeat(1, 5), eos_token_id=[]).shape[1] == 48


def test_top_k_keeps_k_and_top_p_the_smallest_set_that_reaches_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for kept, left in (
        (processors.top_k(None, logits, 2), [True, True, False, False]),
        (processors.top_p(None, logits, 0.7), [True, True, False, False]),
        (processors.top_p(None, logits, 0.01), [True, False, False, False]),
        (processors.top_p(None, logits, 0.01, at_least=3), [True, True, True, False]),
    ):
        assert (kept > -torch.inf).tolist() == [left]
        assert torch.equal(kept[kept > -torch.inf], logits[0, : sum(left)])


class Recorder:
    def __init__(self):
        self.calls, self.ended = [], False

    def put(self, tokens):
        self.calls.append(tokens)

    def end(self):
        self.ended = True


def test_streamer_gets_the_prompt_then_each_token_then_the_end(model, ids):
    streamer = Recorder()
    tokens = model.generate(ids[:1], max_new_tokens=4, eos_token_id=[], streamer=streamer)
    assert torch.equal(streamer.calls[0], ids[:1]) and streamer.ended
    assert torch.equal(torch.cat(streamer.calls[1:]), tokens[0, 8:])


def test_text_streamer_prints_whole_characters_only():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    prompt, text = tokenizer.encode("ab ").ids, tokenizer.encode("c é…d").ids
    file = io.StringIO()
    streamer = TextStreamer(tokenizer, file=file)
    streamer.put(torch.tensor([prompt]))
    for token in text:
        streamer.put(torch.tensor([token]))
        assert "\ufffd" not in file.getvalue()
    streamer.end()
    assert file.getvalue() == "c é…d\n"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_return_sequences": 5}, r"Greedy methods \(do_sample != True\) without beam search do not support "),
        ({"num_return_sequences": 0}, "num_return_sequences must be"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be"),
        ({"do_sample": True, "top_k": -1}, "top_k must be a whole number"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive whole number"),
        ({"max_new_tokens": 41}, r"max_new_tokens must keep .* within n_positions = 48, got 8 \+ 41"),
        ({"max_length": 8}, "Input length of input_ids is 8, but `max_length` is set to 8"),
        ({"max_length": 49}, "max_length must keep"),
        ({"attention_mask": torch.ones(3, 7)}, "attention_mask must be"),
        ({"attention_mask": torch.tensor([[1] * 7 + [0]] * 3)}, "pad prompts on the left"),
        ({"attention_mask": torch.zeros(3, 8)}, "empty prompt"),
        ({"input_ids": torch.ones(8, dtype=torch.long)}, r"input_ids must be integers \(b, s\)"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "empty prompt"),
        ({"input_ids": [[1, 2], []]}, "empty prompt"),
        ({"input_ids": []}, "list of prompts"),
        ({"input_ids": [[1, VOCAB]]}, r"input_ids must lie in \[0, 50\) \(vocab_size\), got 50"),
        ({"input_ids": torch.ones(1, 48, dtype=torch.long)}, "leave room below n_positions"),
    ],
)
def test_bad_arguments_are_named_errors(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**({"input_ids": ids} | options))


def test_unknown_argument_is_named_in_hugging_faces_words(model, ids):
    with pytest.raises(ValueError, match=r"The following `model_kwargs` are not used by the model: \['num_beam'\]"):
        model.generate(ids, num_beam=4)
