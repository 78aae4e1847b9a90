"""What BERT is fine-tuned for. A task is one module with the same names:

NAME                                           Hugging Face's name of the task
MODEL                                          the name of its class in lmkernels.models
read(path) -> list of examples                 ValueError names the file, the line, and what would do
label_names(examples) -> list or None          the labels of a classifier, in order
features(examples, tokenizer, label2id, ...)   what the model is given, one entry per sequence
predictions(output, features)                  the model's answer per sequence
score(examples, features, predictions)         figures in percent
"""

from . import question_answering, text_classification, token_classification

TASKS = {task.NAME: task for task in (text_classification, token_classification, question_answering)}
