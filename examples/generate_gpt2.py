"""Text from a GPT-2 checkpoint: python examples/generate_gpt2.py FOLDER_OR_HUB_ID "Once upon a time"

A script for transformers with one import changed: the model comes from lmkernels. The tokenizer is theirs.
"""

import argparse

import torch
from transformers import GPT2Tokenizer

from lmkernels.models import GPT2LMHeadModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a folder with a checkpoint and its tokenizer, or a name on the hub such as gpt2")
parser.add_argument("prompt", nargs="?", default="Hello, I'm a language model,")
parser.add_argument("--quantize", choices=["int8", "int4"], help="weights in 8 or 4 bits: less memory, more speed")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

tokenizer = GPT2Tokenizer.from_pretrained(arguments.model)
model = GPT2LMHeadModel.from_pretrained(arguments.model, quantize=arguments.quantize)

torch.manual_seed(arguments.seed)
input_ids = tokenizer.encode(arguments.prompt, return_tensors="pt")
samples = model.generate(input_ids, max_length=50, num_return_sequences=5, do_sample=True)
for i, sample in enumerate(samples):
    print(f"{i}: {tokenizer.decode(sample, skip_special_tokens=True)}")
