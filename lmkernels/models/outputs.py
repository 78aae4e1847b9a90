"""What a model returns: a dict with attribute access, as Hugging Face's models give."""


class CausalLMOutput(dict):
    """The result of a language model: `out.logits`, `out["logits"]` and `out[i]` all work.

    loss: ()                 float32, present when labels were given
    logits: (b, s, vocab)
    past_key_values: KVCache present when a cache was used
    An entry that is absent reads as None through its attribute, and does not count in `out[i]`.
    """

    fields = ("loss", "logits", "past_key_values")

    def __init__(self, **entries):
        super().__init__((name, entries[name]) for name in self.fields if entries.get(name) is not None)

    def __getattr__(self, name):
        if name in self.fields:
            return self.get(name)
        raise AttributeError(f"CausalLMOutput has {', '.join(self.fields)}, not {name!r}")

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def to_tuple(self) -> tuple:
        return tuple(self.values())
