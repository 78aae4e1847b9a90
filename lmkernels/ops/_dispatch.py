"""Which backend runs an op: the one asked for by name, or the first without an objection."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def choose(op: str, backends: dict[str, ModuleType], requested: str | None, *arguments) -> ModuleType:
    """The backend module that runs `op` for these arguments.

    backends: name -> module, in order of preference; `module.unsupported(*arguments)` returns None or its reason.
    requested: a backend's name, or None for the first without an objection.
    Tensors on the CPU never go to triton unasked: only its interpreter takes them, which is slow. CUDA tensors never go
    to native unasked: its kernels for them have not been tested on a GPU yet.
    Raises ValueError for an unknown name, NotImplementedError when the named backend (or every one) objects.
    """
    if requested is not None:
        if requested not in backends:
            raise ValueError(f"backend must be one of {', '.join(backends)} or None, got {requested!r}")
        reason = backends[requested].unsupported(*arguments)
        if reason is not None:
            raise NotImplementedError(f"{op}: backend {requested!r} cannot run this: {reason}")
        return backends[requested]
    reasons = []
    for name, module in backends.items():
        reason = module.unsupported(*arguments)
        if reason is None:
            first = arguments[0] if arguments else None
            if name == "native" and isinstance(first, Tensor) and first.is_cuda:
                reason = "runs on a GPU only when it is asked for by name"
            elif name == "triton" and isinstance(first, Tensor) and first.is_cpu:
                reason = "runs on the CPU only when it is asked for by name"
            else:
                return module
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op}: no backend can run this; " + "; ".join(reasons))
