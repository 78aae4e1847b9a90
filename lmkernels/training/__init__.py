"""Pretraining on text: `pretrain(out, options)` is what the command line runs."""

from .pretrain import pretrain
from .settings import Settings

__all__ = ["Settings", "pretrain"]
