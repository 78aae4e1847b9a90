"""The feed-forward layers out of a backend's products and activations; `linear` is that backend's module for `linear`.

The hidden layer is not kept for the backward: it is the activation of what is kept anyway.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def mlp_forward(
    linear: ModuleType, x, w_in, b_in, w_out, b_out, residual, activation, need_pre
) -> tuple[Tensor, Tensor]:
    """out (rows, d_model) and, where needed, what the activation was applied to (rows, d_ff)."""
    code, none = linear.CODES[activation], linear.CODES[None]
    hidden, pre = linear.linear_fwd(x, w_in, b_in, None, None, code, need_pre)
    return linear.linear_fwd(hidden, w_out, b_out, residual, None, none, False)[0], pre


def mlp_backward(linear: ModuleType, dout, x, pre, w_in, w_out, activation, needs) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_in, b_in, w_out, b_out, of which `needs` says which are wanted."""
    need_dx, need_dw_in, need_db_in, need_dw_out, need_db_out = needs
    code, none = linear.CODES[activation], linear.CODES[None]
    inner = need_dx or need_dw_in or need_db_in
    # only its shape is read until the hidden layer is known again
    dhidden, _, db_out = linear.linear_bwd(dout, pre, w_out, None, none, inner or need_dw_out, False, need_db_out)
    dx = dw_in = db_in = dw_out = None
    if inner or need_dw_out:
        dpre, _, hidden, db_in = linear.activation_bwd(dhidden, pre, None, code, need_db_in)
        if need_dw_out:
            _, dw_out, _ = linear.linear_bwd(dout, hidden, w_out, None, none, False, True, False)
        dx, dw_in, _ = linear.linear_bwd(dpre, x, w_in, None, none, need_dx, need_dw_in, False)
    return dx, dw_in, db_in, dw_out, db_out


def swiglu_forward(linear: ModuleType, x, w_gate, w_up, w_down, residual, need_up) -> tuple[Tensor, Tensor, Tensor]:
    """out (rows, d_model), the gate and, where needed, what it multiplies (rows, d_ff)."""
    code, none = linear.CODES["silu"], linear.CODES[None]
    gate, _ = linear.linear_fwd(x, w_gate, None, None, None, none, False)
    hidden, up = linear.linear_fwd(x, w_up, None, None, gate, code, need_up)
    return linear.linear_fwd(hidden, w_down, None, residual, None, none, False)[0], gate, up


def swiglu_backward(linear: ModuleType, dout, x, gate, up, w_gate, w_up, w_down, needs) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_gate, w_up, w_down, of which `needs` says which are wanted."""
    need_dx, need_dw_gate, need_dw_up, need_dw_down = needs
    code, none = linear.CODES["silu"], linear.CODES[None]
    dhidden, _, _ = linear.linear_bwd(dout, gate, w_down, None, none, True, False, False)
    dup, dgate, hidden, _ = linear.activation_bwd(dhidden, up, gate, code, False)
    dw_down = dw_gate = dw_up = dx = None
    if need_dw_down:
        _, dw_down, _ = linear.linear_bwd(dout, hidden, w_down, None, none, False, True, False)
    part, dw_gate, _ = linear.linear_bwd(dgate, x, w_gate, None, none, need_dx, need_dw_gate, False)
    if need_dw_up:
        _, dw_up, _ = linear.linear_bwd(dup, x, w_up, None, none, False, True, False)
    if need_dx:
        # dup w_up, added to the part that came through the gate
        dx, _ = linear.linear_fwd(dup, w_up.t(), None, part, None, none, False)
    return dx, dw_gate, dw_up, dw_down
