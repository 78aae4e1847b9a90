"""The numbers that the ops give activations."""

from __future__ import annotations

# As enum class Activation numbers them.
CODES = {name: code for code, name in enumerate((None, "gelu", "gelu_tanh", "silu", "relu", "tanh"))}
