import pytest
import torch

import lmkernels as lmk
import lmkernels.models


def operands(b=2, s_q=5, s_k=7, h=4, h_kv=2):
    return torch.randn(b, s_q, h, 8), torch.randn(b, s_k, h_kv, 8), torch.randn(b, s_k, h_kv, 8)


def test_maps_are_attention_weights_in_the_order_of_the_calls(backend):
    q, k, v = operands()
    options = [
        {"causal": True, "softcap": 2.0, "sink": torch.randn(4)},
        {"window": (2, 1), "bias": torch.randn(4, 5, 7), "scale": 0.3},
        {"mask": torch.rand(2, 1, 1, 7) < 0.5, "alibi_slopes": torch.rand(4), "kv_lengths": torch.tensor([3, 7])},
    ]
    with lmk.capture_attention() as maps:
        for each in options:
            lmk.attention(q, k, v, **each, backend=backend, dropout_p=0.4)
    assert len(maps) == 3
    for x, each in zip(maps, options):
        torch.testing.assert_close(x, lmk.attention_weights(q, k, **each), rtol=0, atol=0)
    lmk.attention(q, k, v)
    assert len(maps) == 3  # closed


def test_a_map_times_the_values_is_the_output():
    q, k, v = operands()
    with lmk.capture_attention() as maps:
        out = lmk.attention(q, k, v, causal=True)
        upper_left = lmk.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
    values = v.repeat_interleave(2, 2).transpose(1, 2)  # (b, h, s_k, d)
    torch.testing.assert_close((maps[0] @ values).transpose(1, 2), out)
    torch.testing.assert_close(maps[1] @ values, upper_left)


def test_packed_sequences_give_padded_maps(backend):
    q, k, v = (x[0] for x in operands())
    bounds_q, bounds_k = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7])
    options = {"causal": True, "alibi_slopes": torch.rand(2, 4), "mask": torch.rand(2, 1, 3, 4) < 0.8}
    with lmk.capture_attention() as maps:
        lmk.attention_varlen(q, k, v, bounds_q, bounds_k, 3, 4, **options, backend=backend)
    assert maps[0].shape == (2, 4, 3, 4)
    for i, (s_q, s_k) in enumerate(((2, 4), (3, 3))):
        alone = lmk.attention_weights(
            q[bounds_q[i] : bounds_q[i + 1]][None],
            k[bounds_k[i] : bounds_k[i + 1]][None],
            causal=True,
            alibi_slopes=options["alibi_slopes"][i],
            mask=options["mask"][i : i + 1, :, :s_q, :s_k],
        )
        torch.testing.assert_close(maps[0][i : i + 1, :, :s_q, :s_k], alone)
        assert not maps[0][i, :, s_q:].any() and not maps[0][i, :, :, s_k:].any()


def test_gradients_only_on_request():
    q, k, v = operands()
    q.requires_grad_()
    with lmk.capture_attention(detach=False) as live, lmk.capture_attention() as maps:
        out = lmk.attention(q, k, v)
    assert live[0].requires_grad and not maps[0].requires_grad and out.requires_grad
    torch.autograd.grad(live[0].square().sum(), q)


def test_it_closes_after_an_exception():
    q, k, v = operands()
    with pytest.raises(RuntimeError, match="on purpose"), lmk.capture_attention() as maps:
        lmk.attention(q, k, v)
        raise RuntimeError("on purpose")
    lmk.attention(q, k, v)
    assert len(maps) == 1


def test_compiled():
    q, k, v = operands()
    compiled = torch.compile(lambda q, k, v: lmk.attention(q, k, v, causal=True) * 2, backend="eager")
    expected = compiled(q, k, v)
    with lmk.capture_attention() as maps:
        for _ in range(2):
            assert torch.equal(compiled(q, k, v), expected)
    assert len(maps) == 2
    torch.testing.assert_close(maps[1], lmk.attention_weights(q, k, causal=True))
    whole = torch.compile(lambda q, k, v: lmk.attention(q, k, v, causal=True) * 2, backend="eager", fullgraph=True)
    assert torch.equal(whole(q, k, v), expected)


def test_models():
    model = lmk.models.GPT2LMHeadModel(lmk.models.GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=20)).eval()
    with lmk.capture_attention() as maps, torch.no_grad():
        model(torch.randint(20, (2, 6)))
    assert [x.shape for x in maps] == [(2, 2, 6, 6)] * 3
    for x in maps:
        torch.testing.assert_close(x.sum(-1), torch.ones(2, 2, 6))
        assert not x.triu(1).any()


def test_generate_is_heard_at_every_step():
    config = lmk.models.GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=20, eos_token_id=None)
    model, ids = lmk.models.GPT2LMHeadModel(config).eval(), torch.randint(20, (2, 6))
    with lmk.capture_attention() as maps:
        tokens = model.generate(ids, max_new_tokens=4)
    assert [x.shape for x in maps] == [(2, 2, 6, 6)] * 3 + [(2, 2, 1, 6 + i) for i in (1, 2, 3) for _ in range(3)]
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=4))
