"""What models return: dicts with attribute access, with the names of Hugging Face's outputs."""


class ModelOutput(dict):
    """`out.logits`, `out["logits"]` and `out[i]` all work, as with Hugging Face's outputs.

    An entry that is absent reads as None through its attribute, and does not count in `out[i]`.
    """

    fields: tuple[str, ...] = ()

    def __init__(self, entries=(), /, **more):
        given = dict(entries, **more)
        super().__init__((name, given[name]) for name in self.fields if given.get(name) is not None)

    def __getattr__(self, name):
        if name in self.fields:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has {', '.join(self.fields)}, not {name!r}")

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def to_tuple(self) -> tuple:
        return tuple(self.values())


class CausalLMOutput(ModelOutput):
    """The result of a language model.

    loss: ()                 float32, present when labels were given
    logits: (b, s, vocab)
    past_key_values: KVCache present when a cache was used
    """

    fields = ("loss", "logits", "past_key_values")


class BaseModelOutputWithPooling(ModelOutput):
    """The result of an encoder.

    last_hidden_state: (b, s, d_model)
    pooler_output: (b, d_model)        present where the model has a pooler
    """

    fields = ("last_hidden_state", "pooler_output")


class MaskedLMOutput(ModelOutput):
    """The result of a masked language model.

    loss: ()              float32, present when labels were given
    logits: (b, s, vocab) absent when they were, in training mode
    """

    fields = ("loss", "logits")


class BertForPreTrainingOutput(ModelOutput):
    """The result of BERT's two heads for pretraining.

    loss: ()                         float32, present when both labels were given
    prediction_logits: (b, s, vocab) absent when they were, in training mode
    seq_relationship_logits: (b, 2)
    """

    fields = ("loss", "prediction_logits", "seq_relationship_logits")


class SequenceClassifierOutput(ModelOutput):
    """The result of a classifier of sequences.

    loss: ()                float32, present when labels were given
    logits: (b, num_labels)
    """

    fields = ("loss", "logits")


class TokenClassifierOutput(ModelOutput):
    """The result of a classifier of tokens.

    loss: ()                   float32, present when labels were given
    logits: (b, s, num_labels)
    """

    fields = ("loss", "logits")


class QuestionAnsweringModelOutput(ModelOutput):
    """The result of extractive question answering.

    loss: ()                          float32, present when both positions were given
    start_logits, end_logits: (b, s)
    """

    fields = ("loss", "start_logits", "end_logits")
