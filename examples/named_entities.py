"""Named entities: fine-tunes a BERT on sentences with tags, scores it on held-back ones, and marks a sentence.

    python examples/named_entities.py bert-base-uncased train.conll dev.conll --sentence "Anna lives in Berlin"

A file has a word and its tag on each line and an empty line after each sentence, as WNUT-17's have.
"""

import argparse

import torch

from lmkernels.models import BertForTokenClassification
from lmkernels.training import finetune
from lmkernels.training.checkpoint import load_tokenizer


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("train", help="sentences to learn from")
    parser.add_argument("held_back", help="sentences to score on")
    parser.add_argument("--out", default="named-entities", help="folder for checkpoints, log and plot")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--sentence", default="Anna moved from Paris to Berlin for Siemens .")
    arguments = parser.parse_args(arguments)

    run = finetune(
        arguments.out,
        {
            "task": "token-classification",
            "model": arguments.model,
            "train": arguments.train,
            "eval": arguments.held_back,
            "epochs": arguments.epochs,
            "max_length": 128,
            "stride": 32,
        },
    )
    print(f"F1 of whole entities: {run['f1']:.1f} % (precision {run['precision']:.1f}, recall {run['recall']:.1f})")

    model = BertForTokenClassification.from_pretrained(run["checkpoint"])
    words = arguments.sentence.split()
    pieces = load_tokenizer(run["checkpoint"]).encode(words, is_pretokenized=True)
    with torch.no_grad():
        labels = model(torch.tensor([pieces.ids])).logits[0].argmax(-1).tolist()
    for number, word in enumerate(words):
        # the first piece of a word tells
        print(f"{model.config.id2label[labels[pieces.word_ids.index(number)]]:15} {word}")


if __name__ == "__main__":
    main()
