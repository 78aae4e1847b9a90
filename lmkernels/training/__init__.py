"""Pretraining on text, fine-tuning on labelled data, and evaluation: what the command line runs."""

from .finetune import evaluate, finetune
from .perplexity import perplexity
from .pretrain import pretrain
from .pseudo_perplexity import pseudo_perplexity
from .settings import FinetuneSettings, Settings

__all__ = ["FinetuneSettings", "Settings", "evaluate", "finetune", "perplexity", "pretrain", "pseudo_perplexity"]
