"""generate() writes what the model says, with Hugging Face's arguments, defaults and random numbers."""

import io

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lmkernels.generation import TextStreamer, processors, search
from lmkernels.generation.decoder import Decoder
from lmkernels.models import GPT2LMHeadModel

from .conftest import VOCAB, random_model


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
    with pytest.warns(UserWarning, match=r"Unfeasible length constraints: `min_length` \(13\) is larger .* \(12\)"):
        assert length(max_length=12, min_length=13) == 12
    with pytest.warns(UserWarning, match=r"`min_new_tokens` \(5\), when added to the prompt length \(8\), is larger"):
        assert length(max_length=12, min_new_tokens=5) == 12


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


@pytest.mark.parametrize("flat", [0.02, 1.0, 4.0], ids="flat={}".format)
@pytest.mark.parametrize("at_least", [1, 3])
def test_filters_of_a_large_vocabulary_leave_what_hugging_faces_leave(flat, at_least):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    scores = flat * torch.randn(6, 5000)
    for p in (0.05, 0.5, 0.95):
        for ours, theirs in (
            (processors.top_p, transformers.TopPLogitsWarper(p, min_tokens_to_keep=at_least)),
            (processors.typical_p, transformers.TypicalLogitsWarper(p, min_tokens_to_keep=at_least)),
        ):
            left, expected = ours(None, scores, p, at_least), theirs(None, scores)
            # where sums of thousands of probabilities are compared, one token may fall to the other side
            differ = (left.isinf() != expected.isinf()).sum(-1)
            assert differ.max() <= (1 if flat == 0.02 else 0)
            assert torch.equal(left[left.isfinite()], scores[left.isfinite()])


def test_top_p_of_equal_scores_keeps_no_more_than_it_needs():
    assert int(processors.top_p(None, torch.zeros(1, 8), 0.5).isfinite().sum()) == 4


@pytest.mark.parametrize(("spread", "kept"), [(3, 2000), (15, 3000), (0.1, 3000), (3, 90)])
def test_draw_is_multinomials(spread, kept, monkeypatch):
    probabilities = (spread * torch.randn(5, 3000)).softmax(-1)
    probabilities[:, torch.randperm(3000)[kept:]] = 0
    rows = torch.arange(5)
    for _fast in (True, False):
        for seed in range(20):
            generators = [torch.Generator().manual_seed(seed) for _ in range(3)]
            expected = torch.multinomial(probabilities, 1, generator=generators[0]).squeeze(1)
            assert torch.equal(search.draw(probabilities, rows, 5, generators[1]), expected)
            left = torch.tensor([3, 0])
            assert torch.equal(search.draw(probabilities[left], left, 5, generators[2]), expected[left])
            states = [generator.get_state() for generator in generators]
            assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
        monkeypatch.setattr(search, "exponential_is_log_of_uniform", lambda: False)


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


def rows_of(monkeypatch) -> list[int]:
    """A list that gets the number of rows of every pass through a model."""
    rows, forward = [], GPT2LMHeadModel.forward

    def counting(self, input_ids, *args, **kwargs):
        rows.append(input_ids.shape[0])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", counting)
    return rows


@pytest.mark.parametrize(
    "mode",
    [{}, {"do_sample": True, "seed": 3}, {"num_beams": 3, "early_stopping": True}],
    ids=["greedy", "sample", "beams"],
)
@pytest.mark.parametrize("rest", [{}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}], ids=["", "penalties"])
def test_finished_rows_are_computed_no_more_and_the_others_do_not_notice(model, ids, ragged, monkeypatch, mode, rest):
    options = {"pad_token_id": 3, "max_new_tokens": 40 - 8, **mode, **rest}
    # an end that the first row alone is sure to meet early
    early = model.generate(ids, attention_mask=ragged, **options, eos_token_id=[])[0, 12].item()
    options["eos_token_id"] = [1, 5, 7, 9, 12, early]
    rows = rows_of(monkeypatch)
    together = model.generate(ids, attention_mask=ragged, **options)
    beams = mode.get("num_beams", 1)
    assert rows[:2] == [3, 3 * beams] and rows[-1] < 3 * beams
    assert rows[1:] == sorted(rows[1:], reverse=True)
    # where a function of the caller's sees the rows, all of them are computed
    rows.clear()
    watched = model.generate(ids, attention_mask=ragged, stopping_criteria=[lambda ids, scores: False], **options)
    assert set(rows[1:]) == {3 * beams}
    assert torch.equal(together, watched)


@torch.no_grad()
def test_what_is_left_of_a_batch_keeps_its_bits(model, ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    whole, part = (Decoder(model, mask, 48) for _ in range(2))
    whole.logits(ids), part.logits(ids)
    left = torch.tensor([2, 1])
    part.reorder(left)
    longer = torch.cat([ids, ids[:, :1]], 1)
    assert torch.equal(part.logits(longer[left]), whole.logits(longer)[left])


def test_a_prompt_is_read_once_for_all_its_samples_and_beams(model, ids, monkeypatch):
    rows = rows_of(monkeypatch)
    model.generate(ids[:1], do_sample=True, num_return_sequences=4, max_new_tokens=3, eos_token_id=[])
    model.generate(ids[:1], num_beams=4, max_new_tokens=3, eos_token_id=[])
    assert rows == [1, 4, 4, 1, 4, 4]


def test_presence_and_frequency_penalties_count_what_has_been_generated():
    ids = torch.tensor([[0, 0, 3, 1, 2, 1], [4, 4, 4, 4, 4, 0]])
    scores = torch.arange(12.0).view(2, 6)
    taken = processors.presence_and_frequency_penalty(ids, scores, presence=0.5, frequency=0.25, prompt=3)
    expected = torch.tensor([[0, 1.0, 0.75, 0, 0, 0], [0.75, 0, 0, 0, 1.0, 0]])
    torch.testing.assert_close(scores - taken, expected)


def test_presence_penalty_bars_repetition_and_frequency_penalty_acts(model, ids):
    new = model.generate(ids, presence_penalty=1e4, max_new_tokens=30, eos_token_id=[])[:, 8:]
    assert all(len(set(row.tolist())) == 30 for row in new)
    options = {"max_new_tokens": 30, "eos_token_id": []}
    assert not torch.equal(model.generate(ids, frequency_penalty=2.0, **options), model.generate(ids, **options))


def test_settings_come_from_a_dict_and_arguments_win(model, ids):
    config = {"max_new_tokens": 5, "top_k": 3, "do_sample": True, "seed": 1}
    given = {name: value for name, value in config.items() if name != "seed"}
    tokens = model.generate(ids, given, seed=1)
    assert torch.equal(tokens, model.generate(ids, **config))
    assert model.generate(ids, given, max_new_tokens=2).shape[1] == 10


def test_no_prompt_begins_with_the_bos_token(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "bos_token_id", 4)
    assert torch.equal(model.generate(max_new_tokens=6), model.generate([[4]], max_new_tokens=6))
    monkeypatch.setattr(model.generation_config, "bos_token_id", None)
    monkeypatch.setattr(model.config, "bos_token_id", None)
    with pytest.raises(ValueError, match="`bos_token_id` has to be defined when no `input_ids` are provided"):
        model.generate()


def test_max_time_ends_before_max_length(model, ids):
    assert model.generate(ids, max_time=1e-9, max_new_tokens=30, eos_token_id=[]).shape[1] == 9


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_of_a_broken_checkpoint_are_a_named_error(ids, mode, value):
    broken = random_model()
    with torch.no_grad():
        broken.transformer.ln_f.bias[3] = value
    with pytest.raises(FloatingPointError, match="logits hold NaN or infinity in row 0: its weights are broken"):
        broken.generate(ids, **mode)


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True}])
def test_processors_that_leave_no_token_are_a_named_error(model, ids, mode):
    with pytest.raises(ValueError, match="leave no token to choose"):
        model.generate(ids, suppress_tokens=list(range(VOCAB)), **mode)


def test_ctrl_c_leaves_the_model_as_it_was(model, ids):
    def interrupt(ids, scores):
        if ids.shape[1] == 12:
            raise KeyboardInterrupt
        return False

    before = model.generate(ids, max_new_tokens=9)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=9, stopping_criteria=[interrupt])
    assert torch.equal(model.generate(ids, max_new_tokens=9), before)


@pytest.mark.parametrize(
    "options, idle",
    [
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.7, "num_beams": 2}, "top_p"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"output_scores": True}, "output_scores"),
    ],
)
def test_settings_without_effect_are_warned_of(model, ids, options, idle):
    with pytest.warns(UserWarning, match=rf"The following generation flags are not valid .*'{idle}'") as caught:
        model.generate(ids, **options)
    assert caught[0].filename == __file__


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
        ({"min_length": -1}, "min_length must be a whole number"),
        ({"do_sample": True, "min_p": 1.5}, r"min_p must lie in \[0, 1\], got 1.5"),
        ({"do_sample": True, "typical_p": 0.0}, r"typical_p must lie in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive number"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be a number"),
        ({"num_beams": 0}, "num_beams must be a positive whole number, got 0"),
        ({"num_beams": True}, "num_beams must be a positive whole number, got True"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens must be a list of token ids"),
        ({"sequence_bias": {(): 1.0}}, "sequence_bias"),
        ({"prefix_allowed_tokens_fn": lambda prompt, ids: []}, "prefix_allowed_tokens_fn must allow"),
        ({"inputs": [[1]]}, "the same argument"),
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


@pytest.mark.parametrize("name, value", [("guidance_scale", 1.5), ("watermarking_config", {}), ("num_beam_groups", 2)])
def test_what_is_absent_says_so(model, ids, name, value):
    with pytest.raises(NotImplementedError, match=name):
        model.generate(ids, **{name: value})


def test_what_is_no_function_is_a_named_error(model, ids):
    with pytest.raises(TypeError, match="logits_processor must be a list of functions"):
        model.generate(ids, logits_processor=[3])
