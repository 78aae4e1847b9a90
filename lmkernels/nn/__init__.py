"""torch's modules on lmkernels' ops: the same constructors, arguments, parameter names and results.

Each is a subclass of the torch module of its name. `replace(model)` puts them into a model that exists.
"""

from .attention import MultiheadAttention
from .embedding import Embedding
from .encoder import TransformerEncoderLayer
from .linear import Linear
from .norm import LayerNorm, RMSNorm
from .replace import Report, replace, restore
from .rotary import RotaryEmbedding

__all__ = [
    "Embedding",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "Report",
    "RotaryEmbedding",
    "TransformerEncoderLayer",
    "replace",
    "restore",
]
