"""Codes against brute force over all pairs, the transform against its matrix, the selection against sorting."""

from __future__ import annotations

import itertools

import pytest
import torch

from effattn_lab.foundations.attention import attention
from effattn_lab.sparse import codes
from effattn_lab.sparse.adamas import AdamasCache, encode, select_nearest


def matrix(dim):
    """Sylvester's, entries 1 and -1, by its definition."""
    h, two = (
        torch.ones(1, 1, dtype=torch.float64),
        torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64),
    )
    while len(h) < dim:
        h = torch.kron(two, h)
    return h


def draw(n, seed=0, heads=4, kv_heads=2, dim=64, dtype=torch.float64, size=1.0):
    g = torch.Generator().manual_seed(seed)
    q = size * torch.randn(2, heads, 1, dim, generator=g, dtype=dtype)
    k, v = (torch.randn(2, kv_heads, n, dim, generator=g, dtype=dtype) for _ in range(2))
    return q, size * k, v


@pytest.mark.parametrize("dim", [1, 2, 16, 64, 128])
def test_transform_is_the_orthonormal_matrix(dim):
    x, y = torch.randn(2, 3, 5, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    h = matrix(dim) / dim**0.5
    torch.testing.assert_close(codes.hadamard(x), x @ h, rtol=0, atol=1e-12)
    torch.testing.assert_close(codes.hadamard(codes.hadamard(x)), x, rtol=0, atol=1e-12)
    products = (codes.hadamard(x) * codes.hadamard(y)).sum(-1)
    torch.testing.assert_close(products, (x * y).sum(-1), rtol=0, atol=1e-12)
    if dim > 2:
        moved = (codes.hadamard(x).abs().sum(-1) - x.abs().sum(-1)).abs()
        assert moved.median() > 0.1, "L1 is not kept"  # of single vectors it may be, by chance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_transform_in_other_precisions(dtype):
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = codes.hadamard(x)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), codes.hadamard(x.double()), rtol=0, atol=4 * torch.finfo(dtype).eps
    )


def test_buckets():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([-inf, -10.5, -10.0, -9.9, 0.0, 1e-30, 10.0, 10.1, inf, nan])
    assert codes.bucketize(x).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 0]
    many = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    assert (codes.bucketize(many).long().diff() >= 0).all()
    edges = torch.tensor(codes.THRESHOLDS, dtype=torch.float64)
    assert torch.equal(codes.bucketize(many).long(), torch.bucketize(many, edges)), "PyTorch's convention"


def test_packing():
    g = torch.Generator().manual_seed(0)
    c = torch.randint(0, 4, (3, 5, 128), generator=g, dtype=torch.uint8)
    words = codes.pack(c)
    assert (words.shape, words.dtype) == ((3, 5, 8), torch.int32)
    assert torch.equal(codes.unpack(words), c)
    # The released layout: coordinate 8 w + i in bits 2 i of the w-th 16-bit word.
    half = words[0, 0].numpy().view("<u2")
    for w, i in itertools.product(range(16), range(8)):
        assert half[w] >> (2 * i) & 3 == c[0, 0, 8 * w + i]
    full = torch.full((16,), 3, dtype=torch.uint8)
    assert codes.pack(full).item() == -1, "the top code sets the sign"


def test_l1_over_all_pairs_at_every_place():
    for i in range(16):
        for a, b in itertools.product(range(4), range(4)):
            x, y = torch.zeros(2, 16, dtype=torch.uint8)
            x[i], y[i] = a, b
            px, py = codes.pack(x), codes.pack(y)
            assert codes.l1_packed(px, py) == abs(a - b) == codes.l1_naive(x, y)
            assert codes.released_distance(px, py) == (3 if {a, b} == {1, 2} else abs(a - b))
            assert codes.hamming_distance(px, py) == bin(a ^ b).count("1")


def test_l1_of_random_codes():
    g = torch.Generator().manual_seed(1)
    a = torch.randint(0, 4, (4, 1, 128), generator=g, dtype=torch.uint8)
    b = torch.randint(0, 4, (4, 500, 128), generator=g, dtype=torch.uint8)
    want = codes.l1_naive(a, b)
    got = codes.l1_packed(codes.pack(a), codes.pack(b))
    assert torch.equal(got, want)
    assert torch.equal(codes.l1_packed(codes.pack(b), codes.pack(a)), want), "symmetric"
    assert codes.l1_packed(codes.pack(a), codes.pack(a)).max() == 0
    ends = torch.zeros(128, dtype=torch.uint8)
    assert codes.l1_packed(codes.pack(ends), codes.pack(ends + 3)) == 3 * 128
    central = codes.pack(a % 2 + 1), codes.pack(b % 2 + 1)
    assert torch.equal(codes.released_distance(*central), 3 * codes.l1_packed(*central)), (
        "a constant: same ranking"
    )


@pytest.mark.parametrize("count", [1, 2, 7, 30, 50])
def test_selection_with_ties(count):
    g = torch.Generator().manual_seed(2)
    d = torch.randint(0, 4, (2, 3, 30), generator=g, dtype=torch.int32)
    got = select_nearest(d, count)
    for b, h in itertools.product(range(2), range(3)):
        row = d[b, h].tolist()
        want = sorted(range(29), key=lambda j: (row[j], -j))[: min(count, 30) - 1]
        assert got[b, h].tolist() == sorted([*want, 29])


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65])
@pytest.mark.parametrize(
    "options", [{}, {"transform": False}, {"estimator": "released"}, {"share": True}], ids=str
)
def test_a_budget_for_all_is_full_attention(n, options):
    q, k, v = draw(n, n)
    cache = AdamasCache(**options)
    cache.append(k, v)
    for budget in (n, 10_000, None):
        torch.testing.assert_close(cache.attend(q, budget), attention(q, k, v), rtol=0, atol=1e-13)
    torch.testing.assert_close(cache.attend(q, 1), v[:, :, -1:].repeat_interleave(2, dim=1), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"transform": False}, {"estimator": "released"}, {"share": True}], ids=str
)
@pytest.mark.parametrize("budget", [2, 9])
def test_reads_what_brute_force_finds(options, budget):
    n = 50
    q, k, v = draw(n, 3, size=8.0)
    cache = AdamasCache(**options)
    for t in range(0, n, 7):
        cache.append(k[:, :, t : t + 7], v[:, :, t : t + 7])
    h = matrix(64) / 8 if options.get("transform", True) else torch.eye(64).double()

    def code(x):
        return sum((x @ h > t).int() for t in (-10, 0, 10))

    chosen = torch.zeros(2, 4, n, dtype=torch.bool)
    distance = torch.zeros(2, 4, n)
    for b, head, j in itertools.product(range(2), range(4), range(n)):
        x, y = code(q[b, head, 0]), code(k[b, head // 2, j])
        apart = (x - y).abs()
        if "estimator" in options:
            apart = apart.masked_fill((x * y == 2) & (x != y), 3)
        distance[b, head, j] = apart.sum()
    if "share" in options:
        distance = distance.view(2, 2, 2, n).amin(2).repeat_interleave(2, dim=1)
    for b, head in itertools.product(range(2), range(4)):
        near = sorted(range(n - 1), key=lambda j: (distance[b, head, j].item(), -j))[: budget - 1]
        chosen[b, head, [*near, n - 1]] = True
    want = attention(q, k, v, mask=chosen[:, :, None])
    torch.testing.assert_close(cache.attend(q, budget), want, rtol=0, atol=1e-13)
    assert cache.read == budget
    assert cache.codes.numel() * 4 == 2 * 2 * n * 64 // 4, "two bits a coordinate"
    assert torch.unique(torch.stack([code(k[0, 0, j]) for j in range(n)])).numel() == 4, "all codes occur"


def test_the_transform_helps_where_energy_is_uneven():
    """Keys of one length, some channels much larger: the raw code gives each channel a vote, the rotated does not."""
    g = torch.Generator().manual_seed(4)
    n, dim, budget = 1024, 64, 64
    energy = torch.exp(1.5 * torch.randn(dim, generator=g))
    energy /= energy.square().mean().sqrt()
    k = energy * torch.randn(1, 4, n, dim, generator=g)
    q = energy * torch.randn(1, 4, 1, dim, generator=g)
    near = torch.rand(1, 4, 64, 1, generator=g) * 0.6 + 0.2
    k[:, :, :64] = near * q + (1 - near**2).sqrt() * k[:, :, :64]
    k = k / k.norm(dim=-1, keepdim=True) * 4 * dim**0.5
    q = q / q.norm(dim=-1, keepdim=True) * 4 * dim**0.5
    best = (q @ k.transpose(-1, -2))[:, :, 0].topk(budget).indices
    found = {}
    for transform in (False, True):
        cache = AdamasCache(thresholds=(-4, 0, 4), transform=transform)
        cache.append(k, k)
        near_codes = select_nearest(cache.distances(q), budget)
        hits = (near_codes[..., None] == best[..., None, :]).any(-1)
        found[transform] = hits.float().mean().item()
    assert found[True] > 1.5 * found[False]
    assert found[True] > 0.6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: codes.hadamard(torch.zeros(3, 48)), "x: expected floats with a last axis of a power of two"),
        (lambda: codes.hadamard(torch.zeros(3, 64).int()), "x: expected floats"),
        (lambda: codes.bucketize(torch.zeros(3), (1, 2)), "thresholds: expected three ascending numbers"),
        (lambda: codes.bucketize(torch.zeros(3), (1, 0, 2)), "thresholds: expected three ascending numbers"),
        (lambda: codes.pack(torch.zeros(3, 8)), "codes: expected a last axis of a multiple of 16"),
        (lambda: encode(torch.zeros(3, 8)), "codes: expected a last axis of a multiple of 16"),
        (lambda: AdamasCache(estimator="l2"), "estimator: expected one of l1, released, got 'l2'"),
        (lambda: AdamasCache(thresholds=(0, 1)), "thresholds: expected three ascending numbers"),
        (lambda: select_nearest(torch.zeros(1, 1, 3), 0), "count: expected an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
