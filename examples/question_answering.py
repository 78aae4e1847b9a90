"""Question answering: fine-tunes a BERT on SQuAD, scores it on held-back questions, and answers one.

python examples/question_answering.py bert-base-uncased train.json dev.json
"""

import argparse

import torch

from lmkernels.models import BertForQuestionAnswering
from lmkernels.training import finetune
from lmkernels.training.checkpoint import load_tokenizer


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("train", help="questions to learn from, SQuAD 1.1's JSON")
    parser.add_argument("held_back", help="questions to score on")
    parser.add_argument("--out", default="question-answering", help="folder for checkpoints, log and plot")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--question", default="Where does Anna live?")
    parser.add_argument("--context", default="Anna left Paris ten years ago. She lives in Berlin and works as a baker.")
    arguments = parser.parse_args(arguments)

    run = finetune(
        arguments.out,
        {
            "task": "question-answering",
            "model": arguments.model,
            "train": arguments.train,
            "eval": arguments.held_back,
            "epochs": arguments.epochs,
            "max_length": 384,
            "stride": 128,
        },
    )
    print(f"exact match: {run['exact_match']:.1f} %, F1: {run['f1']:.1f} %")

    model = BertForQuestionAnswering.from_pretrained(run["checkpoint"])
    pair = load_tokenizer(run["checkpoint"]).encode(arguments.question, arguments.context)
    with torch.no_grad():
        out = model(torch.tensor([pair.ids]), token_type_ids=torch.tensor([pair.type_ids]))
    in_context = torch.tensor([part == 1 for part in pair.sequence_ids])
    # the likeliest pair of a start and an end that follows it
    scores = out.start_logits[0][:, None] + out.end_logits[0]  # (start, end)
    allowed = (in_context[:, None] & in_context).triu()
    scores = scores.masked_fill(~allowed, float("-inf"))
    start, end = divmod(int(scores.argmax()), len(pair.ids))
    print(arguments.context[pair.offsets[start][0] : pair.offsets[end][1]])


if __name__ == "__main__":
    main()
