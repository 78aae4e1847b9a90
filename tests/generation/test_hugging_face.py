"""Hugging Face's generate, called with the same arguments on the same weights, writes the same tokens."""

import warnings

import pytest
import torch

from .conftest import VOCAB

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ENDS = {"eos_token_id": [1, 5, 7, 9, 12, VOCAB - 1], "pad_token_id": 3, "max_new_tokens": 30}
FEW = {"do_sample": True, "top_k": 10}
MODES = {
    "greedy": {},
    "sample": {"do_sample": True},
    "samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam-samples": {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
}
PROCESSORS = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[4], [7, 8], [31], [5], [42, 42, 23]]},
    {"sequence_bias": {(4,): 3.0, (5, 6): 2.0, (31,): -4.0}},
    {"min_length": 14},
    {"min_new_tokens": 7},
    {"prefix_allowed_tokens_fn": lambda prompt, ids: [(prompt * 7 + int(ids[-1]) + k) % VOCAB for k in range(9)]},
    {"forced_eos_token_id": 5},
    {"exponential_decay_length_penalty": (3, 1.4)},
    {"suppress_tokens": [1, 2, 3, 31]},
    {"begin_suppress_tokens": [30, 31, 32, 4]},
    {"remove_invalid_values": True, "renormalize_logits": True},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "suppress_tokens": [8]},
]
FILTERS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 0},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.03},
    {"eta_cutoff": 0.2},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.03, "typical_p": 0.9},
]
BEAMS = [
    {"num_beams": beams, "early_stopping": early, "length_penalty": penalty, "num_return_sequences": returned}
    for beams, early, penalty, returned in [
        (2, False, 1.0, 1),
        (4, True, 1.0, 2),
        (5, True, 0.0, 5),
        (3, False, 2.0, 3),
        (4, False, -0.5, 1),
        (4, "never", 1.0, 4),
        (3, "never", -1.0, 1),
    ]
]


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture
def both(model, theirs, ids):
    """both(options): what Hugging Face and what this library returns, from the same seed."""

    def run(options: dict) -> tuple:
        results = []
        for writer in (theirs, model):
            torch.manual_seed(4)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                results.append(writer.generate(ids, **options))
        return tuple(results)

    return run


def name(options: dict) -> str:
    plain = (bool, int, float, str, list, type(None))
    parts = (f"{key}={value}" if isinstance(value, plain) else key for key, value in options.items())
    return "-".join(parts).replace(" ", "")


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("processor", [{}, *PROCESSORS], ids=name)
def test_every_processor_in_every_mode(both, ragged, mode, processor):
    expected, tokens = both({**ENDS, "attention_mask": ragged.long(), **mode, **processor})
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("options", FILTERS, ids=name)
@pytest.mark.parametrize("beams", [1, 3])
def test_every_filter_of_the_distribution(both, options, beams):
    expected, tokens = both({**ENDS, **options, "do_sample": True, "num_beams": beams})
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("options", BEAMS, ids=name)
@pytest.mark.parametrize("rest", [{}, ENDS, {**ENDS, "pad_token_id": 0}], ids=["one end", "ends", "pad 0"])
def test_beam_search(both, ragged, options, rest):
    expected, tokens = both({**options, **rest, "attention_mask": ragged.long()})
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 30, **FEW},
        {"use_cache": False},
        {"use_cache": False, "num_beams": 3, **ENDS},
        {"use_cache": False, "do_sample": True, **ENDS},
        {"eos_token_id": 31},
        {"eos_token_id": None, "do_sample": True},
        {"top_k": None, "top_p": None, "do_sample": True},
        {"pad_token_id": 42, "do_sample": True},
    ],
    ids=name,
)
def test_lengths_ends_and_what_none_means(both, options):
    expected, tokens = both(options)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_outputs(both, mode):
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, out = both({**ENDS, **mode, **wanted})
    assert torch.equal(out.sequences, expected.sequences) and out["sequences"] is out[0] is out.sequences
    for name in ("scores", "logits"):
        assert len(out[name]) == len(expected[name])
        for ours, theirs in zip(out[name], expected[name]):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ("beam_indices" in out) == ("beam_indices" in expected) == ("num_beams" in mode)
    if "num_beams" in mode:
        assert torch.equal(out.beam_indices, expected.beam_indices)
        torch.testing.assert_close(out.sequences_scores, expected.sequences_scores)
    assert list(both({**ENDS, **mode, "return_dict_in_generate": True})[1])[0] == "sequences"


def hugging_faces_objects():
    from transformers import LogitsProcessorList, StoppingCriteriaList
    from transformers.generation import (
        EosTokenCriteria,
        MaxLengthCriteria,
        MinLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    ends = StoppingCriteriaList([EosTokenCriteria([3, 6, 9, 11])])
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8), MinLengthLogitsProcessor(14, 5)])
    return {
        "processors": {"logits_processor": processors, **ENDS},
        "processors, beams": {"logits_processor": processors, **ENDS, **MODES["beams"]},
        "ends": {"stopping_criteria": ends, "do_sample": True, "pad_token_id": 2},
        "ends, beams": {"stopping_criteria": ends, "num_beams": 3},
        "shorter": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(13)])},
        "longer": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(35)])},
        "config": {"generation_config": transformers.GenerationConfig(**ENDS, num_beams=3, early_stopping=True)},
        "config, argument": {"generation_config": transformers.GenerationConfig(**ENDS, top_k=7), "do_sample": True},
    }


@pytest.mark.parametrize("options", hugging_faces_objects().values(), ids=hugging_faces_objects())
def test_hugging_faces_objects_work_as_they_are(both, options):
    expected, tokens = both(options)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_plain_functions_as_processors_and_criteria(both, mode):
    def bar_in_place(ids, scores):
        scores[:, ids[:, -1]] = -torch.inf
        return scores

    def multiple_of_seven(ids, scores, **rest):
        return ids[:, -1] % 7 == 0

    expected, tokens = both(
        {**MODES[mode], "logits_processor": [bar_in_place], "stopping_criteria": [multiple_of_seven], "pad_token_id": 2}
    )
    assert torch.equal(tokens, expected)


def test_defaults_of_the_model_are_used(model, theirs, ids):
    settings = {"do_sample": True, "top_k": 6, "max_new_tokens": 9, "pad_token_id": 1, "eos_token_id": [4, 31]}
    before = model.generation_config, theirs.generation_config
    try:
        model.generation_config, theirs.generation_config = settings, transformers.GenerationConfig(**settings)
        for options in ({}, {"top_k": 20}, {"generation_config": transformers.GenerationConfig(top_p=0.5)}):
            torch.manual_seed(4)
            expected = theirs.generate(ids, **options)
            torch.manual_seed(4)
            assert torch.equal(model.generate(ids, **options), expected)
    finally:
        model.generation_config, theirs.generation_config = before


def test_the_default_of_a_checkpoint_is_its_generation_config(model, theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path)
    transformers.GenerationConfig(max_new_tokens=3, eos_token_id=7).save_pretrained(tmp_path)
    ours = type(model).from_pretrained(tmp_path)
    assert torch.equal(ours.generate(ids), theirs.generate(ids, max_new_tokens=3, eos_token_id=7))


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 5},
        {"num_return_sequences": 5, "num_beams": 3},
        {"early_stopping": "soon", "num_beams": 2},
        {"max_length": 8},
        {"no_such_argument": 1},
        {"bad_words_ids": []},
        {"bad_words_ids": [4]},
        {"stop_strings": "x"},
        {"num_beams": 2, "streamer": object()},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=name,
)
def test_what_they_refuse_is_refused_in_their_words(model, theirs, ids, options):
    with pytest.raises(ValueError) as expected:
        theirs.generate(ids, **options)
    with pytest.raises(ValueError) as error:
        model.generate(ids, **options)
    assert str(error.value).split(".")[0] == str(expected.value).split(".")[0]
