"""Speculative sampling: the rule against its formulas, the cost model, and the proof that the target is sampled.

The statistical tests run with fixed seeds, so they give the same verdict every time; that the verdict is the likely
one is argued with the power of each test (`test_power_*`), not with luck.
"""

from __future__ import annotations

import itertools
import math

import pytest
import sympy as sp
import torch

from effattn_lab.foundations import serving
from effattn_lab.foundations.presets import MODELS
from effattn_lab.linear import speculative as spec
from effattn_lab.linear import speculative_cost as cost
from effattn_lab.linear import speculative_proof as proof
from effattn_lab.measure.roofline import GPUS

LEVEL = 1e-3
P = torch.tensor([0.40, 0.25, 0.15, 0.12, 0.05, 0.03], dtype=torch.float64)
Q = torch.tensor([0.20, 0.40, 0.10, 0.05, 0.15, 0.10], dtype=torch.float64)
N = 40_000
SEQUENCES = 20_000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributions(seed: int, *shape: int, dtype=torch.float64, size: float = 1.5) -> torch.Tensor:
    return torch.softmax(torch.randn(*shape, generator=generator(seed), dtype=dtype) * size, dim=-1)


# ---- one position ------------------------------------------------------------------------------------------


def test_sample_inverts_the_cumulative_sums():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.999999], dtype=torch.float64)
    got = spec.sample(probs.expand(7, -1), u)
    assert got.tolist() == [1, 1, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sample_never_draws_what_cannot_happen(dtype):
    """Rounded sums may end below u: the last token with any probability is taken, not one beyond it."""
    probs = torch.zeros(3, 1000, dtype=dtype)
    probs[0, :999] = 1 / 999
    probs[1, 500] = 1
    probs[2, [0, 998]] = 0.5
    top = 1 - torch.finfo(dtype).eps
    got = spec.sample(probs, torch.full((3,), top, dtype=dtype))
    assert got.tolist()[1:] == [500, 998]
    assert got[0] <= 998
    assert spec.sample(probs, torch.zeros(3, dtype=dtype)).tolist() == [0, 500, 0]


def test_sample_follows_the_distribution():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # an even grid: frequencies to 1e-5
    counts = torch.bincount(spec.sample(P.expand(100_000, -1), u), minlength=6)
    torch.testing.assert_close(counts.double() / 100_000, P, rtol=0, atol=1e-5)


def test_acceptance_residual_overlap_by_hand():
    token = torch.arange(6)
    want = torch.tensor([1, 0.625, 1, 1, 1 / 3, 0.3], dtype=torch.float64)
    torch.testing.assert_close(spec.acceptance(P.expand(6, -1), Q.expand(6, -1), token), want)
    torch.testing.assert_close(
        spec.residual(P, Q), torch.tensor([0.2, 0, 0.05, 0.07, 0, 0], dtype=torch.float64) / 0.32
    )
    assert spec.overlap(P, Q).item() == pytest.approx(0.68)
    assert spec.overlap(P, Q).item() == pytest.approx(1 - 0.5 * (P - Q).abs().sum().item())


def test_the_emitted_distribution_is_the_target():
    p, q = distributions(0, 200, 50, size=3.0), distributions(1, 200, 50, size=3.0)
    torch.testing.assert_close(spec.emitted(p, q), p, rtol=0, atol=1e-15)
    torch.testing.assert_close(spec.emitted(p, p), p, rtol=0, atol=1e-15)
    far = torch.zeros(2, 4, dtype=torch.float64)
    far[0, :2], far[1, 2:] = 0.5, 0.5  # nothing in common: always rejected, residual = p
    torch.testing.assert_close(spec.emitted(far[0], far[1]), far[0])
    assert spec.overlap(far[0], far[1]) == 0


def test_equal_distributions_reject_nothing_and_leave_no_nan():
    assert torch.equal(spec.residual(P, P), P)
    token = torch.arange(6)
    assert torch.equal(spec.acceptance(P.expand(6, -1), P.expand(6, -1), token), torch.ones(6).double())


def test_a_guess_that_is_not_random():
    """One-hot q: accepted with p(x), residual is p without x."""
    q = spec.one_hot(torch.tensor(1), 6, torch.float64)
    assert spec.overlap(P, q).item() == pytest.approx(0.25)
    rest = P.clone()
    rest[1] = 0
    torch.testing.assert_close(spec.residual(P, q), rest / 0.75)


# ---- a round -----------------------------------------------------------------------------------------------


def by_hand(p, q, drafts, u_accept, u_final):
    """One sequence, written from the paper's algorithm with Python numbers."""
    out = []
    for i, x in enumerate(drafts):
        if u_accept[i] < min(1.0, p[i][x] / q[i][x]):
            out.append(x)
            continue
        rest = [max(0.0, a - b) for a, b in zip(p[i], q[i])]
        return [*out, draw([r / sum(rest) for r in rest], u_final)]
    return [*out, draw(p[len(drafts)], u_final)]


def draw(probs, u):
    total = 0.0
    for x, weight in enumerate(probs):
        total += weight
        if u < total:
            return x
    return max(x for x, weight in enumerate(probs) if weight > 0)


@pytest.mark.parametrize(("gamma", "vocab"), [(0, 5), (1, 2), (3, 7), (8, 100)])
def test_verify_is_the_papers_algorithm(gamma, vocab):
    batch = 400
    p, q = distributions(2, batch, gamma + 1, vocab), distributions(3, batch, gamma, vocab)
    g = generator(4)
    drafts = spec.sample(q, torch.rand(batch, gamma, generator=g, dtype=torch.float64))
    u_accept = torch.rand(batch, gamma, generator=g, dtype=torch.float64)
    u_final = torch.rand(batch, generator=g, dtype=torch.float64)
    tokens, accepted = spec.verify(p, q, drafts, u_accept, u_final)
    for b in range(batch):
        want = by_hand(*(x[b].tolist() for x in (p, q, drafts, u_accept, u_final)))
        assert tokens[b, : accepted[b] + 1].tolist() == want
        assert tokens[b, accepted[b] + 1 :].tolist() == [spec.NO_TOKEN] * (gamma - int(accepted[b]))
    if gamma == 3:
        assert set(accepted.tolist()) >= {0, 1, gamma}, "every branch was taken"


def test_verify_in_lower_precision_decides_alike():
    """float32 against float64: decisions differ only where u lies within rounding of its threshold."""
    p, q = distributions(5, 2000, 4, 50), distributions(6, 2000, 3, 50)
    u = [torch.rand(s, generator=generator(7), dtype=torch.float64).float() for s in ((2000, 3), (2000,))]
    drafts = spec.sample(q, torch.rand(2000, 3, generator=generator(8), dtype=torch.float64))
    wide = spec.verify(p, q, drafts, *(x.double() for x in u))[0]
    narrow = spec.verify(p.float(), q.float(), drafts, *u)[0]
    assert (wide != narrow).any(dim=1).sum() <= 2


def test_greedy_is_the_limit_of_low_temperature():
    best = torch.tensor([[3, 1, 2], [3, 1, 2], [0, 0, 0], [5, 4, 3]])
    drafts = torch.tensor([[3, 1], [3, 2], [1, 0], [4, 4]])
    tokens, accepted = spec.verify_greedy(best, drafts)
    assert accepted.tolist() == [2, 1, 0, 0]
    assert tokens.tolist() == [[3, 1, 2], [3, 1, -1], [0, -1, -1], [5, -1, -1]]
    # one-hot target and draft: sampling does the same whatever the random numbers are
    p, q = spec.one_hot(best, 6), spec.one_hot(drafts, 6)
    for u in (0.0, 0.37, 0.999):
        again = spec.verify(p, q, drafts, torch.full((4, 2), u), torch.full((4,), u))
        assert torch.equal(again[0], tokens)
        assert torch.equal(again[1], accepted)


# ---- the output distribution -------------------------------------------------------------------------------


def counts_of(tokens: torch.Tensor, cells: int) -> torch.Tensor:
    return torch.bincount(tokens, minlength=cells)


def test_output_has_the_targets_distribution():
    tokens = proof.draw_rounds(P, Q, N, generator(11))
    assert proof.chi_square(counts_of(tokens, 6), P).p_value > LEVEL


@pytest.mark.parametrize("rule", proof.WRONG_RULES)
def test_wrong_rules_are_rejected_with_certainty(rule):
    """Each wrong rule's own distribution, sampled as often, fails; and would fail for nearly every seed."""
    wrong = proof.WRONG_RULES[rule](P, Q)
    assert wrong.sum().item() == pytest.approx(1)
    assert proof.power(P, wrong, N, LEVEL) > 1 - 1e-9
    u = torch.rand(N, generator=generator(12), dtype=torch.float64)
    tokens = spec.sample(wrong.expand(N, -1), u)
    assert proof.chi_square(counts_of(tokens, 6), P).p_value < LEVEL


def wrong_verify(fault: str, p, q, drafts, u_accept, u_final):
    """The batched rule with one fault, for simulation (gamma = 1)."""
    p_x, q_x = p[:, 0].gather(1, drafts)[:, 0], q[:, 0].gather(1, drafts)[:, 0]
    ratio = q_x / p_x if fault == "accept with q/p" else p_x / q_x
    accept = u_accept[:, 0] < ratio
    last = p[:, 0] if fault == "resample from p" else spec.residual(p[:, 0], q[:, 0])
    if fault == "u used twice":
        u_final = u_accept[:, 0]
    return torch.where(accept, drafts[:, 0], spec.sample(last, u_final))


@pytest.mark.parametrize("fault", ["", "resample from p", "accept with q/p", "u used twice"])
def test_the_simulated_faults(fault):
    """The closed forms in WRONG_RULES are what the faulty code really emits; and u used twice is caught too."""
    g = generator(13)
    u = torch.rand(N, 3, generator=g, dtype=torch.float64)
    drafts = spec.sample(Q.expand(N, -1), u[:, 0])[:, None]
    both, q = P.expand(N, 2, -1), Q.expand(N, 1, -1)
    counts = counts_of(wrong_verify(fault, both, q, drafts, u[:, 1:2], u[:, 2]), 6)
    assert (proof.chi_square(counts, P).p_value > LEVEL) == (fault == "")
    if fault in proof.WRONG_RULES:
        assert proof.chi_square(counts, proof.WRONG_RULES[fault](P, Q)).p_value > LEVEL


def run_chain(start, steps, draft_steps, length, gamma, n, g, verify=spec.verify):
    """n sequences of ``length`` tokens from a Markov target, speculated with a Markov draft. Returns [n, length]."""
    vocab = len(start)
    rows = torch.full((n, length + gamma + 1), 0)
    made = torch.zeros(n, dtype=torch.int64)
    table = torch.cat([steps, start[None]])  # row `vocab`: no token yet
    cheap = torch.cat([draft_steps, draft_steps.mean(0, keepdim=True)])
    while int(made.min()) < length:
        last = torch.where(
            made > 0, rows.gather(1, (made - 1).clamp(min=0)[:, None])[:, 0], torch.tensor(vocab)
        )
        drafts, q, p = [], [], [table[last]]
        for _ in range(gamma):
            q.append(cheap[last])
            last = spec.sample(q[-1], torch.rand(n, generator=g, dtype=torch.float64))
            drafts.append(last)
            p.append(table[last])
        out, accepted = verify(
            torch.stack(p, 1),
            torch.stack(q, 1),
            torch.stack(drafts, 1),
            torch.rand(n, gamma, generator=g, dtype=torch.float64),
            torch.rand(n, generator=g, dtype=torch.float64),
        )
        active = made < length
        for i in range(gamma + 1):
            write = active & (i <= accepted)
            place = (made + i).clamp(max=length + gamma)
            rows[write, place[write]] = out[write, i]
        made = torch.where(active, made + accepted + 1, made)
    return rows[:, :length]


def chain(vocab=4, length=3):
    start, steps = distributions(20, vocab, size=0.7), distributions(21, vocab, vocab, size=0.7)
    draft = distributions(22, vocab, vocab, size=0.7)
    words = list(itertools.product(range(vocab), repeat=length))
    joint = torch.stack(
        [start[w[0]] * math.prod(steps[a, b].item() for a, b in itertools.pairwise(w)) for w in words]
    )
    return start, steps, draft, joint


def joint_counts(rows: torch.Tensor, vocab: int = 4) -> torch.Tensor:
    index = sum(rows[:, i] * vocab ** (rows.shape[1] - 1 - i) for i in range(rows.shape[1]))
    return torch.bincount(index, minlength=vocab ** rows.shape[1])


def stays_at_the_bonus(p, q, drafts, u_accept, u_final):
    """Wrong: when all drafts were accepted, the bonus is drawn from the last p but one."""
    gamma = drafts.shape[1]
    p = torch.cat([p[:, :gamma], p[:, gamma - 1 :][:, :1]], dim=1)
    return spec.verify(p, q, drafts, u_accept, u_final)


def goes_on_after_a_rejection(p, q, drafts, u_accept, u_final):
    """Wrong: a later draft is kept although one before it was replaced."""
    tokens, accepted = spec.verify(p, q, drafts, u_accept, u_final)
    first = accepted == 0
    tokens[first, 1] = drafts[first, 1]
    return tokens, torch.where(first, 1, accepted)


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_whole_sequences_have_the_targets_joint_distribution(gamma):
    """64 cells: three tokens of a Markov chain over four symbols, over the borders of rounds."""
    start, steps, draft, joint = chain()
    rows = run_chain(start, steps, draft, 3, gamma, SEQUENCES, generator(23))
    assert proof.chi_square(joint_counts(rows), joint).p_value > LEVEL


@pytest.mark.parametrize("fault", [stays_at_the_bonus, goes_on_after_a_rejection])
def test_faults_between_positions_are_rejected(fault):
    """The first token alone would not show them."""
    start, steps, draft, joint = chain()
    rows = run_chain(start, steps, draft, 3, 2, SEQUENCES, generator(23), fault)
    assert proof.chi_square(counts_of(rows[:, 0], 4), start).p_value > LEVEL
    assert proof.chi_square(joint_counts(rows), joint).p_value < LEVEL


def test_a_round_without_its_bonus_is_exact_but_shorter():
    """Dropping the bonus token doesn't change the distribution; it costs alpha^gamma tokens a round."""
    start, steps, draft, joint = chain()

    def no_bonus(p, q, drafts, u_accept, u_final):
        tokens, accepted = spec.verify(p, q, drafts, u_accept, u_final)
        gamma = drafts.shape[1]
        return tokens, accepted - (accepted == gamma).long()  # yields `accepted` tokens where all were taken

    rows = run_chain(start, steps, draft, 3, 2, SEQUENCES, generator(24), no_bonus)
    assert proof.chi_square(joint_counts(rows), joint).p_value > LEVEL


def test_rounds_are_as_long_as_the_formula_says():
    """Fixed p and q: every draft is accepted with beta, independently; mean length to 4 standard errors."""
    beta = spec.overlap(P, Q).item()
    for gamma in (1, 3, 6):
        g = generator(30 + gamma)
        p, q = P.expand(N, gamma + 1, -1), Q.expand(N, gamma, -1)
        drafts = spec.sample(q, torch.rand(N, gamma, generator=g, dtype=torch.float64))
        u = [torch.rand(s, generator=g, dtype=torch.float64) for s in ((N, gamma), (N,))]
        made = spec.verify(p, q, drafts, *u)[1].double() + 1
        want = cost.expected_tokens(beta, gamma)
        assert abs(made.mean().item() - want) < 4 * made.std().item() / N**0.5
        assert abs(made.mean().item() - want) < 0.05  # and without the bonus it would be off by beta^gamma
    assert beta**6 > 0.05


# ---- the test of the tests ---------------------------------------------------------------------------------


def test_chi_square_against_tables():
    """Critical values of the chi-square law, from printed tables."""
    for dof, level, want in ((1, 0.05, 3.841), (5, 0.001, 20.515), (10, 0.05, 18.307), (63, 0.01, 92.010)):
        assert proof.critical_value(dof, level) == pytest.approx(want, abs=2e-3)
    result = proof.chi_square(torch.tensor([18, 22, 39, 21]), torch.tensor([0.25, 0.25, 0.25, 0.25]))
    assert (result.statistic, result.dof) == (pytest.approx(10.8), 3)
    assert result.p_value == pytest.approx(0.01286, abs=1e-4)


def test_chi_square_keeps_its_level():
    """Of 2000 honest samples about 5 % fall below a p-value of 0.05."""
    u = torch.rand(2000, 500, generator=generator(40), dtype=torch.float64)
    low = sum(
        proof.chi_square(counts_of(spec.sample(P.expand(500, -1), row), 6), P).p_value < 0.05 for row in u
    )
    assert 60 <= low <= 140  # 100 expected, standard deviation 9.7


def test_power_is_what_simulation_finds():
    wrong = 0.9 * P + 0.1 * Q
    predicted = proof.power(P, wrong, 400, 0.05)
    u = torch.rand(2000, 400, generator=generator(41), dtype=torch.float64)
    found = sum(
        proof.chi_square(counts_of(spec.sample(wrong.expand(400, -1), row), 6), P).p_value < 0.05 for row in u
    )
    assert 0.1 < predicted < 0.9
    assert found / 2000 == pytest.approx(predicted, abs=0.05)
    assert proof.power(P, P, 400, 0.05) == pytest.approx(0.05, abs=1e-6)


def test_impossible_tokens_and_thin_cells():
    p = torch.tensor([0.5, 0.5, 0.0])
    assert proof.chi_square(torch.tensor([50, 49, 1]), p).p_value == 0
    with pytest.raises(ValueError, match="counts: expected two cells or more, each of 5"):
        proof.chi_square(torch.tensor([5, 3]), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="wrong: expected no mass where probs is 0"):
        proof.power(p, torch.tensor([0.4, 0.4, 0.2]), 100)


# ---- cost --------------------------------------------------------------------------------------------------


def test_expected_tokens_is_the_geometric_sum():
    alpha = sp.symbols("alpha", positive=True)
    for gamma in range(7):
        closed = (1 - alpha ** (gamma + 1)) / (1 - alpha)
        assert sp.simplify(cost.expected_tokens(alpha, gamma) - closed) == 0
    assert cost.expected_tokens(1.0, 5) == 6
    assert cost.expected_tokens(0, 5) == 1
    assert cost.expected_tokens(0.8, 4) == pytest.approx(serving.speculative_tokens(0.8, 4))
    assert cost.expected_tokens_by_depth([0.7] * 4) == pytest.approx(cost.expected_tokens(0.7, 4))
    assert cost.expected_tokens_by_depth([0.9, 0.5, 0.1]) == pytest.approx(1 + 0.9 + 0.45 + 0.045)


def test_expected_tokens_by_enumeration():
    """All 2^gamma patterns of accept and reject, weighted."""
    for alpha, gamma in ((0.3, 3), (0.85, 5)):
        mean = 0.0
        for pattern in itertools.product((0, 1), repeat=gamma):
            run = next((i for i, x in enumerate(pattern) if not x), gamma)
            mean += (run + 1) * math.prod(alpha if x else 1 - alpha for x in pattern)
        assert cost.expected_tokens(alpha, gamma) == pytest.approx(mean)


def test_uneven_acceptance_makes_longer_rounds_than_its_mean():
    """If the rate varies from round to round, E[tokens] is at least that of the mean rate (Jensen): x^i is convex."""
    easy, hard = 0.95, 0.45
    mixed = (cost.expected_tokens(easy, 6) + cost.expected_tokens(hard, 6)) / 2
    assert mixed > cost.expected_tokens((easy + hard) / 2, 6) + 0.5


def test_which_rate_goes_into_the_formula():
    """Uneven rounds: the rate of the first drafts gives too few tokens, that of all judged drafts too many.

    A long easy round has more drafts judged, so pooling counts easy rounds more often; by depth it is exact.
    """
    kinds, gamma = (0.95, 0.45), 6
    actual = sum(cost.expected_tokens(a, gamma) for a in kinds) / 2
    first = sum(kinds) / 2
    judged = sum(cost.expected_tokens(a, gamma - 1) for a in kinds) / 2  # drafts judged in a round
    pooled = (actual - 1) / judged
    assert cost.expected_tokens(first, gamma) + 0.5 < actual < cost.expected_tokens(pooled, gamma) - 0.2
    reached = [sum(a**i for a in kinds) / 2 for i in range(gamma + 1)]
    by_depth = [b / a for a, b in itertools.pairwise(reached)]
    assert by_depth == sorted(by_depth), "who got far is probably in an easy round"
    assert cost.expected_tokens_by_depth(by_depth) == pytest.approx(actual)


@pytest.mark.parametrize("c", [0.0, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.6, 0.8, 0.95])
def test_optimal_gamma(alpha, c):
    best = cost.optimal_gamma(alpha, c, 40)
    gains = [cost.speedup(alpha, gamma, c) for gamma in range(41)]
    assert gains[best] == max(gains)
    assert (best > 0) == (alpha > c), "corollary 3.9"
    if alpha > c:
        assert gains[best] >= (1 + alpha) / (1 + c) - 1e-12
    if c > 0 and 0 < best < 40:  # the marginal rule: one more draft pays while alpha^(gamma+1) > c * speedup
        assert alpha ** (best + 1) <= c * gains[best]
        assert alpha**best > c * gains[best - 1]


def test_operations_never_fall():
    for alpha, gamma, c in itertools.product((0.0, 0.5, 0.9, 1.0), (1, 4, 8), (0.0, 0.1)):
        assert cost.operations_factor(alpha, gamma, c) >= 1


def test_verification_is_free_only_while_memory_is_the_limit():
    model, gpu = MODELS["Llama-3-8B"], GPUS["H100"]
    assert cost.verify_ratio(model, gpu, 0, batch=1, context=1024) == 1
    assert cost.verify_ratio(model, gpu, 4, batch=1, context=1024) == 1
    crowded = cost.verify_ratio(model, gpu, 4, batch=256, context=1024)
    assert crowded > 1.5
    assert cost.speedup(0.7, 4, 0.05, crowded) < cost.speedup(0.7, 4, 0.05)


# ---- bad input ---------------------------------------------------------------------------------------------


def round_inputs():
    p, q = distributions(50, 2, 4, 5), distributions(51, 2, 3, 5)
    drafts = torch.zeros(2, 3, dtype=torch.int64)
    return {"p": p, "q": q, "drafts": drafts, "u_accept": torch.zeros(2, 3), "u_final": torch.zeros(2)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"p": torch.ones(2, 4, 5)}, "p: expected rows >= 0 that add up to 1"),
        ({"p": torch.full((2, 4, 5), float("nan"))}, "p: expected rows >= 0"),
        ({"q": distributions(0, 2, 4, 5)}, "q: expected .B, gamma, V. to p .* got .2, 4, 5."),
        ({"q": distributions(0, 2, 3, 5).float()}, "q: expected the dtype of p"),
        ({"drafts": torch.full((2, 3), 5)}, "drafts: expected tokens from 0 to 4, got 5 to 5"),
        ({"drafts": torch.zeros(2, 3)}, "drafts: expected int64"),
        ({"q": spec.one_hot(torch.ones(2, 3).long(), 5, torch.float64)}, "drafts: .* got one with q = 0"),
        ({"u_accept": torch.ones(2, 3)}, r"u_accept: expected numbers in \[0, 1\)"),
        ({"u_final": torch.zeros(3)}, r"u_final: expected floating-point numbers of shape \(2,\)"),
    ],
)
def test_bad_input_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        spec.verify(**{**round_inputs(), **change})


def test_bad_input_elsewhere():
    with pytest.raises(ValueError, match="q: expected shape and dtype of p"):
        spec.residual(P, Q[:5] / Q[:5].sum())
    with pytest.raises(ValueError, match="probs: expected floating-point"):
        spec.sample(torch.tensor([1, 0]), torch.tensor(0.5))
    with pytest.raises(ValueError, match="best: expected"):
        spec.verify_greedy(torch.zeros(2, 3).long(), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="drafts: expected int64"):
        spec.verify_greedy(torch.zeros(2, 4).long(), torch.zeros(2, 3))
    for call in (
        lambda: cost.expected_tokens(1.1, 2),
        lambda: cost.expected_tokens(0.5, -1),
        lambda: cost.speedup(0.5, 2, -0.1),
        lambda: cost.speedup(0.5, 2, 0.1, 0),
        lambda: cost.expected_tokens_by_depth([0.5, 2]),
        lambda: cost.optimal_gamma(0.5, 0.1, 0),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
