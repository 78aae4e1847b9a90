"""The feed-forward layers in the compiled library: products of `linear`, and the activation's gradient in one pass.

The hidden layer is not kept for the backward: it is the activation of what is kept anyway.
"""

from __future__ import annotations

from torch import Tensor

from ..linear.native import CODES, activation_bwd, linear_bwd, linear_fwd, unsupported

__all__ = ["mlp_backward", "mlp_forward", "swiglu_backward", "swiglu_forward", "unsupported"]


def mlp_forward(x, w_in, b_in, w_out, b_out, residual, activation, need_pre) -> tuple[Tensor, Tensor]:
    """out (rows, d_model) and, where needed, what the activation was applied to (rows, d_ff)."""
    hidden, pre = linear_fwd(x, w_in, b_in, None, None, CODES[activation], need_pre)
    return linear_fwd(hidden, w_out, b_out, residual, None, CODES[None], False)[0], pre


def mlp_backward(dout, x, pre, w_in, w_out, activation, needs) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_in, b_in, w_out, b_out, of which `needs` says which are wanted."""
    need_dx, need_dw_in, need_db_in, need_dw_out, need_db_out = needs
    inner = need_dx or need_dw_in or need_db_in
    # only its shape is read until the hidden layer is known again
    dhidden, _, db_out = linear_bwd(dout, pre, w_out, None, CODES[None], inner or need_dw_out, False, need_db_out)
    dx = dw_in = db_in = dw_out = None
    if inner or need_dw_out:
        dpre, _, hidden, db_in = activation_bwd(dhidden, pre, None, CODES[activation], need_db_in)
        if need_dw_out:
            _, dw_out, _ = linear_bwd(dout, hidden, w_out, None, CODES[None], False, True, False)
        dx, dw_in, _ = linear_bwd(dpre, x, w_in, None, CODES[None], need_dx, need_dw_in, False)
    return dx, dw_in, db_in, dw_out, db_out


def swiglu_forward(x, w_gate, w_up, w_down, residual, need_up) -> tuple[Tensor, Tensor, Tensor]:
    """out (rows, d_model), the gate and, where needed, what it multiplies (rows, d_ff)."""
    gate, _ = linear_fwd(x, w_gate, None, None, None, CODES[None], False)
    hidden, up = linear_fwd(x, w_up, None, None, gate, CODES["silu"], need_up)
    return linear_fwd(hidden, w_down, None, residual, None, CODES[None], False)[0], gate, up


def swiglu_backward(dout, x, gate, up, w_gate, w_up, w_down, needs) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_gate, w_up, w_down, of which `needs` says which are wanted."""
    need_dx, need_dw_gate, need_dw_up, need_dw_down = needs
    dhidden, _, _ = linear_bwd(dout, gate, w_down, None, CODES[None], True, False, False)
    dup, dgate, hidden, _ = activation_bwd(dhidden, up, gate, CODES["silu"], False)
    dw_down = dw_gate = dw_up = dx = None
    if need_dw_down:
        _, dw_down, _ = linear_bwd(dout, hidden, w_down, None, CODES[None], False, True, False)
    part, dw_gate, _ = linear_bwd(dgate, x, w_gate, None, CODES[None], need_dx, need_dw_gate, False)
    if need_dw_up:
        _, dw_up, _ = linear_bwd(dup, x, w_up, None, CODES[None], False, True, False)
    if need_dx:
        # dup w_up, added to the part that came through the gate
        dx, _ = linear_fwd(dup, w_up.t(), None, part, None, CODES[None], False)
    return dx, dw_gate, dw_up, dw_down
