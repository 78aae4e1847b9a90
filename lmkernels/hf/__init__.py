"""lmkernels under Hugging Face's own models. Needs transformers>=5.15,<6 (the extra `hf`), imported when first used."""

from __future__ import annotations

from ._transformers import require_transformers
from .accelerate import accelerate, restore
from .check import check

__all__ = ["accelerate", "check", "register", "restore"]


def register() -> None:
    """Makes attn_implementation="lmkernels" work for every Hugging Face model; calling it again changes nothing.

        lmkernels.hf.register()
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="lmkernels")
        model.set_attn_implementation("lmkernels")      # or later, and back with "sdpa" or "eager"

    The kernel and the function that makes its masks are registered together, under one name: plain, padded, sliding
    and packed masks stay as small as their content, and no (b, 1, s, s) tensor is made of them. Grouped heads, static
    caches, T5's position bias (with its gradient), soft caps, sinks, dropout and packed sequences (`cu_seq_lens_q`,
    ..., as DataCollatorWithFlattening gives them, or `position_ids` alone) run in the kernel, on the CPU and in float32
    too. With output_attentions=True the maps are returned, computed beside the kernel only for those who ask.

    In transformers 5.15 set_attn_implementation does not reach the parts of T5: name it when the model is loaded.

    A query that sees no key, as in rows that are all padding, gets zeros. Raises ImportError without transformers.
    """
    require_transformers()
    from . import attention

    attention.register()
