"""Let a BERT fill in what is hidden: the words that it finds likeliest at each [MASK] of a sentence.

    python examples/fill_mask.py bert-base-uncased "The capital of France is [MASK]."
    python examples/fill_mask.py run "def [MASK](self, x):" --top 3

The model is a folder that `lmkernels pretrain --objective mlm` made, or any BERT of Hugging Face with its tokenizer.
"""

import argparse

import torch

from lmkernels.models import BertForMaskedLM
from lmkernels.training.checkpoint import load_tokenizer
from lmkernels.training.finetune import find_model


def main(arguments: list[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or its name on the Hugging Face hub")
    parser.add_argument("sentence", help="with [MASK] in it, once or more")
    parser.add_argument("--top", type=int, default=5, help="words shown for each (default: 5)")
    options = parser.parse_args(arguments)

    folder = find_model(options.model)
    model, tokenizer = BertForMaskedLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(options.sentence).ids])
    places = (ids[0] == tokenizer.token_to_id("[MASK]")).nonzero().flatten()
    if not len(places):
        parser.error(f"the sentence must have a [MASK], got {options.sentence!r}")
    with torch.no_grad():
        probabilities = model(ids).logits[0, places].softmax(-1)  # (masks, vocab)
    likeliest = probabilities.topk(options.top)
    words = [[tokenizer.id_to_token(i) for i in row] for row in likeliest.indices.tolist()]
    for row, values in zip(words, likeliest.values.tolist()):
        print("  ".join(f"{word} {100 * p:.1f} %" for word, p in zip(row, values)))
    return words


if __name__ == "__main__":
    main()
