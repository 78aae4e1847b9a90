"""Fine-tune a BERT to classify sentences: Hugging Face's classic script, with one import changed.

    python examples/finetune_bert.py bert-base-uncased sentences.tsv --output finetuned

The data are lines "sentence<TAB>label" with the labels 0 and 1; every tenth is held back for the evaluation. Needs
transformers, datasets and accelerate. Padding costs nothing: the model leaves it out, so `padding="max_length"` is
as fast as a collator that pads each batch to its longest sentence.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments

from lmkernels.models import BertForSequenceClassification  # instead of: from transformers import ...


def read(files: list[Path]) -> Dataset:
    lines = [line.rsplit("\t", 1) for file in files for line in file.read_text().split("\n") if line.strip()]
    return Dataset.from_dict({"text": [text for text, _ in lines], "labels": [int(label) for _, label in lines]})


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or its name on the Hugging Face hub")
    parser.add_argument("data", nargs="+", type=Path, help='lines "sentence<TAB>label"')
    parser.add_argument("--output", default="finetuned", help="folder to save to (default: finetuned)")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps (default: never)")
    parser.add_argument("--save-steps", type=float, default=500, help="steps between checkpoints (default: 500)")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = BertForSequenceClassification.from_pretrained(options.model, num_labels=2)

    def tokenize(batch):
        return tokenizer(batch["text"], padding="max_length", truncation=True, max_length=options.max_length)

    data = read(options.data).map(tokenize, batched=True)
    held_back = list(range(0, len(data), 10))
    train = [i for i in range(len(data)) if i % 10]

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            save_steps=options.save_steps,
            logging_steps=20,
            bf16=options.bf16,
            use_cpu=model.device.type == "cpu",
        ),
        train_dataset=data.select(train),
        eval_dataset=data.select(held_back),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    metrics = trainer.evaluate()
    trainer.save_model()
    print(metrics)

    # what was saved is a checkpoint like any other, for this class and for transformers' own
    model = BertForSequenceClassification.from_pretrained(options.output)
    inputs = tokenizer(["What a waste of money.", "I loved every minute of it."], padding=True, return_tensors="pt")
    print(model(**inputs).logits.softmax(-1))
    return metrics


if __name__ == "__main__":
    main()
