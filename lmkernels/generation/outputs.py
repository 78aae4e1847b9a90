"""What `generate(return_dict_in_generate=True)` returns."""


class GenerateOutput(dict):
    """A dict with attribute access, as Hugging Face's. An entry that was not asked for is absent and reads as None.

    sequences: (b * n, length)            n = num_return_sequences
    scores: tuple of (rows, vocab)        one per new token, after the logits processors; with output_scores
    logits: tuple of (rows, vocab)        one per new token, as the model gave them, float32; with output_logits
    sequences_scores: (b * n,)            of beam search, with output_scores
    beam_indices: (b * n, new tokens)     of beam search: the row of `scores` that each token was chosen from, then -1
    """

    fields = ("sequences", "scores", "logits", "sequences_scores", "beam_indices")

    def __init__(self, **entries):
        super().__init__((name, entries[name]) for name in self.fields if entries.get(name) is not None)

    def __getattr__(self, name):
        if name in self.fields:
            return self.get(name)
        raise AttributeError(f"GenerateOutput has {', '.join(self.fields)}, not {name!r}")

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def to_tuple(self) -> tuple:
        return tuple(self.values())
