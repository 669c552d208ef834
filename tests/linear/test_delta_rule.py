"""The delta rule in PyTorch: every form against the reference in float64, gradients, state, leaks, bad input."""

import math

import pytest
import torch

from effattn_lab.linear.delta_rule import (
    decay_matrix,
    delta_rule,
    delta_rule_chunked,
    delta_rule_step,
    forward_substitution,
    l2_normalize,
    transition_eigenvalue,
    wy_transform,
)

LENGTHS = (1, 63, 64, 65, 1000)
CHUNKS = (1, 48, 64, 2000)
GATES = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def draw(shape, gated, dtype=torch.float64, seed=0, decay=1.0):
    """q, k, v, beta, g of ``(B, Hq, Hkv, N, D, Dv)``: unit keys that overlap, beta up to 2, decays from 1 to e^-3."""
    batch, hq, hkv, n, dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    # A common direction: independent keys are nearly orthogonal, and then the erasing could be left out unnoticed.
    k = l2_normalize(randn(batch, hkv, n, dim) + 1.5)
    inputs = [2 * randn(batch, hq, n, dim), k, randn(batch, hkv, n, value_dim)]
    inputs += [2 * torch.sigmoid(2 * randn(batch, hkv, n)), -decay * randn(batch, hkv, n).abs()]
    return [x.to(dtype) for x in (inputs if gated else inputs[:4])]


def by_hand(q, k, v, beta, g, scale, state):
    """The definition, one head after the other: the whole transition matrix, its product, the write, the read."""
    groups, dim = q.shape[1] // k.shape[1], q.shape[3]
    out, states = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), state.clone()
    eye = torch.eye(dim, dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(k.shape[1]):
            s = state[b, h]
            for t in range(q.shape[2]):
                k_t, alpha = k[b, h, t], math.exp(g[b, h, t])
                transition = alpha * (eye - beta[b, h, t] * torch.outer(k_t, k_t))
                s = transition @ s + beta[b, h, t] * torch.outer(k_t, v[b, h, t])
                for i in range(h * groups, (h + 1) * groups):
                    out[b, i, t] = scale * s.T @ q[b, i, t]
            states[b, h] = s
    return out, states


@GATES
def test_reference_is_the_definition(gated):
    q, k, v, beta, *g = draw((2, 4, 2, 9, 5, 3), gated)
    start = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    got = delta_rule(q, k, v, beta, *g, scale=0.7, initial_state=start, return_state=True)
    want = by_hand(q, k, v, beta, g[0] if g else torch.zeros_like(beta), 0.7, start)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@GATES
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_the_reference(length, gated):
    inputs = draw((1, 2, 1, length, 32, 32), gated)
    want = delta_rule(*inputs, return_state=True)
    for chunk_size in CHUNKS:
        got = delta_rule_chunked(*inputs, chunk_size=chunk_size, return_state=True)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@GATES
@pytest.mark.parametrize("dims", [(32, 32), (60, 24), (64, 64), (128, 128)], ids=str)
def test_forms_agree_for_every_head_dim(dims, gated):
    inputs = draw((1, 4, 2, 70, *dims), gated)
    start = torch.randn(1, 2, *dims, dtype=torch.float64)
    want = delta_rule(*inputs, initial_state=start, return_state=True)
    got = delta_rule_chunked(*inputs, initial_state=start, return_state=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@GATES
def test_a_sequence_in_pieces(gated):
    """Prefill, hand the state over, prefill again, then decode token by token: the numbers of one pass."""
    inputs = draw((2, 4, 2, 90, 16, 8), gated)
    want, end = delta_rule_chunked(*inputs, return_state=True)
    parts, state = [], None
    for a, b in ((0, 37), (37, 80)):
        piece = [x[:, :, a:b] for x in inputs]
        out, state = delta_rule_chunked(*piece, chunk_size=16, initial_state=state, return_state=True)
        parts.append(out)
    for t in range(80, 90):
        before = state.clone()
        out, new = delta_rule_step(state, *(x[:, :, t : t + 1] for x in inputs))
        assert torch.equal(state, before)  # the old state can be kept, for a draft say
        parts.append(out)
        state = new
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


@GATES
def test_step_has_the_numbers_of_the_parallel_form_in_float32(gated):
    inputs = draw((1, 4, 2, 300, 32, 32), gated, torch.float32)
    want, state = delta_rule_chunked(*inputs), None
    size = want.abs().max()
    for t in range(300):
        out, state = delta_rule_step(state, *(x[:, :, t : t + 1] for x in inputs))
        assert (out - want[:, :, t : t + 1]).abs().max() <= 50 * torch.finfo(torch.float32).eps * size


@GATES
@pytest.mark.parametrize("form", ["reference", "chunked", "step"])
def test_gradcheck(form, gated):
    n = 1 if form == "step" else 5
    inputs = draw((1, 2, 1, n, 3, 2), gated)
    inputs = [x.requires_grad_() for x in (torch.randn(1, 1, 3, 2, dtype=torch.float64), *inputs)]

    def run(state, *x):
        if form == "reference":
            return delta_rule(*x, initial_state=state, return_state=True)
        if form == "chunked":
            return delta_rule_chunked(*x, chunk_size=3, initial_state=state, return_state=True)
        return delta_rule_step(state, *x)

    assert torch.autograd.gradcheck(run, inputs)


def plain_recurrence(q, k, v, beta, g=None):
    """Straight from the formula, in the dtype of the inputs throughout."""
    state, outs = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[2]):
        if g is not None:
            state = g[:, :, t, None, None].exp() * state
        error = v[:, :, t] - (k[:, :, t, None] @ state)[:, :, 0]
        state = state + (beta[:, :, t, None] * k[:, :, t])[..., None] * error[..., None, :]
        outs.append((q.shape[3] ** -0.5 * q[:, :, t, None]) @ state)
    return torch.cat(outs, dim=2)


def plain_chunks(q, k, v, beta, g=None, size=64):
    """The sheet's formulas, with an explicit inverse."""
    q, outs, state = q * q.shape[3] ** -0.5, [], q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    g = torch.zeros_like(beta) if g is None else g
    for a in range(0, q.shape[2], size):
        Q, K, V, b, G = (x[:, :, a : a + size] for x in (q, k, v, beta, g))
        c = G.cumsum(-1)
        gamma = (c[..., :, None] - c[..., None, :]).tril().exp().tril()
        lower = (b[..., None] * gamma * (K @ K.mT)).tril(-1)
        T = torch.linalg.inv(torch.eye(K.shape[2], dtype=q.dtype) + lower) * b[..., None, :]
        X = T @ V - (T * c.exp()[..., None, :]) @ K @ state
        outs.append(c.exp()[..., None] * (Q @ state) + ((Q @ K.mT) * gamma) @ X)
        last = c[..., -1, None]
        state = last[..., None].exp() * state + ((last - c).exp()[..., None] * K).mT @ X
    return torch.cat(outs, dim=2)


@GATES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_rounding(dtype, gated):
    """At most twice the error of a plain run in the same dtype, both against float64.

    Both forms are held against themselves in fp32: where keys overlap and beta nears 2, a row of the triangular
    system adds up 63 terms that nearly cancel, and chunks round a few times as much as the recurrence does.
    """
    inputs = draw((1, 2, 2, 90, 32, 32), gated, dtype, decay=0.1)
    truth = delta_rule(*(x.double() for x in inputs))
    wide = dtype == torch.float32
    for form, plain in ((delta_rule, plain_recurrence), (delta_rule_chunked, plain_chunks)):
        allowed = 2 * ((plain if wide else plain_recurrence)(*inputs).double() - truth).abs().max()
        out = form(*inputs)
        assert out.dtype == dtype
        assert (out.double() - truth).abs().max() <= allowed


FORMS = {
    "reference": delta_rule,
    "chunked": lambda *x: delta_rule_chunked(*x, chunk_size=16),
    "one-chunk": lambda *x: delta_rule_chunked(*x, chunk_size=70),
}


@GATES
@pytest.mark.parametrize("form", FORMS)
def test_no_leak(form, gated):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own."""
    inputs = draw((1, 2, 1, 70, 16, 8), gated, torch.float32)
    before = FORMS[form](*inputs)
    for token in (0, 15, 16, 17, 63, 69):
        changed = [x.clone() for x in inputs]
        for x in changed[1:]:
            x[:, :, token:] -= 0.3
        after = FORMS[form](inputs[0], *changed[1:])
        assert torch.equal(before[:, :, :token], after[:, :, :token])
        assert (before[:, :, token] != after[:, :, token]).any()


@GATES
@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_from_the_past_to_the_future(form, gated):
    inputs = [x.requires_grad_() for x in draw((1, 2, 1, 40, 8, 8), gated)]
    grads = torch.autograd.grad(FORMS[form](*inputs)[:, :, :21].sum(), inputs)
    for grad in grads[1:]:
        assert (grad[:, :, 21:] == 0).all()
        assert (grad[:, :, 20] != 0).any()


def test_orthonormal_keys_are_overwritten_exactly():
    """beta = 1: the state answers the last value written to each key, whatever stood there; linear attention adds."""
    keys = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[:8]
    order = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 3, 3, 0])
    values = torch.randn(1, 1, 11, 4, dtype=torch.float64)
    k = keys[order][None, None]
    _, state = delta_rule_chunked(k, k, values, torch.ones(1, 1, 11, dtype=torch.float64), return_state=True)
    last = values[0, 0][[10, 1, 2, 9, 4, 5, 6, 7]]
    torch.testing.assert_close(keys @ state[0, 0], last, rtol=0, atol=1e-12)
    assert (keys @ (k[0, 0].T @ values[0, 0]) - last).abs().max() > 0.1


def test_without_overlap_it_is_linear_attention():
    """Orthogonal keys, beta 1: there is nothing to erase, and the state is the sum of k v^T."""
    from effattn_lab.linear.linear_attention import linear_attention

    k = torch.eye(16, dtype=torch.float64)[None, None]
    q, v = torch.randn(2, 1, 1, 16, 16, dtype=torch.float64)
    got = delta_rule_chunked(q, k, v, torch.ones(1, 1, 16, dtype=torch.float64), chunk_size=5)
    want = linear_attention(q, k, v, feature_map=None, causal=True, normalize=False)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_gate_that_is_always_open_is_no_gate():
    q, k, v, beta, g = draw((1, 2, 2, 70, 8, 8), True)
    torch.testing.assert_close(
        delta_rule_chunked(q, k, v, beta, 0 * g), delta_rule_chunked(q, k, v, beta), rtol=0, atol=1e-13
    )


def test_one_write_is_a_step_of_gradient_descent():
    """The loss |S^T k - v|^2 / 2, differentiated by autograd; beta is the learning rate."""
    q, k, v, beta = draw((1, 1, 1, 1, 6, 4), False)
    start = torch.randn(1, 1, 6, 4, dtype=torch.float64, requires_grad=True)
    loss = (k @ start - v).square().sum() / 2
    (slope,) = torch.autograd.grad(loss, start)
    _, state = delta_rule_step(start.detach(), q, k, v, beta)
    torch.testing.assert_close(state, start.detach() - beta[..., None] * slope)


def test_transition():
    """The eigenvalue is the matrix's; unit keys and beta below 2 never let a state grow, long keys explode."""
    q, k, v, beta, g = draw((1, 1, 1, 200, 6, 6), True)
    values = transition_eigenvalue(k, beta, g)
    eye = torch.eye(6, dtype=torch.float64)
    for t in (0, 7):
        matrix = g[0, 0, t].exp() * (eye - beta[0, 0, t] * torch.outer(k[0, 0, t], k[0, 0, t]))
        found = torch.linalg.eigvalsh(matrix)
        assert (found - values[0, 0, t]).abs().min() < 1e-12
        assert sum((found - g[0, 0, t].exp()).abs() < 1e-12) >= 5
    assert transition_eigenvalue(k, beta).abs().max() < 1
    assert transition_eigenvalue(k, beta).min() < 0  # beta above 1
    start = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    _, kept = delta_rule(q, k, 0 * v, beta, initial_state=start, return_state=True)
    assert torch.linalg.matrix_norm(kept, 2) <= torch.linalg.matrix_norm(start, 2)
    assert transition_eigenvalue(3 * k, beta).abs().max() > 1
    _, grown = delta_rule(q, 3 * k, 0 * v, beta, initial_state=start, return_state=True)
    assert torch.linalg.matrix_norm(grown, 2) > 1e30


def test_a_token_that_forgets_everything():
    """g = -1e4 or -inf among gentle decays: what follows is as exact as if the sequence began there."""
    q, k, v, beta, g = draw((1, 1, 1, 64, 16, 16), True, torch.float32, decay=0.02)
    for reset in (-1e4, -math.inf):
        g[:, :, 30] = reset
        truth = delta_rule(*(x.double() for x in (q, k, v, beta, g)))
        got = delta_rule_chunked(q, k, v, beta, g)
        assert (got - truth).abs().max() <= 1e-5 * truth.abs().max()
        fresh = delta_rule_chunked(*(x[:, :, 30:] for x in (q, k, v, beta, g)))
        torch.testing.assert_close(got[:, :, 30:], fresh, rtol=1e-5, atol=1e-5)
    finite = g.nan_to_num(neginf=-1e4).requires_grad_()
    (grad,) = torch.autograd.grad(delta_rule_chunked(q, k, v, beta, finite).sum(), finite)
    assert grad.isfinite().all()


def test_decay_matrix():
    g = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    want = (
        torch.tensor([[0.0, -math.inf, -math.inf], [-2.0, 0.0, -math.inf], [-2.5, -0.5, 0.0]]).double().exp()
    )
    torch.testing.assert_close(decay_matrix(g), want)


def test_forward_substitution_is_the_inverse():
    lower = torch.randn(3, 20, 20, dtype=torch.float64).tril(-1)
    rhs = torch.randn(3, 20, 5, dtype=torch.float64)
    want = torch.linalg.solve(torch.eye(20, dtype=torch.float64) + lower, rhs)
    torch.testing.assert_close(forward_substitution(lower, rhs), want, rtol=1e-9, atol=1e-9)


def test_wy_transform_is_a_product_of_householders():
    """``I - K^T W`` is the product of the transitions, ``K^T U`` what the chunk writes into an empty state."""
    _, k, v, beta = draw((1, 1, 1, 12, 7, 5), False)
    ones = torch.ones(12, 12, dtype=torch.float64).tril()
    u, w = wy_transform(k, v, beta, ones, ones[-1])
    product = torch.eye(7, dtype=torch.float64)
    for t in range(12):
        product = (torch.eye(7) - beta[0, 0, t] * torch.outer(k[0, 0, t], k[0, 0, t])) @ product
    torch.testing.assert_close(torch.eye(7) - (k.mT @ w)[0, 0], product, rtol=0, atol=1e-12)
    _, state = delta_rule(k, k, v, beta, return_state=True)
    torch.testing.assert_close(k.mT @ u, state, rtol=0, atol=1e-12)


def test_unit_keys():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    torch.testing.assert_close(l2_normalize(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    (grad,) = torch.autograd.grad(l2_normalize(x).sum(), x)
    assert grad.isfinite().all()


@GATES
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_against_fla(form, gated):
    """The naive forms of flash-linear-attention, written by others."""
    pytest.importorskip("fla.ops.delta_rule.naive", reason="fla-core is not installed (extra peers)")
    from fla.ops.delta_rule import naive
    from fla.ops.gated_delta_rule import naive as gated_naive

    inputs = draw((2, 3, 3, 128, 16, 24), gated, torch.float32, decay=0.2)
    start = torch.randn(2, 3, 16, 24)
    if gated:  # [B, N, H, D]; the chunked form takes g before beta
        q, k, v, beta, g = (x.transpose(1, 2) for x in inputs)
        options = dict(initial_state=start, output_final_state=True)
        if form == "recurrent":
            want, state = gated_naive.naive_recurrent_gated_delta_rule(q, k, v, beta, g, **options)
        else:
            want, state = gated_naive.naive_chunk_gated_delta_rule(q, k, v, g, beta, **options)
        want = want.transpose(1, 2)
    elif form == "recurrent":
        want, state = naive.delta_rule_recurrence(*inputs, initial_state=start)
    else:
        start = torch.zeros_like(start)  # this form has no initial state
        want, state = naive.delta_rule_chunkwise(*inputs)
    got = delta_rule_chunked(*inputs, initial_state=start, return_state=True)
    torch.testing.assert_close(got, (want, state), rtol=1e-4, atol=2e-5)


def bad(message, fn=delta_rule_chunked, **change):
    q, k, v, beta, g = draw((1, 4, 2, 8, 16, 12), True, torch.float32)
    with pytest.raises(ValueError, match=message):
        fn(**{"q": q, "k": k, "v": v, "beta": beta, "g": g, **change})


@pytest.mark.parametrize("fn", [delta_rule, delta_rule_chunked])
def test_bad_input_is_named(fn):
    bad("q: expected 4 dimensions", fn, q=torch.randn(4, 8, 16))
    bad("k: expected the head_dim of q", fn, k=torch.randn(1, 2, 8, 15))
    bad("k: expected the length of q", fn, q=torch.randn(1, 4, 7, 16))
    bad("k: expected num_kv_heads to divide", fn, k=torch.randn(1, 3, 8, 16), v=torch.randn(1, 3, 8, 12))
    bad("v: expected the dtype of q", fn, v=torch.randn(1, 2, 8, 12).half())
    bad("beta: expected one number a token and key head", fn, beta=torch.rand(1, 4, 8))
    bad(r"beta: .* got NoneType", fn, beta=None)
    bad("beta: expected a floating dtype, got torch.int64", fn, beta=torch.ones(1, 2, 8, dtype=torch.int64))
    bad("g: expected one number a token and key head", fn, g=torch.rand(1, 2, 8, 16))
    bad("g: expected the device of k", fn, g=torch.rand(1, 2, 8, device="meta"))
    bad("scale: expected a finite number", fn, scale=math.inf)
    bad("initial_state: expected a state of shape", fn, initial_state=torch.zeros(1, 4, 16, 12))
    bad("initial_state: expected float32 or float64", fn, initial_state=torch.zeros(1, 2, 16, 12).half())
    bad("initial_state: .* got tuple", fn, initial_state=(torch.zeros(1, 2, 16, 12),))


def test_bad_input_of_one_form():
    bad("chunk_size: expected an integer", chunk_size=0)
    bad("q: expected one token", lambda **x: delta_rule_step(None, **x))
    one = draw((1, 4, 2, 1, 16, 12), True, torch.float32)
    with pytest.raises(ValueError, match="state: expected a state of shape"):
        delta_rule_step(torch.zeros(1, 2, 12, 16), *one)
