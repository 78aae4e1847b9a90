"""Masked language modelling (Devlin et al. 2019): a BERT learns to predict hidden tokens from those around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from ..models import BertConfig, BertForMaskedLM
from ..models.bert import IGNORED
from ..ops.philox import philox
from .corpus import Corpus
from .settings import Settings
from .tokens import Windows, held_back_batches, split

MODEL = BertForMaskedLM
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END = "[SEP]"
# characters of a vocabulary, the commonest; text with others is [UNK]
ALPHABET = 1000
# tokens whose logits are held at a time
ROWS = 512


def train_tokenizer(corpus: Corpus, settings: Settings) -> Tokenizer:
    """BERT's WordPiece (Schuster & Nakajima 2012) with its five special tokens as 0 to 4."""
    normalizer = normalizers.BertNormalizer(lowercase=settings.lowercase)
    letters = alphabet(corpus, normalizer)
    # numbered here: the trainer numbers characters inside words as it meets them, in another order each time
    known = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    if settings.vocab_size < len(known):
        raise ValueError(
            f"vocab_size must be at least {len(known)} ({len(SPECIAL)} special tokens, and {len(letters)} characters "
            f"at the start of a word and within one), got {settings.vocab_size}"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=known,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    learner = tokenizer_of({}, normalizer)
    learner.train_from_iterator((text for text, _ in corpus.documents()), trainer)
    return tokenizer_of(learner.get_vocab(with_added_tokens=False), normalizer)


def alphabet(corpus: Corpus, normalizer: normalizers.Normalizer) -> list[str]:
    """The ALPHABET commonest characters of the corpus but white space, sorted."""
    counts = np.zeros(0x110000, np.int64)
    for text, _ in corpus.documents():
        codes = np.frombuffer(normalizer.normalize_str(text).encode("utf-32-le"), np.uint32)
        found, times = np.unique(codes, return_counts=True)
        counts[found] += times
    commonest = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    letters = [letter for letter in map(chr, commonest) if not letter.isspace()]
    return sorted(letters[:ALPHABET])


def tokenizer_of(vocabulary: dict[str, int], normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if vocabulary:
        tokenizer.post_processor = processors.BertProcessing(*((name, vocabulary[name]) for name in ("[SEP]", "[CLS]")))
        tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def configuration(settings: Settings, tokenizer: Tokenizer | None) -> BertConfig:
    """The model that the settings describe. Raises for one that cannot be built."""
    return BertConfig(
        vocab_size=settings.vocab_size if tokenizer is None else tokenizer.get_vocab_size(),
        hidden_size=settings.n_embd,
        num_hidden_layers=settings.n_layer,
        num_attention_heads=settings.n_head,
        intermediate_size=4 * settings.n_embd,
        max_position_embeddings=settings.block_size,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
    )


@dataclass
class Vocabulary:
    """A tokenizer's special tokens, special: (5,) ids, and all others, ordinary: (n,), which alone are hidden."""

    cls: int
    sep: int
    mask: int
    special: Tensor
    ordinary: Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        special = [tokenizer.token_to_id(name) for name in SPECIAL]
        if None in special:
            missing = ", ".join(name for name, i in zip(SPECIAL, special) if i is None)
            raise ValueError(f"the tokenizer must have BERT's special tokens, it has no {missing}")
        ids, special = torch.arange(tokenizer.get_vocab_size()), torch.tensor(special)
        return cls(*special[2:].tolist(), special, ids[~torch.isin(ids, special)])

    def sequences(self, ids: Tensor) -> Tensor:
        """(n, s) as (n, s + 2): between [CLS] and [SEP]."""
        return F.pad(F.pad(ids, (1, 0), value=self.cls), (0, 1), value=self.sep)


def hide(
    ids: Tensor, numbers: Tensor, vocabulary: Vocabulary, *, share: float, seed: int, stream: int
) -> tuple[Tensor, Tensor]:
    """What a model is given, and what it is to say: ids with a share of their tokens hidden, and labels, (n, s) each.

    Of every row max(1, round(share s)) ordinary tokens are drawn. 80 % of them become [MASK], 10 % any ordinary token,
    and 10 % stay; the labels are what they were, and -100 elsewhere. A row's draw depends on nothing but its
    number (n,), the seed and the stream, whatever rows are beside it.

    Devlin et al. 2019, arXiv:1810.04805, section 3.1; with the generator of attention's dropout.
    """
    n, s = ids.shape
    numbers = numbers[:, None]
    counter = (torch.arange(s), numbers & 0xFFFFFFFF, numbers >> 32, torch.tensor(stream))
    order, fate, other, _ = philox(counter, torch.tensor(seed))  # (n, s) each
    ordinary = ~torch.isin(ids, vocabulary.special)
    first = order.masked_fill(~ordinary, 1 << 32).topk(max(1, round(share * s)), largest=False).indices
    hidden = torch.zeros_like(ordinary).scatter_(1, first, True) & ordinary
    tenth = fate * 10 >> 32  # 0 to 9
    given = ids.masked_fill(hidden & (tenth < 8), vocabulary.mask)
    replacement = vocabulary.ordinary[other * len(vocabulary.ordinary) >> 32]
    return torch.where(hidden & (tenth == 8), replacement, given), ids.masked_fill(~hidden, IGNORED)


class Text:
    """tokens (n,) as sequences to learn from; the last eval_fraction of them is held back, with places hidden for good.

    A sequence is [CLS], block_size - 2 tokens of the stream wherever they begin, and [SEP].
    """

    unit = "tokens"

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, settings: Settings):
        self.settings, self.units_per_sample = settings, settings.block_size
        self.vocabulary, self.length = Vocabulary.of(tokenizer), settings.block_size - 2
        train, self.held_back = split(tokens, self.length, settings)
        self.windows = Windows(train, self.length, settings.seed, overlap=0)

    def masked(self, ids: Tensor, first: int, stream: int) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(first, first + len(ids))
        share, seed = self.settings.mlm_probability, self.settings.seed
        return hide(self.vocabulary.sequences(ids), numbers, self.vocabulary, share=share, seed=seed, stream=stream)

    def loss(self, model, first: int, n: int) -> Tensor:
        ids, labels = self.masked(self.windows.batch(first, n), first, stream=0)
        # text of nothing but unknown characters has no labels
        count = (labels != IGNORED).sum().clamp(min=1)
        ids, labels, count = (x.to(model.device) for x in (ids, labels, count))
        return model(ids, labels=labels, num_items_in_batch=count).loss

    def evaluate(self, model) -> dict[str, float]:
        settings, score, first = self.settings, Score(), 0
        for ids in held_back_batches(
            self.held_back, self.length, settings.batch_size, settings.eval_windows, overlap=0
        ):
            score.add(model, *self.masked(ids, first, stream=1))
            first += len(ids)
        return {"eval_loss": score.loss, "masked_accuracy": score.accuracy}


class Score:
    """How well a BertForMaskedLM predicts hidden tokens, summed over batches."""

    def __init__(self):
        self.total, self.right, self.count = 0.0, 0, 0

    @torch.no_grad()
    def add(self, model: BertForMaskedLM, ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> None:
        """ids, labels, attention_mask: (b, s); the logits of labels -100 are not computed."""
        ids, labels = ids.to(model.device), labels.to(model.device)
        mask = None if attention_mask is None else attention_mask.to(model.device)
        hidden, tokens = model.bert.encode(ids, mask, None, None, None, {})  # (t, d_model)
        labels = tokens.pack(labels)
        index = (labels != IGNORED).nonzero().squeeze(1)
        head = model.cls.predictions
        for some in index.split(ROWS):
            logits = head(hidden[some]).float()
            self.total += F.cross_entropy(logits, labels[some], reduction="sum").item()
            self.right += int((logits.argmax(-1) == labels[some]).sum())
        self.count += len(index)

    @property
    def loss(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def accuracy(self) -> float:
        return round(100 * self.right / max(1, self.count), 2)
