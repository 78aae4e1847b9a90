"""Summarise text files with BART: a Hugging Face script on lmkernels' attention.

python examples/summarise.py facebook/bart-large-cnn article.txt
"""

import argparse
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import lmkernels.hf

lmkernels.hf.register()


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or its name on the Hugging Face hub")
    parser.add_argument(
        "files", nargs="+", type=Path, help="text files; what goes beyond the model's length is cut off"
    )
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=142)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        options.model,
        attn_implementation="lmkernels",  # the one line that is changed
    )
    texts = [file.read_text() for file in options.files]
    longest = model.config.max_position_embeddings
    batch = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    tokens = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        num_beams=options.beams,
        max_new_tokens=options.max_new_tokens,
        no_repeat_ngram_size=3,
    )
    summaries = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    for file, summary in zip(options.files, summaries):
        print(f"{file}\n    {summary}")
    return summaries


if __name__ == "__main__":
    main()
