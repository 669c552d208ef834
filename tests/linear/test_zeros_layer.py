"""The layers of ZeroS, an oracle made of fla's kernels' references, and what it costs."""

import pytest
import sympy as sp
import torch
import torch.nn.functional as F

from effattn_lab.linear import linear_attention_cost
from effattn_lab.linear import zeros_cost as cost
from effattn_lab.linear.zeros import zeros, zeros_chunked
from effattn_lab.linear.zeros_layer import ZeroS, ZeroSSoftmax
from effattn_lab.linear.zeros_weights import unit
from effattn_lab.measure import zeros_peers

LAYERS = {
    "paper": (ZeroS, {}),
    "grouped": (ZeroS, {"num_kv_heads": 2, "head_dim": 6, "value_dim": 3}),
    "constant-kept": (ZeroS, {"zero_order": True, "logits": "linear"}),
    "no-gates-no-norm": (ZeroS, {"gated": False, "norm": False, "rope": False, "length_scale": "linear"}),
    "only-constant-gated": (ZeroS, {"gated": False, "zero_order": True, "logits": "quadratic"}),
    "softmax": (ZeroSSoftmax, {}),
    "softmax-cosine": (ZeroSSoftmax, {"cosine": True, "num_kv_heads": 1, "length_scale": "sqrt"}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_trains_and_decodes(name):
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    layer = kind(16, 4, norm_eps=1e-12, **options)
    x = torch.randn(8, 20, 16)
    # How far the token is from the mean of the past: what zero-sum weights are for.
    target = torch.randn(8, 20, 16).cumsum(1) * 0 + (x - x.cumsum(1) / torch.arange(1, 21)[:, None]).roll(
        1, 1
    )
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        want, state = layer(x), None
        first, state = layer(x[:, :15], return_state=True)
        outs = [first]
        for t in range(15, 20):
            out, state = layer.step(state, x[:, t : t + 1])
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-4, atol=1e-4)
        out, again = layer.step(None, x[:, :1])
        torch.testing.assert_close(out, want[:, :1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.step(again, x[:, 1:2])[0], want[:, 1:2], rtol=1e-4, atol=1e-4)
        if kind is ZeroS:
            kept = sum(part[0].numel() for part in (*state.mix, state.u_sum))
            assert kept == layer.state_elements


def test_layer_is_causal():
    torch.manual_seed(0)
    for kind in (ZeroS, ZeroSSoftmax):
        layer = kind(16, 2)
        x = torch.randn(1, 30, 16)
        before = layer(x)
        x[:, 20:] *= 40.0
        after = layer(x)
        assert torch.equal(before[:, :20], after[:, :20])
        assert (before[:, 20] != after[:, 20]).any()
        assert (
            before[:, 0] == 0
        ).all()  # position 1 gets no update: LayerNorm of 0 is 0, and there is no bias


def test_layer_is_the_formula():
    torch.manual_seed(0)
    layer = ZeroS(12, 3, rope=False, chunk_size=4).double()
    with torch.no_grad():
        layer.mu.normal_()
        layer.tau.normal_()
    x = torch.randn(2, 9, 12, dtype=torch.float64)

    def split(p):
        return p(x).view(2, 9, 3, -1).transpose(1, 2)

    q, k, v, u = (split(p) for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.u_proj))
    gate_1, gate_h = torch.sigmoid(split(layer.gate_proj)).unbind(-1)
    prior, steps = torch.exp(layer.tau)[:, None, None], torch.arange(1, 10)[:, None]
    mean = (prior * layer.mu[:, None] + u.cumsum(2)) / (prior + steps)
    s = -(u * mean).sum(-1) / 2  # sqrt(4)
    o = F.layer_norm(zeros(q, k, v, s, gate_1, gate_h, causal=True), (4,), eps=1e-5)
    want = layer.o_proj(o.transpose(1, 2).reshape(2, 9, 12))
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)
    layer.length_scale = "linear"
    o = F.layer_norm(zeros(q, k, v, s, gate_1, gate_h, causal=True) * steps, (4,), eps=1e-5)
    torch.testing.assert_close(
        layer(x), layer.o_proj(o.transpose(1, 2).reshape(2, 9, 12)), rtol=0, atol=1e-12
    )


def test_at_initialisation_the_norm_hardly_normalises():
    """With the authors' epsilon late positions start almost silent; two switches mend it."""
    torch.manual_seed(0)
    x = torch.randn(1, 512, 256)
    sizes = {}
    for name, options in (("paper", {}), ("eps", {"norm_eps": 1e-12}), ("t", {"length_scale": "linear"})):
        torch.manual_seed(1)
        layer = ZeroS(256, 4, **options)
        with torch.no_grad():
            layer.o_proj.weight.copy_(torch.eye(256))
            sizes[name] = layer(x)[0, -50:].square().mean().sqrt().item()
    assert sizes["paper"] < 0.1
    assert sizes["eps"] == pytest.approx(1.0, abs=0.01)
    assert sizes["t"] > 5 * sizes["paper"]


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_against_fla_run_three_times(form):
    """fla has no ZeroS, but the scan is three linear attentions, with keys times e^s, s and 1: its naive forms."""
    naive = pytest.importorskip("fla.ops.linear_attn.naive", reason="fla-core is not installed (extra peers)")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 128, 16, generator=g) for _ in range(3))
    s = torch.randn(2, 3, 128, generator=g)
    gate_1, gate_h = (torch.sigmoid(torch.randn(2, 3, 128, generator=g)) for _ in range(2))
    run = {
        "chunk": lambda *x: naive.naive_chunk_linear_attn(*x, scale=1.0, normalize=False),
        "recurrent": lambda *x: naive.naive_recurrent_linear_attn(*x, scale=1.0, normalize=False)[0],
    }[form]
    qh, kh = unit(q).transpose(1, 2), unit(k).transpose(1, 2)
    F_, G, H = (
        run(qh, kh * w.transpose(1, 2)[..., None], v.transpose(1, 2)).transpose(1, 2)
        for w in (s.exp(), s, torch.ones_like(s))
    )
    t = torch.arange(1, 129)
    alpha, beta = gate_h / s.exp().cumsum(-1), (gate_1 - gate_h) / t
    gamma = s.cumsum(-1) / t**2 * (gate_h - gate_1) - gate_h / t
    want = alpha[..., None] * F_ + beta[..., None] * G + gamma[..., None] * H
    got = zeros_chunked(q, k, v, s, gate_1, gate_h, causal=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bad_layers_are_named():
    for message, kind, options in (
        ("width: expected an integer", ZeroS, {"width": 0}),
        ("num_kv_heads: expected a divisor", ZeroS, {"num_kv_heads": 3}),
        ("num_heads: expected a divisor of width", ZeroSSoftmax, {"num_heads": 5}),
        ("logits: expected one of deviation", ZeroS, {"logits": "distance"}),
        ("length_scale: expected one of none", ZeroSSoftmax, {"length_scale": "t"}),
        ("norm_eps: expected a number above 0", ZeroS, {"norm_eps": 0.0}),
        ("chunk_size: expected an integer", ZeroS, {"chunk_size": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**{"width": 16, "num_heads": 4, **options})
    with pytest.raises(ValueError, match="x: expected shape"):
        ZeroS(16, 4)(torch.randn(2, 5, 8))


def test_flops_are_counted():
    """Products of the readable form, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    n, d, dv, chunk, heads = 128, 16, 24, 32, 3
    q, k, v = (torch.rand(1, heads, n, x) for x in (d, d, dv))
    rows = [torch.rand(1, heads, n) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        zeros_chunked(q, k, v, *rows, causal=True, chunk_size=chunk)
    assert counter.get_total_flops() == cost.chunked_flops(heads, n, d, dv, chunk)


def test_known_costs():
    n, d, c = sp.symbols("N D C", positive=True)
    assert sp.expand(cost.chunked_flops(1, n, d, d, c) / n) == 4 * c * d + 12 * d**2
    assert cost.recurrent_flops(1, 1, d, d) == 13 * d**2
    assert (
        sp.limit(cost.state_elements(1, d, d) / linear_attention_cost.state_elements(1, d, d), d, sp.oo) == 3
    )
    assert cost.crossover_cache(128) == pytest.approx(1.5 * 128 * 4 / 2, rel=0.01)
    assert cost.crossover_cache(128, state_itemsize=2) == pytest.approx(192, rel=0.01)
    assert cost.crossover_step(d) == 2 * cost.crossover_cache(d)
    assert cost.crossover_flops(64) == (12 * 64 * 64 + 2 * 64 * 128) / 128 - 1
    assert cost.materialized_scan_bytes(12, 2048, 64, 64) == pytest.approx(0.4e9, rel=0.01)
    assert cost.step_bytes(1, 1, 64, 64) == 8 * (3 * 64 * 64 + 4 + 64) + 2 * 5 * 64


def test_xray_beside_fla(monkeypatch):
    """The smallest table, on one GPU; real compilations. One pass for three states moves fewer bytes."""
    pytest.importorskip("fla.ops.common.chunk_h", reason="fla-core is not installed (extra peers)")
    monkeypatch.setattr(zeros_peers, "L2NORM_ROWS", (32,))
    monkeypatch.setattr(zeros_peers, "L2NORM_WARPS", (1,))
    rows = {(r["by"], r["kernel"]): r for r in zeros_peers.rows("A100", head_dim=16)}
    assert list(rows) == [
        ("ours", "states"), ("ours", "outputs"), ("ours", "total"), ("fla", "states"), ("fla", "outputs"),
        ("fla", "l2norm"), ("PyTorch", "scale and mix"), ("fla and PyTorch", "total"),
    ]  # fmt: skip
    ours, fla = rows["ours", "total"], rows["fla and PyTorch", "total"]
    assert ours["spill_bytes"] == 0
    assert ours["bytes_per_token"] < fla["bytes_per_token"] / 2
    assert ours["tensor_core_per_token"] < fla["tensor_core_per_token"]
    # By hand: K, V, logits; Q, K, V, O; three states written and read; scalars.
    assert (
        2 * (2 + 4) * 16 * 1 + 12 * 16 * 16 / 64
        < ours["bytes_per_token"]
        < 2 * 6 * 16 + 12 * 16 * 16 / 64 + 40
    )
    assert rows["fla", "states"]["runs"] == 3
    with pytest.raises(ValueError, match="head_dim: expected 16, 32 or 64, got 128"):
        zeros_peers.rows("A100", head_dim=128)


@pytest.mark.slow
def test_shipped_tiles_do_not_spill():
    """Both kernels; ``effattn xray zeros --gpu all`` has the other GPUs and dimensions."""
    from effattn_lab.measure.xray import xray_rows

    for row in xray_rows("zeros", gpus="A100,MI300X", head_dims=(64,), dtypes=("bf16",)):
        what = (row["kernel"], row["gpu"])
        assert row["spill_bytes"] == 0, what
        assert row["fits"], what
        assert row["tensor_core_instructions"] > 0, what
    for row in xray_rows(
        "zeros", gpus="A100", head_dims=(128,), dtypes=("fp32",)
    ):  # the tightest for registers
        assert row["spill_bytes"] == 0, row["kernel"]
        assert row["fits"], row["kernel"]
