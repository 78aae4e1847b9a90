"""Bad arguments raise an error that names the argument, what it got and what would do."""

from __future__ import annotations

import pytest
import torch

from lmkernels import attention

NAN, INF = float("nan"), float("inf")
B, S_Q, S_K, H, H_KV, D = 2, 5, 6, 4, 2, 8

# what to change in a good call, the error, and its text
BAD = {
    # q, k, v
    "list for q": ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
    "None for k": ({"k": None}, TypeError, "k must be a torch.Tensor, got NoneType"),
    "q of 3 axes": (
        {"q": torch.zeros(S_Q, H, D)},
        ValueError,
        r"q must be \(b, s, h, d\) with 4 axes, got \(5, 4, 8\)",
    ),
    "v of 5 axes": ({"v": torch.zeros(1, B, S_K, H_KV, D)}, ValueError, "v must be .* with 4 axes"),
    "integer q": (
        {"q": torch.zeros(B, S_Q, H, D, dtype=torch.int64)},
        TypeError,
        "q must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "complex q": ({"q": torch.zeros(B, S_Q, H, D, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
    "dtypes differ": (
        {"k": torch.zeros(B, S_K, H_KV, D, dtype=torch.bfloat16)},
        TypeError,
        "k must have q's dtype torch.float32, got torch.bfloat16",
    ),
    "devices differ": (
        {"v": torch.zeros(B, S_K, H_KV, D, device="meta")},
        ValueError,
        f"v must be on q's device {torch.empty(0).device}, got meta",
    ),
    "head sizes differ": (
        {"k": torch.zeros(B, S_K, H_KV, 7)},
        ValueError,
        r"k must have q's head size 8, got k \(2, 6, 2, 7\) with q \(2, 5, 4, 8\)",
    ),
    "batch sizes differ": (
        {"k": torch.zeros(3, S_K, H_KV, D)},
        ValueError,
        "k and v must have q's batch size 2, got k",
    ),
    "batch size of v": ({"v": torch.zeros(1, S_K, H_KV, D)}, ValueError, "k and v must have q's batch size 2"),
    "lengths differ": ({"v": torch.zeros(B, 7, H_KV, D)}, ValueError, "v must have k's length and heads"),
    "heads of v": ({"v": torch.zeros(B, S_K, 4, D)}, ValueError, "v must have k's length and heads"),
    "heads that do not divide": (
        {"k": torch.zeros(B, S_K, 3, D), "v": torch.zeros(B, S_K, 3, D)},
        ValueError,
        "number of heads of q must be a multiple of k's, got 4 and 3",
    ),
    "more key heads than heads": (
        {"k": torch.zeros(B, S_K, 8, D), "v": torch.zeros(B, S_K, 8, D)},
        ValueError,
        "must be a multiple of k's, got 4 and 8",
    ),
    "no key heads": ({"k": torch.zeros(B, S_K, 0, D), "v": torch.zeros(B, S_K, 0, D)}, ValueError, "got 4 and 0"),
    "head size 0": (
        {"q": torch.zeros(B, S_Q, H, 0), "k": torch.zeros(B, S_K, H_KV, 0)},
        ValueError,
        "head sizes must be at least 1, got 0",
    ),
    "value head size 0": (
        {"v": torch.zeros(B, S_K, H_KV, 0)},
        ValueError,
        "head sizes must be at least 1, got 8 and 0",
    ),
    # window, scale, softcap
    "window of one": ({"window": (3,)}, ValueError, r"window must be two integers \(left, right\), got \(3,\)"),
    "window of floats": ({"window": (1.5, 2)}, ValueError, "window must be two integers"),
    "window as an integer": ({"window": 5}, (TypeError, ValueError), "window must be two integers"),
    "window as None": ({"window": None}, (TypeError, ValueError), "window must be two integers"),
    "window of strings": ({"window": "ab"}, (TypeError, ValueError), "window must be two integers"),
    "window below -1": ({"window": (-2, 0)}, ValueError, "window must hold lengths >= 0, or -1 for unbounded, got"),
    "scale nan": ({"scale": NAN}, ValueError, "scale must be a finite number, got nan"),
    "scale inf": ({"scale": INF}, ValueError, "scale must be a finite number, got inf"),
    "scale as a string": ({"scale": "1"}, TypeError, "scale must be"),
    "softcap negative": ({"softcap": -1.0}, ValueError, r"softcap must be a finite number >= 0 \(0 is off\), got -1.0"),
    "softcap nan": ({"softcap": NAN}, ValueError, "softcap must be a finite number"),
    "softcap inf": ({"softcap": INF}, ValueError, "softcap must be a finite number"),
    "softcap None": ({"softcap": None}, TypeError, "softcap must be"),
    # mask, bias
    "list for mask": ({"mask": [[True]]}, TypeError, "mask must be a torch.Tensor or None, got list"),
    "float mask": (
        {"mask": torch.zeros(S_Q, S_K)},
        TypeError,
        r"mask must be bool \(True = may attend\), got torch.float32; pass floats as bias",
    ),
    "mask that does not broadcast": (
        {"mask": torch.ones(S_K, S_Q, dtype=torch.bool)},
        ValueError,
        r"mask must broadcast to \(b, h, s_q, s_k\) = \(2, 4, 5, 6\), got",
    ),
    "mask of 5 axes": ({"mask": torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)}, ValueError, "mask must broadcast"),
    "mask elsewhere": (
        {"mask": torch.ones(S_Q, S_K, dtype=torch.bool, device="meta")},
        ValueError,
        f"mask must be on q's device {torch.empty(0).device}, got meta",
    ),
    "bool bias": (
        {"bias": torch.ones(S_Q, S_K, dtype=torch.bool)},
        TypeError,
        "bias must be torch.float32, got torch.bool",
    ),
    "bfloat16 bias of float32 q": (
        {"bias": torch.zeros(S_Q, S_K, dtype=torch.bfloat16)},
        TypeError,
        "bias must be torch.float32, got torch.bfloat16",
    ),
    "float64 bias": ({"bias": torch.zeros(S_Q, S_K, dtype=torch.float64)}, TypeError, "bias must be torch.float32"),
    "bias that does not broadcast": (
        {"bias": torch.zeros(3, 1, 1)},
        ValueError,
        r"bias must broadcast .*, got \((1, )?3, 1, 1\)",
    ),
    "number for bias": ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor or None, got float"),
    # alibi_slopes, sink, kv_lengths
    "list for slopes": (
        {"alibi_slopes": [0.5] * H},
        TypeError,
        "alibi_slopes must be a torch.Tensor or None, got list",
    ),
    "slopes of another length": (
        {"alibi_slopes": torch.zeros(3)},
        ValueError,
        r"alibi_slopes must be \(h,\) = \(4,\) or \(b, h\) = \(2, 4\), got \(3,\)",
    ),
    "slopes transposed": ({"alibi_slopes": torch.zeros(H, B)}, ValueError, "alibi_slopes must be"),
    "integer slopes": (
        {"alibi_slopes": torch.zeros(H, dtype=torch.int64)},
        TypeError,
        "alibi_slopes must be torch.float32",
    ),
    "sink of another length": ({"sink": torch.zeros(3)}, ValueError, r"sink must be \(h,\) = \(4,\), got \(3,\)"),
    "sink per sequence": ({"sink": torch.zeros(B, H)}, ValueError, "sink must be"),
    "sink in float64": ({"sink": torch.zeros(H, dtype=torch.float64)}, TypeError, "sink must be torch.float32"),
    "list for lengths": ({"kv_lengths": [3, 4]}, TypeError, "kv_lengths must be a torch.Tensor or None, got list"),
    "float lengths": (
        {"kv_lengths": torch.tensor([3.0, 4.0])},
        TypeError,
        "kv_lengths must be int32 or int64, got torch.float32",
    ),
    "lengths of another size": (
        {"kv_lengths": torch.tensor([3])},
        ValueError,
        r"kv_lengths must be \(b,\) = \(2,\), got \(1,\)",
    ),
    "negative lengths": (
        {"kv_lengths": torch.tensor([3, -1])},
        ValueError,
        "kv_lengths must lie between 0 and s_k = 6, got values from -1 to 3",
    ),
    "lengths beyond s_k": (
        {"kv_lengths": torch.tensor([3, 7])},
        ValueError,
        "must lie between 0 and s_k = 6, got values from 3 to 7",
    ),
    "lengths beyond 32 bits": (
        {"kv_lengths": torch.tensor([3, 2**32 + 1])},
        ValueError,
        "must lie between 0 and s_k = 6",
    ),
    # dropout
    "dropout_p negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must be between 0 and 1, got -0.1"),
    "dropout_p above 1": ({"dropout_p": 1.1}, ValueError, "dropout_p must be between 0 and 1, got 1.1"),
    "dropout_p nan": ({"dropout_p": NAN}, ValueError, "dropout_p must be between 0 and 1, got nan"),
    "dropout_p None": ({"dropout_p": None}, TypeError, "dropout_p must be"),
    "seed of 65 bits": ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed must fit in 64 bits, got"),
    "float seed": ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be"),
    "float seed tensor": (
        {"dropout_p": 0.1, "seed": torch.tensor(1.0)},
        ValueError,
        r"seed must be an int or a \(\) int64 tensor, got \(\) torch.float32",
    ),
    "seed of one element": ({"dropout_p": 0.1, "seed": torch.tensor([1])}, ValueError, "seed must be an int or a"),
    # backend
    "unknown backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of native, triton, reference or None, got 'cuda'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(name, backend):
    change, kind, text = BAD[name]
    arguments = {
        "q": torch.zeros(B, S_Q, H, D),
        "k": torch.zeros(B, S_K, H_KV, D),
        "v": torch.zeros(B, S_K, H_KV, D),
        "backend": backend,
    } | change
    with pytest.raises(kind, match=text):
        attention(**arguments)


def test_options_are_given_by_name_only():
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(TypeError, match="positional"):
        attention(q, q, q, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bad_call_draws_no_random_number(dtype):
    q = torch.zeros(1, 2, 1, 4, dtype=dtype)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="backend must be one of"):
        attention(q, q, q, dropout_p=0.5, backend="cuda")
    assert torch.equal(torch.get_rng_state(), state)
