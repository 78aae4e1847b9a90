from .api import rotary
from .tables import rotary_tables

__all__ = ["rotary", "rotary_tables"]
