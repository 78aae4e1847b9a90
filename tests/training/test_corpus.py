"""Text is found, tokenised and sampled as promised."""

import numpy as np
import pytest
import torch

from lmkernels.training.corpus import find_corpus, is_text
from lmkernels.training.tokens import (
    END_OF_TEXT,
    Windows,
    held_back_batches,
    read_tokens,
    train_tokenizer,
    write_tokens,
)


def test_default_corpus_is_the_standard_library_without_tests_and_packages():
    corpus = find_corpus([])
    names = {path.name for path in corpus.paths}
    assert {"argparse.py", "dataclasses.py"} <= names and corpus.size > 1_000_000
    assert not {"site-packages", "test"} & {part for path in corpus.paths for part in path.parts}


def test_folders_are_searched_and_binary_and_hidden_files_passed_over(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.txt").write_text("text")
    (tmp_path / "b.md").write_text("é" * 5000)
    (tmp_path / "c.bin").write_bytes(b"a\0b")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xfa" * 10)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_text("no")
    corpus = find_corpus([str(tmp_path), str(tmp_path / "b.md")])
    assert sorted(path.name for path in corpus.paths) == ["a.txt", "b.md"]
    assert corpus.size == 4 + 10000


def test_a_sample_that_cuts_a_character_is_still_text(tmp_path):
    (tmp_path / "a").write_text("x" + "€" * 2000)
    assert is_text(tmp_path / "a")


def test_max_bytes_limits_the_corpus(corpus):
    assert 0 < find_corpus([str(corpus)], max_bytes=9000).size <= 9000


def test_long_files_come_in_pieces_that_add_up(tmp_path):
    text = "".join(f"line {i}\n" for i in range(200_000))
    (tmp_path / "long.txt").write_text(text)
    pieces = list(find_corpus([str(tmp_path)]).documents())
    assert len(pieces) > 1 and "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda p: p / "nowhere", FileNotFoundError, "does not exist"),
        (lambda p: p, ValueError, "corpus must hold text, found none"),
        (lambda p: (p / "empty.txt").touch() or p / "empty.txt", ValueError, "corpus must hold text"),
        (lambda p: (p / "x").write_bytes(b"\0") and p / "x", ValueError, "corpus must be UTF-8 text"),
    ],
    ids=["missing", "empty folder", "empty file", "binary file"],
)
def test_bad_corpus_is_a_named_error(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        find_corpus([str(make(tmp_path))])


def test_tokens_decode_to_the_corpus_with_an_end_after_each_file(corpus, tmp_path):
    found = find_corpus([str(corpus)])
    tokenizer = train_tokenizer(found, 400)
    read = []
    write_tokens(found, tokenizer, tmp_path, read.append)
    tokens = read_tokens(tmp_path)
    assert tokens.dtype == np.uint16 and sum(read) == found.size
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    assert text == "".join(path.read_text() + END_OF_TEXT for path in found.paths)


def test_bytes_that_the_tokenizer_never_saw_survive(corpus):
    tokenizer = train_tokenizer(find_corpus([str(corpus)]), 300)
    assert tokenizer.decode(tokenizer.encode("naïve 漢字 🙂\t").ids) == "naïve 漢字 🙂\t"


def test_small_vocabulary_is_a_named_error(corpus):
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_tokenizer(find_corpus([str(corpus)]), 256)


def test_cut_token_file_is_a_named_error(corpus, tmp_path):
    found = find_corpus([str(corpus)])
    write_tokens(found, train_tokenizer(found, 300), tmp_path, lambda n: None)
    file = tmp_path / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens.bin must hold \d+ tokens"):
        read_tokens(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        read_tokens(tmp_path)


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    tokens = np.arange(101, dtype=np.uint16)
    windows = Windows(tokens, block_size=10, seed=3)
    first, second = windows.batch(0, windows.per_epoch), windows.batch(windows.per_epoch, windows.per_epoch)
    for epoch in (first, second):
        starts = epoch[:, 0].sort().values
        assert (starts.diff() == 10).all() and epoch.shape == (9, 11)
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(11))
    assert not torch.equal(first, second)


def test_a_window_depends_on_its_number_and_the_seed_only():
    tokens = np.random.default_rng(0).integers(0, 99, 1000).astype(np.uint16)
    one, other = Windows(tokens, 8, seed=1), Windows(tokens, 8, seed=1)
    one.batch(0, 300)
    assert torch.equal(one.batch(300, 5), other.batch(300, 5))
    assert not torch.equal(one.batch(0, 9), Windows(tokens, 8, seed=2).batch(0, 9))


def test_one_window_of_tokens_is_enough():
    assert Windows(np.arange(9), block_size=8, seed=0).batch(0, 3).tolist() == [list(range(9))] * 3
    assert [b.tolist() for b in held_back_batches(np.arange(9), 8, 4, 10)] == [[list(range(9))]]


def test_held_back_windows_are_the_same_each_time_and_spread_out():
    tokens = np.arange(1000)
    batches = list(held_back_batches(tokens, block_size=9, batch_size=4, n=10))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    starts = torch.cat(batches)[:, 0]
    assert starts[0] == 0 and starts[-1] == 990 and torch.equal(torch.cat(batches)[:, -1], starts + 9)
