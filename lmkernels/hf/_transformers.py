"""The one place that says which transformers are understood."""

from __future__ import annotations

from types import ModuleType

OLDEST, BEFORE = (5, 15), (6, 0)
INSTALL = 'pip install "lmkernels[hf]" installs transformers>=5.15,<6'


def require_transformers() -> ModuleType:
    """The module transformers, or an ImportError that says what to install."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"lmkernels.hf needs transformers, which cannot be imported ({error}): {INSTALL}") from error
    major_minor = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not OLDEST <= major_minor < BEFORE:
        raise ImportError(f"lmkernels.hf needs transformers>=5.15,<6, found {transformers.__version__}: {INSTALL}")
    return transformers
