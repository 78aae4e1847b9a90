"""Stop strings: found where they end in the newest token, as Hugging Face finds them."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from lmkernels.generation.stopping import StopStrings

from .conftest import random_model

TEXT = "stop the stops, dont stöp. to the top of the pots; öäü ööö.\n\nstopping " * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, show_progress=False, special_tokens=["<e>"]
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


STRINGS = ["stop", ["top", "po"], "ö", "öp.", "the t", ".\n", "<e>", ["zzz", "s s"], "oo"]


@pytest.mark.parametrize("strings", STRINGS, ids=str)
def test_every_place_is_the_one_that_hugging_face_finds(tokenizer, strings):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.StopStringCriteria(
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer), stop_strings=strings
    )
    ours = StopStrings(strings, tokenizer)
    wrapped = StopStrings(strings, transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    generator, vocab = torch.Generator().manual_seed(1), tokenizer.get_vocab_size()
    text = torch.tensor(tokenizer.encode(TEXT).ids)
    random = torch.randint(vocab, (3, text.numel()), generator=generator)
    ids = torch.cat([text[None], random, text.where(torch.rand(3, text.numel(), generator=generator) < 0.7, random)])
    found = 0
    for end in range(1, ids.shape[1]):
        expected = theirs(ids[:, :end], None)
        assert torch.equal(ours(ids[:, :end]), expected), tokenizer.decode(ids[0, :end].tolist())
        assert torch.equal(wrapped(ids[:, :end]), expected)
        found += int(expected.sum())
    assert found > 0 or "zzz" in strings or strings in ("<e>", "oo")


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sample", "beams"])
def test_rows_end_with_their_stop_string(tokenizer, mode, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vocab = tokenizer.get_vocab_size()
    model = random_model(vocab_size=vocab)
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids = torch.randint(vocab, (4, 6), generator=torch.Generator().manual_seed(0))
    free = model.generate(ids, max_new_tokens=20, seed=0, **mode)[:, 6:]
    stops = [tokenizer.decode(row[k : k + 2].tolist()) for row, k in zip(free, (2, 9, 4, 13))]
    stops = [stop for stop in stops if stop and "\ufffd" not in stop] or ["a"]
    options = {"max_new_tokens": 20, "stop_strings": stops, "pad_token_id": 0, **mode}
    torch.manual_seed(0)
    tokens = model.generate(ids, tokenizer=tokenizer, **options)
    torch.manual_seed(0)
    hub = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert torch.equal(tokens, theirs.generate(ids, tokenizer=hub, **options))


@pytest.mark.parametrize("strings", ["", [], ["a", ""], [3]])
def test_what_is_no_text_is_a_named_error(tokenizer, strings):
    with pytest.raises(ValueError, match="stop_strings must be a text or a list of texts"):
        StopStrings(strings, tokenizer)
