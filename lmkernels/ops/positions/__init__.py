from .api import add_positions, alibi_slopes, sinusoidal

__all__ = ["add_positions", "alibi_slopes", "sinusoidal"]
