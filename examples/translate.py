"""Translate sentences with a Marian model: a Hugging Face script on lmkernels' attention.

python examples/translate.py Helsinki-NLP/opus-mt-en-de "Good morning." "Where is the station?"
"""

import argparse

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import lmkernels.hf

lmkernels.hf.register()


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or its name on the Hugging Face hub")
    parser.add_argument("sentences", nargs="+", help="what to translate")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        options.model,
        attn_implementation="lmkernels",  # the one line that is changed
    )
    batch = tokenizer(options.sentences, padding=True, return_tensors="pt")
    tokens = model.generate(**batch, num_beams=options.beams, max_new_tokens=options.max_new_tokens)
    translations = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    for sentence, translation in zip(options.sentences, translations):
        print(f"{sentence}\n    {translation}")
    return translations


if __name__ == "__main__":
    main()
