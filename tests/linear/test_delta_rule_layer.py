"""DeltaNet as a layer: it trains, decodes with the numbers of training, keeps its state in bounds."""

import pytest
import torch

from effattn_lab.linear.delta_rule import transition_eigenvalue
from effattn_lab.linear.delta_rule_layer import DeltaRule

OPTIONS = (
    dict(),
    dict(gated=True),
    dict(allow_neg_eigval=True, num_kv_heads=2, conv_width=1),
    dict(gated=True, num_kv_heads=1, head_dim=6, value_dim=3, conv_width=0),
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_trains_and_decodes(options):
    torch.manual_seed(0)
    layer = DeltaRule(16, 4, chunk_size=8, **options)
    x = torch.randn(8, 20, 16)
    x[:, 10:] = x[:, :10]  # every token comes back: its first half is the answer to its second
    target = x.roll(-1, 1)
    optimizer = torch.optim.Adam(layer.parameters(), 3e-2)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target)[:, 10:-1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert losses[-1] < 0.75 * losses[0]
    with torch.no_grad():
        want, end = layer(x, return_state=True)
        first, state = layer(x[:, :7], return_state=True)
        second, state = layer(x[:, 7:15], state, return_state=True)
        outs = [first, second]
        for t in range(15, 20):
            out, state = layer.step(state, x[:, t : t + 1])
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tuple(state), tuple(end), rtol=1e-4, atol=1e-4)
    assert sum(part[0].numel() for part in state) == layer.state_elements


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_leak(options):
    """Through the convolutions too: to the bit, and by gradient."""
    torch.manual_seed(0)
    layer = DeltaRule(16, 4, chunk_size=8, **options)
    x = torch.randn(2, 21, 16, requires_grad=True)
    before = layer(x)
    with torch.no_grad():
        for token in (0, 3, 8, 20):
            changed = x.clone()
            changed[:, token:] += 1
            after = layer(changed)
            assert torch.equal(after[:, :token], before[:, :token])
            assert (after[:, token] != before[:, token]).any()
    (grad,) = torch.autograd.grad(before[:, 11].square().sum(), x)
    assert (grad[:, 12:] == 0).all()
    assert (grad[:, 11] != 0).any()


def test_a_loud_input_does_not_explode():
    """Keys are scaled to length 1 in the layer, so the state stays in bounds; without, it would not."""
    torch.manual_seed(0)
    layer = DeltaRule(32, 2, allow_neg_eigval=True)
    x = 1e3 * torch.randn(1, 500, 32)
    with torch.no_grad():
        _, k, _, beta, _, _ = layer._inputs(x, None)
        assert transition_eigenvalue(k, beta).abs().max() <= 1 + 1e-5
        out, state = layer(x, return_state=True)
        assert out.isfinite().all()
        v = layer._inputs(x, None)[2]
        # Each write adds at most beta |v| to a column, and none is amplified afterwards.
        assert state.S.abs().max() <= 2 * 500 * v.abs().max()


def test_the_gate_starts_with_long_and_short_memories():
    torch.manual_seed(0)
    layer = DeltaRule(64, 64, head_dim=2, value_dim=2, gated=True)
    g = layer._inputs(torch.zeros(1, 1, 64), None)[4]
    assert (g < 0).all()
    assert g.min() < -0.1  # forgets within tokens
    assert g.max() > -0.01  # keeps for hundreds
    assert layer.A_log._no_weight_decay
    assert layer.dt_bias._no_weight_decay


def test_beta_range():
    torch.manual_seed(0)
    x = 10 * torch.randn(1, 200, 16)
    for wide in (False, True):
        layer = DeltaRule(16, 2, allow_neg_eigval=wide)
        beta = layer._inputs(x, None)[3]
        assert beta.min() >= 0
        assert (beta.max() > 1) == wide


def test_bad_input_is_named():
    for message, options in (
        ("width: expected an integer", dict(width=0)),
        ("num_heads: expected a divisor of width", dict(num_heads=3)),
        ("num_kv_heads: expected a divisor", dict(num_kv_heads=3)),
        ("conv_width: expected an integer", dict(conv_width=-1)),
        ("head_dim: expected an integer", dict(head_dim=0)),
        ("chunk_size: expected an integer", dict(chunk_size=0)),
    ):
        with pytest.raises(ValueError, match=message):
            DeltaRule(**{"width": 16, "num_heads": 4, **options})
    layer = DeltaRule(16, 4)
    with pytest.raises(ValueError, match="x: expected shape"):
        layer(torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match="state: expected a DeltaRuleState"):
        layer(torch.randn(2, 5, 16), torch.zeros(2, 4, 4, 4))
    _, state = layer(torch.randn(2, 5, 16), return_state=True)
    with pytest.raises(ValueError, match="state: expected conv of shape"):
        layer(torch.randn(2, 5, 16), state._replace(conv=state.conv[:, 1:]))
