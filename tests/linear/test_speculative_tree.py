"""Token trees: the mask against paths, and every way of judging a tree against the target's own distribution."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from effattn_lab.foundations.attention import attention, visible
from effattn_lab.linear import speculative as spec
from effattn_lab.linear import speculative_proof as proof
from effattn_lab.linear import speculative_tree as tree

LEVEL = 1e-3
N = 20_000
ROUNDS = 4_000  # one at a time: a millisecond each
#   0 ── 1 ── 3 ── 5
#   │    └─── 4
#   └─── 2 ── 6
PARENTS = torch.tensor([-1, 0, 0, 1, 1, 3, 2])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tree(nodes: int, seed: int) -> torch.Tensor:
    g = generator(seed)
    return torch.tensor([-1] + [int(torch.randint(0, n, (), generator=g)) for n in range(1, nodes)])


def test_mask_by_hand():
    want = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 1, 0, 1, 0],
        [1, 0, 1, 0, 0, 0, 1],
    ]
    assert tree.ancestors(PARENTS).int().tolist() == want
    assert tree.depths(PARENTS).tolist() == [0, 1, 1, 2, 2, 3, 2]
    assert tree.path(PARENTS, 5) == [0, 1, 3, 5]
    mask = tree.tree_mask(PARENTS, 3)
    assert mask.shape == (7, 10)
    assert bool(mask[:, :3].all())
    assert mask[:, 3:].int().tolist() == want


@pytest.mark.parametrize("context", [0, 1, 9])
@pytest.mark.parametrize("nodes", [1, 2, 17])
def test_a_chain_is_the_causal_mask(nodes, context):
    chain = torch.arange(nodes) - 1
    assert torch.equal(tree.tree_mask(chain, context), visible(nodes, context + nodes, causal=True))


def test_top_k_tree():
    parents = tree.top_k_tree((3, 2))
    assert parents.tolist() == [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert tree.depths(parents).tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 32), (4, 2, 60)])
@pytest.mark.parametrize("context", [0, 5, 64])
def test_every_row_is_attention_along_its_path(heads, kv_heads, dim, context):
    parents = random_tree(23, 1)
    g = generator(2)
    q = torch.randn(2, heads, 23, dim, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, context + 23, dim, generator=g, dtype=torch.float64) for _ in "kv")
    got = tree.tree_attention(q, k, v, parents)
    for n in range(23):
        nodes = tree.path(parents, n)
        rows = [*range(context), *(context + m for m in nodes)]
        want = attention(q[:, :, nodes], k[:, :, rows], v[:, :, rows], causal=True)[:, :, -1]
        torch.testing.assert_close(got[:, :, n], want, rtol=0, atol=1e-13)
    flat = attention(q, k, v, causal=True)  # nodes as stored: siblings see each other
    assert (flat - got).abs().max() > 0.1


def test_a_node_sees_nothing_but_its_ancestors():
    """Changing any other node leaves its output bit-identical, and has no gradient."""
    g = generator(3)
    q, k, v = (torch.randn(1, 2, 7, 16, generator=g, dtype=torch.float64) for _ in "qkv")
    before = tree.tree_attention(q, k, v, PARENTS)
    seen = tree.ancestors(PARENTS)
    for m in range(7):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, m] += 1
        v2[:, :, m] -= 1
        same = (tree.tree_attention(q, k2, v2, PARENTS) == before).all(dim=-1).all(dim=1)[0]
        assert same.tolist() == (~seen[:, m]).tolist()
    v.requires_grad_()
    for n in range(7):
        (grad,) = torch.autograd.grad(tree.tree_attention(q, k, v, PARENTS)[:, :, n].sum(), v)
        assert (grad.abs().sum(dim=(0, 1, 3)) > 0).tolist() == seen[n].tolist()


# ---- judging -----------------------------------------------------------------------------------------------


def test_greedy_walk_is_sequential_greedy_decoding():
    """A target whose argmax depends on the whole path: the walk gives its greedy continuation, as far as it goes."""

    def target(words):
        return (7 * sum((i + 1) * w for i, w in enumerate(words)) + len(words)) % 3

    lengths = []
    for seed in range(200):
        parents = random_tree(20, seed)
        tokens = torch.randint(0, 3, (20,), generator=generator(1000 + seed))
        words = [[int(tokens[m]) for m in tree.path(parents, n)] for n in range(20)]
        best = torch.tensor([target(w) for w in words])
        nodes, following = tree.verify_tree_greedy(best, tokens, parents)
        made = [int(tokens[n]) for n in nodes[1:]] + [following]
        sequence = [int(tokens[0])]
        for token in made:
            assert token == target(sequence)
            sequence.append(token)
        for child in (n for n in range(20) if parents[n] == nodes[-1]):
            assert tokens[child] != following, "it stops only where no child fits"
        lengths.append(len(made))
    assert max(lengths) >= 4


def test_a_chain_is_judged_like_a_round():
    g = generator(4)
    for _ in range(100):
        p = torch.softmax(torch.randn(4, 5, generator=g, dtype=torch.float64), -1)
        q = torch.softmax(torch.randn(4, 5, generator=g, dtype=torch.float64), -1)
        drafts = spec.sample(q[:3], torch.rand(3, generator=g, dtype=torch.float64))
        u = torch.rand(3, generator=g, dtype=torch.float64)
        final = torch.rand((), generator=g, dtype=torch.float64)
        want, accepted = spec.verify(p[None], q[None, :3], drafts[None], u[None], final[None])
        chain = torch.tensor([-1, 0, 1, 2])
        tokens = torch.cat([torch.tensor([0]), drafts])
        nodes, following = tree.verify_tree_rejection(p, q, tokens, chain, torch.cat([u[:1], u]), final)
        assert len(nodes) == accepted[0] + 1
        assert [int(tokens[n]) for n in nodes[1:]] + [following] == want[0, : accepted[0] + 1].tolist()
        best, guesses = p.argmax(-1), drafts
        greedy, count = spec.verify_greedy(best[None], guesses[None])
        nodes, following = tree.verify_tree_greedy(best, tokens, chain)
        assert (len(nodes) - 1, following) == (int(count[0]), int(greedy[0, count[0]]))


P = torch.tensor([0.45, 0.25, 0.20, 0.10], dtype=torch.float64)
Q = torch.tensor([0.15, 0.45, 0.10, 0.30], dtype=torch.float64)


def without(q, x):
    q = q.clone()
    q[x] = 0
    return q / q.sum()


def exact(p, q, k, drawn_again: bool, judged_again: bool):
    """(distribution of the token that comes out, probability that a candidate is taken), over all candidates."""
    if k == 0:
        return p.clone(), 0.0

    def go(p, judge, draw, k):
        if k == 0:
            return p.clone(), 0.0
        out, taken = torch.zeros_like(p), 0.0
        for x in range(len(p)):
            if draw[x] == 0:
                continue
            a = min(1.0, (p[x] / judge[x]).item())
            out[x] += draw[x] * a
            taken += draw[x].item() * a
            if a < 1:
                rest = spec.residual(p, judge)
                below, more = go(
                    rest,
                    judge if judged_again else without(judge, x),
                    draw if drawn_again else without(draw, x),
                    k - 1,
                )
                out += draw[x] * (1 - a) * below
                taken += draw[x].item() * (1 - a) * more
        return out, taken

    return go(p, q, q, k)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("replacement", [False, True])
def test_recursive_rejection_is_exact(k, replacement):
    """By enumeration of all candidates, independent of the code; then the code by 20,000 draws."""
    out, taken = exact(P, Q, k, replacement, replacement)
    torch.testing.assert_close(out, P, rtol=0, atol=1e-14)
    u = torch.rand(N, 2 * k + 1, generator=generator(10 + k), dtype=torch.float64)
    p, q = P.expand(N, -1), Q.expand(N, -1)
    candidates = tree.draw_candidates(q, u[:, :k], replacement=replacement)
    tokens, which = tree.verify_candidates(
        p, q, candidates, u[:, k : 2 * k], u[:, -1], replacement=replacement
    )
    counts, hits = torch.bincount(tokens, minlength=4), int((which < k).sum())
    assert proof.chi_square(counts, P).p_value > LEVEL
    assert abs(hits / N - taken) < 4 * (taken * (1 - taken) / N) ** 0.5


def test_more_candidates_are_taken_more_often_and_best_without_replacement():
    rates = {r: [exact(P, Q, k, r, r)[1] for k in range(4)] for r in (False, True)}
    for r in (False, True):
        assert rates[r] == sorted(rates[r])
    assert all(a > b + 0.03 for a, b in zip(rates[False][2:], rates[True][2:]))
    assert rates[False][1] == pytest.approx(spec.overlap(P, Q).item())


def test_judging_with_the_wrong_q_is_rejected():
    """Drawn without replacement but judged as if with: not exact, and 20,000 draws show it."""
    wrong, _ = exact(P, Q, 3, drawn_again=False, judged_again=True)
    assert (wrong - P).abs().max() > 0.005
    assert proof.power(P, wrong, N, LEVEL) > 0.999
    u = torch.rand(N, 7, generator=generator(14), dtype=torch.float64)
    p, q = P.expand(N, -1), Q.expand(N, -1)
    candidates = tree.draw_candidates(q, u[:, :3])
    tokens, _ = tree.verify_candidates(p, q, candidates, u[:, 3:6], u[:, 6], replacement=True)
    counts = torch.bincount(tokens, minlength=4)
    assert proof.chi_square(counts, P).p_value < LEVEL


def test_candidates_end_where_q_ends():
    q = torch.tensor([[0.7, 0.0, 0.3, 0.0]], dtype=torch.float64)
    got = tree.draw_candidates(q, torch.tensor([[0.8, 0.5, 0.5]], dtype=torch.float64))
    assert got.tolist() == [[2, 0, spec.NO_TOKEN]]
    u = torch.full((1, 3), 0.99, dtype=torch.float64)
    p = torch.tensor([[0, 0.5, 0, 0.5]], dtype=torch.float64)
    token, which = tree.verify_candidates(p, q, got, u, torch.tensor([0.6], dtype=torch.float64))
    assert (token.item(), which.item()) == (3, 3)


STEPS = torch.softmax(torch.randn(3, 3, generator=generator(30), dtype=torch.float64), -1)
CHEAP = torch.softmax(torch.randn(3, 3, generator=generator(31), dtype=torch.float64), -1)


def two_tokens(judge, seed: int) -> tuple[torch.Tensor, Counter]:
    """Counts [9] of the two tokens after a 0 of a Markov target; the target adds the second where one comes out."""
    g = generator(seed)
    counts, lengths = torch.zeros(9), Counter()
    for _ in range(ROUNDS):
        made = judge(g)
        lengths[len(made)] += 1
        while len(made) < 2:
            made.append(int(spec.sample(STEPS[made[-1]], torch.rand((), generator=g, dtype=torch.float64))))
        counts[3 * made[0] + made[1]] += 1
    return counts, lengths


JOINT = (STEPS[0][:, None] * STEPS).flatten()


def test_a_sampled_tree_gives_the_targets_joint_distribution():
    """Two children, each with two; drawn without replacement, judged by recursive rejection."""
    parents = tree.top_k_tree((2, 2))

    def judge(g):
        u = torch.rand(16, generator=g, dtype=torch.float64)
        first = tree.draw_candidates(CHEAP[:1], u[None, :2])[0]
        second = tree.draw_candidates(CHEAP[first], u[2:6].view(2, 2))
        tokens = torch.cat([torch.tensor([0]), first, second.flatten()])
        nodes, following = tree.verify_tree_rejection(
            STEPS[tokens], CHEAP[tokens], tokens, parents, u[6:13], u[13]
        )
        return [int(tokens[n]) for n in nodes[1:]] + [following]

    counts, lengths = two_tokens(judge, 32)
    assert proof.chi_square(counts, JOINT).p_value > LEVEL
    assert set(lengths) == {1, 2, 3}


def test_a_fixed_tree_gives_the_targets_joint_distribution():
    """Guesses that aren't random: each is accepted with its probability under the target."""
    parents, tokens = torch.tensor([-1, 0, 0, 1]), torch.tensor([0, 2, 1, 1])

    def judge(g):
        nodes, following = tree.verify_tree(
            STEPS[tokens], tokens, parents, torch.rand(4, generator=g, dtype=torch.float64)
        )
        return [int(tokens[n]) for n in nodes[1:]] + [following]

    counts, lengths = two_tokens(judge, 33)
    assert proof.chi_square(counts, JOINT).p_value > LEVEL
    accepted = 1 - lengths[1] / ROUNDS
    want = (STEPS[0, 2] + STEPS[0, 1]).item()
    assert abs(accepted - want) < 4 * (want * (1 - want) / ROUNDS) ** 0.5


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tree.tree_mask(torch.tensor([0, 0])), "parents: expected -1, then for each node an earlier one"),
        (lambda: tree.tree_mask(torch.tensor([-1, 1])), "parents: expected -1"),
        (lambda: tree.tree_mask(torch.tensor([-1.0])), "parents: expected int64"),
        (lambda: tree.tree_mask(torch.tensor([], dtype=torch.int64)), "parents: expected -1"),
        (lambda: tree.tree_mask(PARENTS, -1), "context: expected an integer of at least 0, got -1"),
        (lambda: tree.verify_tree_greedy(PARENTS[:3], PARENTS, PARENTS), r"best: expected int64 \(7,\)"),
        (lambda: tree.verify_tree(P[None], PARENTS.abs(), PARENTS, torch.zeros(7)), r"p: expected \[T, V\] with T ="),
        (lambda: tree.top_k_tree((2, 0)), "branching: expected an integer of at least 1"),
        (lambda: tree.verify_candidates(
            P[None], without(Q, 1)[None], torch.tensor([[1]]), torch.zeros(1, 1), torch.zeros(1)),
         "candidates: expected tokens that q can draw, got one at place 0"),
        (lambda: tree.tree_attention(*(torch.zeros(1, 1, 3, 4),) * 3, PARENTS), "parents: expected one for each"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_every_short_tree_of_candidates_is_a_tree():
    """All parent lists of up to five nodes: depth grows by one along each edge, the mask holds each ancestor once."""
    for nodes in range(1, 6):
        for above in itertools.product(*(range(n) for n in range(1, nodes))):
            parents = torch.tensor([-1, *above])
            depth = tree.depths(parents)
            for n in range(1, nodes):
                assert depth[n] == depth[parents[n]] + 1
                assert set(tree.path(parents, n)) == {n, *tree.path(parents, int(parents[n]))}
