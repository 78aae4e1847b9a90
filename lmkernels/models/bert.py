"""BERT (Devlin et al. 2019) with all its heads on lmkernels' ops, with Hugging Face's names for weights and arguments.

A batch with an attention mask runs without its padding: the real tokens are packed before the embedding, every layer
sees (t, d_model) of them, and what a head returns is unpacked at the end, in training as in inference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..nn import LayerNorm, Linear
from ..nn._scope import is_for_torch
from ..nn.encoder import is_watched
from ..ops._checks import autocast
from ..ops.attention.capture import listening
from ..ops.embed import embed
from ..ops.encoder_layers import native
from ..ops.encoder_layers.autograd import trains
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.norms import layer_norm
from ..ops.positions import add_positions
from ..ops.quantize_weight import QuantizedWeight
from .bert_padding import AllTokens, RealTokens, real_tokens
from .dropout import Dropout
from .gpt2 import ACTIVATIONS, check_range
from .outputs import (
    BaseModelOutputWithPooling,
    BertForPreTrainingOutput,
    MaskedLMOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from .pretrained import PretrainedConfig, PretrainedModel
from .project import project, weights_of

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# the label of what does not count in a loss
IGNORED = -100

# arguments of Hugging Face's BERT that ask for what this one does not have
ABSENT = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "cache",
    "past_key_values",
    "use_cache",
    "head_mask",
    "output_attentions",
    "output_hidden_states",
)


@dataclass
class BertConfig(PretrainedConfig):
    """The shape and constants of a BERT; names and defaults are Hugging Face's.

    classifier_dropout: before the classifiers; hidden_dropout_prob when None.
    num_labels: of the classifiers, 2 when neither it nor id2label is given.
    problem_type: "regression", "single_label_classification" or "multi_label_classification": which loss
        BertForSequenceClassification takes; when None the first labels decide.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | None = None
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    tie_word_embeddings: bool = True

    model_type = "bert"

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings", "type_vocab_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads = {self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if (p := getattr(self, name)) is not None and not 0 <= p < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {p}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must lie in [0, {self.vocab_size}) or be None, got {self.pad_token_id}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"problem_type must be None or one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}"
            )
        self._name_labels()

    def _name_labels(self) -> None:
        if self.num_labels is None:
            self.num_labels = 2 if self.id2label is None else len(self.id2label)
        if not isinstance(self.num_labels, int) or self.num_labels < 1:
            raise ValueError(f"num_labels must be a positive whole number, got {self.num_labels!r}")
        if self.id2label is None:
            self.id2label = {i: f"LABEL_{i}" for i in range(self.num_labels)}
        self.id2label = {int(i): label for i, label in self.id2label.items()}
        if sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(
                f"id2label must name the labels 0 to num_labels - 1 = {self.num_labels - 1}, got {list(self.id2label)}"
            )
        if self.num_labels == 1 and self.problem_type == "single_label_classification":
            raise ValueError("num_labels must be 2 or more for single_label_classification, got 1")
        if self.label2id is None:
            self.label2id = {label: i for i, label in self.id2label.items()}

    @classmethod
    def from_dict(cls, entries: dict, **overrides) -> BertConfig:
        """As PretrainedConfig's; num_labels=n, where the file names another number of labels, replaces the names."""
        for name in ("is_decoder", "add_cross_attention", "pruned_heads"):
            if entries.get(name):
                raise NotImplementedError(f"{name} must be false: this BERT is the plain encoder")
        if (kind := entries.get("position_embedding_type") or "absolute") != "absolute":
            raise NotImplementedError(f"position_embedding_type must be 'absolute', got {kind!r}")
        num_labels = overrides.get("num_labels", entries.get("num_labels"))
        if num_labels is not None and len(entries.get("id2label") or ()) != num_labels:
            entries = entries | {"id2label": None, "label2id": None}
        if "id2label" in overrides:
            entries = entries | {"label2id": None}
        return super().from_dict(entries, **overrides)

    def to_dict(self) -> dict:
        entries = super().to_dict()
        del entries["num_labels"]  # Hugging Face's counts id2label
        return entries


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, inputs_embeds, position_ids, token_type_ids) -> Tensor:
        """Packed, (t,) and inputs_embeds (t, d_model), to (t, d_model); either of the first two is None."""
        positions, types = self.position_embeddings.weight, self.token_type_embeddings.weight
        if inputs_embeds is None:
            words = self.word_embeddings.weight
            if isinstance(words, nn.Parameter) and (row := self.word_embeddings.padding_idx) is not None:
                words = _WithoutGradientOfRow.apply(words, row)
            x = embed(
                input_ids,
                words,
                position_table=positions,
                positions=position_ids,
                type_ids=token_type_ids,
                type_table=types,
            )
        else:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(position_ids)
            x = add_positions(inputs_embeds, types, positions=token_type_ids)
            x = add_positions(x, positions, positions=position_ids)
        return self.dropout(self.LayerNorm(x))


class _WithoutGradientOfRow(torch.autograd.Function):
    """The table itself, whose row of the padding token learns nothing from where it is looked up, as in torch."""

    @staticmethod
    def forward(ctx, table, row):
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx, dtable):
        if torch.is_grad_enabled():
            return dtable.index_fill(0, torch.tensor([ctx.row], device=dtable.device), 0.0), None
        dtable[ctx.row] = 0.0  # the look-up's own gradient, which nobody else holds
        return dtable, None


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_heads, self.dropout_p = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query, self.key, self.value = (Linear(config.hidden_size, config.hidden_size) for _ in range(3))

    def forward(self, x: Tensor, tokens: AllTokens | RealTokens, firsts: bool = False) -> Tensor:
        """firsts: (n, d_model), of the first token of every row that has one, instead of (t, d_model)."""
        (x,) = autocast(x)  # once for the three
        asking = tokens.firsts(x) if firsts else x
        q, k, v = (
            project(m, source).unflatten(1, (self.num_heads, -1))
            for m, source in ((self.query, asking), (self.key, x), (self.value, x))
        )
        attend = tokens.attend_from_firsts if firsts else tokens.attend
        return attend(q, k, v, self.dropout_p if self.training else 0.0).flatten(1)


class AddAndNorm(nn.Module):
    """LayerNorm(residual + dropout(dense(x))), with which both halves of a layer end."""

    def __init__(self, config: BertConfig, d_in: int):
        super().__init__()
        self.dense = Linear(d_in, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        norm = self.LayerNorm
        if not self.dropout.training or self.dropout.p == 0:
            return norm(project(self.dense, x, residual=residual))
        x = self.dropout(project(self.dense, x))
        if type(norm) is not LayerNorm or is_watched(norm):
            return norm(x + residual)
        return layer_norm(x, norm.weight, norm.bias, norm.eps, residual=residual)[0]


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = AddAndNorm(config, config.hidden_size)

    def forward(self, x: Tensor, tokens: AllTokens | RealTokens, firsts: bool = False) -> Tensor:
        if firsts:
            return self.output(self.self(x, tokens, firsts), tokens.firsts(x))
        return self.output(self.self(x, tokens), x)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return project(self.dense, x, self.activation)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = AddAndNorm(config, config.intermediate_size)

    def forward(self, x: Tensor, tokens: AllTokens | RealTokens, firsts: bool = False) -> Tensor:
        x = self.attention(x, tokens, firsts) if firsts else self.attention(x, tokens)
        return self.output(self.intermediate(x), x)

    def computes_firsts(self) -> bool:
        """Whether it may compute the first tokens alone: where nobody sees that it is no whole layer."""
        mine = (type(self), type(self.attention), type(self.attention.self)) == (
            BertLayer,
            BertAttention,
            BertSelfAttention,
        )
        return mine and not listening and not any(map(is_watched, self.modules()))

    def for_kernel(self) -> tuple[list, tuple, tuple] | None:
        """What `encoder_layers` takes of it: its 16 parameters, (heads, activation, eps), and with which probabilities
        it drops attention's weights and hidden states. None where somebody would see that its modules are not called.
        """
        attention, up, down = self.attention, self.intermediate, self.output
        heads, output = attention.self, attention.output
        dropout, other = output.dropout, down.dropout
        modules = (self, attention, heads, output, dropout, up, down, other)
        if tuple(map(type, modules)) != _LAYER or any(map(is_watched, modules)):
            return None
        if (dropout.p, dropout.training) != (other.p, other.training) or dropout.inplace or other.inplace:
            return None
        norm1, norm2 = output.LayerNorm, down.LayerNorm
        parameters = []
        for module in (heads.query, heads.key, heads.value, output.dense, norm1, up.dense, down.dense, norm2):
            if type(module) is LayerNorm:
                found = None if is_watched(module) else (module.weight, module.bias)
            else:
                found = weights_of(module)
            if found is None or not _KERNEL_PARAMETERS.issuperset(map(type, found)):
                return None
            parameters += found
        if norm1.eps != norm2.eps:
            return None
        chances = heads.dropout_p if heads.training else 0.0, dropout.p if dropout.training else 0.0
        return parameters, (heads.num_heads, up.activation, norm2.eps), chances


_LAYER = (BertLayer, BertAttention, BertSelfAttention, AddAndNorm, Dropout, BertIntermediate, AddAndNorm, Dropout)
_KERNEL_PARAMETERS = {nn.Parameter, QuantizedWeight}


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, tokens: AllTokens | RealTokens, firsts: bool = False) -> Tensor:
        """firsts: only the first tokens are wanted, (n, d_model), and all that the last layer does for the others is
        their keys and values."""
        layers = list(self.layer)
        last = layers.pop() if firsts and layers[-1].computes_firsts() else None
        x = _through(layers, x, tokens)
        if last is not None:
            return last(x, tokens, firsts)
        return tokens.firsts(x) if firsts else x


def _through(layers: list[BertLayer], x: Tensor, tokens: AllTokens | RealTokens) -> Tensor:
    """x after the layers: in inference all in one call, in training each in one and its backward in another, where
    nobody would notice."""
    if x.is_cpu and not (
        torch.compiler.is_compiling() or listening or torch_module._has_any_global_hook() or is_for_torch(x)
    ):
        found = [layer.for_kernel() if type(layer) is BertLayer else None for layer in layers]
        if torch.is_grad_enabled():
            for layer, its in zip(layers, found):
                x = tokens.train(x, *its) if its is not None and trains(x, *its) else layer(x, tokens)
            return x
        if None not in found and len({its[1:] for its in found}) == 1 and not torch.is_autocast_enabled("cpu"):
            parameters = [p for its in found for p in its[0]]
            _, shape, chances = found[0]
            if not any(chances) and native.unsupported(x, parameters, shape[0]) is None:
                return tokens.encode(x, parameters, *shape)
    for layer in layers:
        x = layer(x, tokens)
    return x


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, tokens: AllTokens | RealTokens) -> Tensor:
        """First tokens (n, d_model) to (b, d_model)."""
        return tokens.spread(project(self.dense, x, "tanh"))


class BertPreTrainedModel(PretrainedModel):
    """What all the models have in common: their configuration and their checkpoints."""

    config_class = BertConfig
    base_model_prefix = "bert"
    _input_embeddings = "embeddings.word_embeddings"
    _heads = ("bert.pooler.", "cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs.")
    _renames = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
    _keys_to_ignore_on_load_unexpected = (r"embeddings\.(position|token_type)_ids$",)
    _no_split_modules = ["BertLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BertLMPredictionHead):
            module.bias.zero_()


class BertModel(BertPreTrainedModel):
    """The encoder: token ids (b, s) to hidden states (b, s, d_model), and the pooler's (b, d_model).

    Differs from Hugging Face's where the mask hides a token: its hidden state is zero instead of what a padding token
    would make of the others, and the pooler reads the first real token of a row. A row without any is all zeros, in
    pooler_output too.
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **absent,
    ) -> BaseModelOutputWithPooling | tuple:
        """
        input_ids: (b, s)
        attention_mask: (b, s)         nonzero = a real token; padding may stand anywhere and costs nothing
        token_type_ids: (b, s)         default: 0
        position_ids: (b, s) or (1, s) default: 0, 1, 2, ..., padding counted
        inputs_embeds: (b, s, d_model) instead of input_ids
        return_dict                    False: a tuple, without what is None
        absent                         what Hugging Face's BERT also takes, such as output_attentions, must be None or
                                       False
        """
        x, tokens = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, absent)
        pooled = None if self.pooler is None else self.pooler(tokens.firsts(x), tokens)
        return returned(
            BaseModelOutputWithPooling(last_hidden_state=tokens.unpack(x), pooler_output=pooled), return_dict
        )

    def encode(
        self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, absent: dict, firsts: bool = False
    ) -> tuple[Tensor, AllTokens | RealTokens]:
        """The hidden states (t, d_model) of the real tokens, and which these are. firsts: (n, d_model) instead, of the
        first token of every row that has one."""
        check_absent(absent)
        given = self._check(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        (b, s), device = given.shape[:2], given.device
        tokens = real_tokens(b, s, attention_mask, device)
        ids, embeds, types = (None if x is None else tokens.pack(x) for x in (input_ids, inputs_embeds, token_type_ids))
        positions = tokens.places() if position_ids is None else tokens.pack(position_ids.expand(b, s))
        # reading values would stall a GPU and break a compiled graph
        if device.type == "cpu" and not torch.compiler.is_compiling():
            config = self.config
            for name, index, limit_name in (
                ("input_ids", ids, "vocab_size"),
                ("token_type_ids", types, "type_vocab_size"),
                ("position_ids", positions, "max_position_embeddings"),
            ):
                if index is not None:
                    check_range(name, index, getattr(config, limit_name), limit_name)
        return self.encoder(self.embeddings(ids, embeds, positions, types), tokens, firsts), tokens

    def _check(self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds) -> Tensor:
        """Raises for arguments of bad shape or kind; returns the one of input_ids and inputs_embeds that is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"give one of input_ids and inputs_embeds, got {'neither' if input_ids is None else 'both'}"
            )
        if input_ids is not None:
            check_integers("input_ids", input_ids, None)
        elif inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds must be (b, s, {self.config.hidden_size}), got {tuple(inputs_embeds.shape)}"
            )
        given = inputs_embeds if input_ids is None else input_ids
        b, s = given.shape[:2]
        if position_ids is None and s > (limit := self.config.max_position_embeddings):
            raise ValueError(f"input_ids must not be longer than max_position_embeddings = {limit}, got {s} tokens")
        if token_type_ids is not None:
            check_integers("token_type_ids", token_type_ids, ((b, s),))
        if position_ids is not None:
            check_integers("position_ids", position_ids, ((b, s), (1, s)))
        if attention_mask is not None and tuple(attention_mask.shape) != (b, s):
            raise ValueError(
                f"attention_mask must be (b, s) = {(b, s)}, nonzero for real tokens, got {tuple(attention_mask.shape)}"
            )
        return given


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(project(self.dense, x, self.activation))


class BertLMPredictionHead(nn.Module):
    """The head that predicts masked tokens."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return project(self.decoder, self.transform(x))

    def loss(self, x: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
        """Cross entropy at the tokens with a label, which alone are computed; x (t, d_model), labels (t,)."""
        if not torch.compiler.is_compiling():  # the number of labels is a value, which would break the graph
            index = (labels != IGNORED).nonzero().squeeze(1)
            x, labels = x.index_select(0, index), labels[index]
        reduction = "mean" if num_items_in_batch is None else "sum"
        decoder = self.decoder
        loss = linear_cross_entropy(self.transform(x), decoder.weight, labels, bias=decoder.bias, reduction=reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


class BertPreTrainingHeads(nn.Module):
    def __init__(self, config: BertConfig, next_sentence: bool):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        if next_sentence:
            self.seq_relationship = Linear(config.hidden_size, 2)


TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


class BertForMaskedLM(BertPreTrainedModel):
    """BERT with the head that predicts masked tokens, tied to the token embedding by default."""

    _tied_weights_keys = TIED

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertPreTrainingHeads(config, next_sentence=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **absent,
    ) -> MaskedLMOutput | tuple:
        """As BertModel. In training mode the loss comes without the logits, which nobody reads there.

        labels: (b, s)      the tokens that stood at the masked places; -100, and padding, are ignored
        num_items_in_batch  divides the summed loss, instead of the count of labels in this batch
        """
        check_labels("labels", labels, input_ids, inputs_embeds, self.config.vocab_size)
        x, tokens = self.bert.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, absent)
        head, loss, logits = self.cls.predictions, None, None
        if labels is not None:
            loss = head.loss(x, tokens.pack(labels), num_items_in_batch)
        if labels is None or not self.training:
            logits = tokens.unpack(head(x))  # (b, s, vocab)
        return returned(MaskedLMOutput(loss=loss, logits=logits), return_dict)


class BertForPreTraining(BertPreTrainedModel):
    """BERT with the heads of its pretraining: masked tokens, and whether the second sentence follows the first."""

    _tied_weights_keys = TIED

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config, next_sentence=True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **absent,
    ) -> BertForPreTrainingOutput | tuple:
        """As BertModel. With both labels, the loss is the sum of the two; in training mode it comes without
        prediction_logits.

        labels: (b, s)             as in BertForMaskedLM
        next_sentence_label: (b,)  0: the second sentence follows the first, 1: it does not
        num_items_in_batch         divides the summed loss of the masked tokens, and weighs the other one by this
                                   batch's share of them
        """
        check_labels("labels", labels, input_ids, inputs_embeds, self.config.vocab_size)
        check_labels("next_sentence_label", next_sentence_label, input_ids, inputs_embeds, 2, per_row=True)
        x, tokens = self.bert.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, absent)
        relationship = project(self.cls.seq_relationship, self.bert.pooler(tokens.firsts(x), tokens))  # (b, 2)
        loss, logits = None, None
        if labels is not None and next_sentence_label is not None:
            labels = tokens.pack(labels)
            loss = F.cross_entropy(relationship.float(), next_sentence_label.view(-1))
            if num_items_in_batch is not None:
                loss = loss * ((labels != IGNORED).sum() / num_items_in_batch)
            loss = loss + self.cls.predictions.loss(x, labels, num_items_in_batch)
        if loss is None or not self.training:
            logits = tokens.unpack(self.cls.predictions(x))  # (b, s, vocab)
        return returned(
            BertForPreTrainingOutput(loss=loss, prediction_logits=logits, seq_relationship_logits=relationship),
            return_dict,
        )


def classifier_dropout(config: BertConfig) -> Dropout:
    p = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return Dropout(p)


class BertForSequenceClassification(BertPreTrainedModel):
    """BERT with a classifier of whole sequences, or a regression, on the pooler."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = classifier_dropout(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **absent,
    ) -> SequenceClassifierOutput | tuple:
        """As BertModel.

        labels: (b,) integers for one label per row, (b, num_labels) for several of them or a regression, whose (b,)
            will do when num_labels is 1. config.problem_type tells which loss is meant; where it is None it is set, as
            Hugging Face does: a regression when num_labels is 1, one label when they are integers, else several
        num_items_in_batch: divides the summed loss, instead of the number of labels in this batch
        """
        x, tokens = self.bert.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, absent, firsts=True
        )
        logits = project(self.classifier, self.dropout(self.bert.pooler(x, tokens)))  # (b, num_labels)
        loss = None if labels is None else self._loss(logits.float(), labels, num_items_in_batch)
        return returned(SequenceClassifierOutput(loss=loss, logits=logits), return_dict)

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch) -> Tensor:
        config, n = self.config, self.config.num_labels
        if config.problem_type is None:
            kinds = ("multi_label_classification", "single_label_classification")
            config.problem_type = "regression" if n == 1 else kinds[not labels.is_floating_point()]
        if config.problem_type == "single_label_classification":
            check_labels("labels", labels, logits, None, n, per_row=True)
            return cross_entropy(logits, labels.reshape(-1), num_items_in_batch)
        if labels.shape != logits.shape and not (n == 1 and labels.numel() == len(logits)):
            raise ValueError(
                f"labels must be (b, num_labels) = {tuple(logits.shape)} for {config.problem_type}, "
                f"got {tuple(labels.shape)}"
            )
        function = F.mse_loss if config.problem_type == "regression" else F.binary_cross_entropy_with_logits
        labels = labels.reshape(logits.shape).to(logits.dtype)
        if num_items_in_batch is None:
            return function(logits, labels)
        return function(logits, labels, reduction="sum") / num_items_in_batch


class BertForTokenClassification(BertPreTrainedModel):
    """BERT with a classifier of every token: named entities, parts of speech."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = classifier_dropout(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **absent,
    ) -> TokenClassifierOutput | tuple:
        """As BertModel.

        labels: (b, s)      -100, and padding, are ignored
        num_items_in_batch  divides the summed loss, instead of the count of labels in this batch
        """
        check_labels("labels", labels, input_ids, inputs_embeds, self.config.num_labels)
        x, tokens = self.bert.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, absent)
        logits = project(self.classifier, self.dropout(x))  # (t, num_labels)
        loss = None if labels is None else cross_entropy(logits.float(), tokens.pack(labels), num_items_in_batch)
        return returned(TokenClassifierOutput(loss=loss, logits=tokens.unpack(logits)), return_dict)


class BertForQuestionAnswering(BertPreTrainedModel):
    """BERT with a head that finds where the answer to a question starts and ends."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels must be 2, a start and an end, got {config.num_labels}")
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **absent,
    ) -> QuestionAnsweringModelOutput | tuple:
        """As BertModel; but the logits of padding are the least of their dtype, so that no answer is found there.

        start_positions, end_positions: (b,). Those outside the row, and on padding, are ignored.
        """
        x, tokens = self.bert.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, absent)
        logits = project(self.qa_outputs, x)  # (t, 2)
        logits = tokens.unpack(logits, fill=torch.finfo(logits.dtype).min)  # (b, s, 2)
        start_logits, end_logits = (x.contiguous() for x in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = sum(
                cross_entropy(logits.float(), answer(name, positions, logits, attention_mask), None)
                for name, positions, logits in (
                    ("start_positions", start_positions, start_logits),
                    ("end_positions", end_positions, end_logits),
                )
            )
            loss = loss / 2
        return returned(
            QuestionAnsweringModelOutput(loss=loss, start_logits=start_logits, end_logits=end_logits), return_dict
        )


def answer(name: str, positions: Tensor, logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """positions (b,) or (b, 1) as labels (b,) of logits (b, s): ignored where there is no token."""
    b, s = logits.shape
    check_integers(name, positions, ((b,), (b, 1)))
    positions = positions.reshape(-1).clamp(min=0)
    if attention_mask is not None:
        real = attention_mask.bool().gather(1, positions.clamp(max=s - 1)[:, None]).squeeze(1)
        positions = positions.where(real, IGNORED)
    return positions.where(positions < s, IGNORED)


def cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels.long())
    return F.cross_entropy(logits, labels.long(), reduction="sum") / num_items_in_batch


def returned(out: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
    return out.to_tuple() if return_dict is False else out


def check_absent(arguments: dict) -> None:
    """Raises for arguments that nobody knows, and for those of Hugging Face's BERT that ask for what is not there."""
    for name, value in arguments.items():
        if name not in ABSENT:
            raise TypeError(f"BERT's forward() got an unexpected keyword argument {name!r}")
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} must be None: it is not supported, got {type(value).__name__}")


def check_integers(name: str, x: Tensor, shapes: tuple[tuple[int, ...], ...] | None) -> None:
    """Raises unless x holds integers in one of `shapes`, or in any (b, s)."""
    wanted = "(b, s)" if shapes is None else " or ".join(map(str, shapes))
    if x.is_floating_point() or (x.dim() != 2 if shapes is None else tuple(x.shape) not in shapes):
        raise ValueError(f"{name} must be integers {wanted}, got {x.dtype} {tuple(x.shape)}")


def check_labels(name, labels, input_ids, inputs_embeds, limit: int, per_row: bool = False) -> None:
    """Raises unless labels are None or integers in [0, limit), or -100, for every token, or for every row."""
    if labels is None:
        return
    b, s = (inputs_embeds if input_ids is None else input_ids).shape[:2]
    check_integers(name, labels, ((b,), (b, 1)) if per_row else ((b, s),))
    if labels.is_cpu and not torch.compiler.is_compiling():
        counted = labels[labels != IGNORED]
        check_range(name, counted, limit, f"or {IGNORED}")
