"""Trees of candidate tokens: every node's output is what decoding along its path gives, and the shortcuts' is not."""

import pytest
import torch

from effattn_lab.linear.linearized_llm import linearized_attention_chunked, linearized_attention_step
from effattn_lab.linear.linearized_llm_conv import masked_depthwise_conv
from effattn_lab.linear.linearized_llm_layer import LinearizedAttention
from effattn_lab.linear.linearized_llm_tree import (
    ancestors,
    commit,
    depths,
    tree_attention,
    tree_conv,
    unfold_matrix,
)

TREE = [-1, 0, 0, 1, 1, 2, 3, 4, 6, 8]  # 0 -> 1, 2; 1 -> 3, 4; 2 -> 5; 3 -> 6 -> 8 -> 9; 4 -> 7
CHAIN = [-1, 0, 1, 2, 3, 4]


def path_to(parents, node):
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def draw(nodes, seen, seed=0, lags=5):
    g = torch.Generator().manual_seed(seed)

    def normal(heads, length, dim):
        return torch.randn(2, heads, length, dim, generator=g, dtype=torch.float64)

    past = (normal(4, max(seen, 1), 8), normal(2, max(seen, 1), 8), normal(2, max(seen, 1), 6))
    tree = (normal(4, nodes, 8), normal(2, nodes, 8), normal(2, nodes, 6))
    weight = torch.randn(4, lags, generator=g, dtype=torch.float64)
    return past, tree, weight


def test_shape_of_the_tree():
    assert depths(TREE) == [0, 1, 1, 2, 2, 2, 3, 3, 4, 5]
    seen = ancestors(TREE)
    for a in range(len(TREE)):
        assert seen[a].nonzero()[:, 0].tolist() == sorted(path_to(TREE, a))


@pytest.mark.parametrize("lags", [1, 2, 3, 5, 12])
def test_unfolded_convolution_is_the_one_along_each_path(lags):
    past, (_, _, v), weight = draw(len(TREE), 7, lags=lags)
    tail = torch.cat([torch.zeros(2, 2, 12, 6, dtype=torch.float64), past[2]], 2)[:, :, 19 - (lags - 1) :]
    got = tree_conv(v, weight, TREE, tail=tail)
    for a in range(len(TREE)):
        line = torch.cat([past[2], v[:, :, path_to(TREE, a)]], 2)
        want = masked_depthwise_conv(line, weight)[:, :, -1]
        torch.testing.assert_close(got[:, :, a], want, rtol=0, atol=1e-13)
    assert unfold_matrix(weight, TREE).shape == (4, len(TREE), lags - 1 + len(TREE))


def test_as_stored_it_mixes_branches():
    """The same convolution on the list of nodes: right where the first branch is contiguous, wrong after."""
    past, (_, _, v), weight = draw(len(TREE), 7)
    want = tree_conv(v, weight, TREE, tail=past[2][:, :, -4:])
    stored = masked_depthwise_conv(torch.cat([past[2], v], 2), weight)[:, :, 7:]
    error = (want - stored).abs().amax((0, 1, 3))
    assert error[:2].max() < 1e-12  # the root and its first child lie as in time
    assert (error[2:] > 0.1).all()
    # A chain is a line: there both are one.
    chain = tree_conv(v[:, :, :6], weight, CHAIN, tail=past[2][:, :, -4:])
    torch.testing.assert_close(
        chain,
        masked_depthwise_conv(torch.cat([past[2], v[:, :, :6]], 2), weight)[:, :, 7:],
        rtol=0,
        atol=1e-13,
    )


def decode_along(past, tree, path, seen, options):
    state = None
    if seen:
        _, state = linearized_attention_chunked(*past, **options, return_state=True)
    for a in path:
        out, state = linearized_attention_step(state, *(x[:, :, a : a + 1] for x in tree), **options)
    return out, state


@pytest.mark.parametrize("seen", [0, 3, 5, 6, 7, 8, 15])
@pytest.mark.parametrize("parents", [TREE, CHAIN, [-1], [-1, 0, 0, 0]], ids=["tree", "chain", "root", "fan"])
def test_tree_is_decoding_along_each_path(parents, seen):
    """Groups of 8: from 3 seen the tree's depth 5 crosses a border, from 15 its root closes a group."""
    past, tree, weight = draw(len(parents), seen)
    options = dict(alpha=0.4, conv_weight=weight, group_size=8)
    state = linearized_attention_chunked(*past, **options, return_state=True)[1] if seen else None
    got = tree_attention(state, *tree, parents, **options)
    for a in range(len(parents)):
        want, after = decode_along(past, tree, path_to(parents, a), seen, options)
        torch.testing.assert_close(got[:, :, a : a + 1], want, rtol=0, atol=1e-12)
        accepted = commit(state, tree[1], tree[2], path_to(parents, a), num_lags=5, group_size=8)
        assert accepted.seen == after.seen
        for x, y in zip(accepted[:4], after[:4]):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_groups_smaller_than_the_tree():
    past, tree, weight = draw(len(TREE), 4)
    options = dict(alpha=0.4, conv_weight=weight, group_size=2)
    state = linearized_attention_chunked(*past, **options, return_state=True)[1]
    got = tree_attention(state, *tree, TREE, **options)
    for a in range(len(TREE)):
        want, _ = decode_along(past, tree, path_to(TREE, a), 4, options)
        torch.testing.assert_close(got[:, :, a : a + 1], want, rtol=0, atol=1e-12)


def test_forgetting_the_closed_group_is_not_decoding():
    """The released rule: exact for nodes before the border, off for those beyond it."""
    past, tree, weight = draw(len(TREE), 6)
    options = dict(alpha=0.4, conv_weight=weight, group_size=8)
    state = linearized_attention_chunked(*past, **options, return_state=True)[1]
    exact = tree_attention(state, *tree, TREE, **options)
    released = tree_attention(state, *tree, TREE, **options, forget_closed=True)
    error = (exact - released).abs().amax((0, 1, 3))
    beyond = torch.tensor(depths(TREE)) >= 2  # positions 6, 7 are the group's last
    assert (error[~beyond] == 0).all()
    assert (error[beyond] > 0.05).all()


def test_siblings_do_not_see_each_other():
    past, (q, k, v), weight = draw(len(TREE), 6)
    options = dict(alpha=0.4, conv_weight=weight, group_size=8)
    state = linearized_attention_chunked(*past, **options, return_state=True)[1]
    before = tree_attention(state, q, k, v, TREE, **options)
    k, v = k.clone(), v.clone()
    k[:, :, 4] += 1
    v[:, :, 4] += 1
    moved = (tree_attention(state, q, k, v, TREE, **options) != before).any(3).any(1).any(0)
    assert moved.nonzero()[:, 0].tolist() == [4, 7]  # itself and its child


def test_layer_verifies_and_accepts():
    torch.manual_seed(0)
    layer = LinearizedAttention(16, 4, num_kv_heads=2, group_size=8, conv_taps=5, rope_base=100.0).double()
    torch.nn.init.normal_(layer.conv_weight)
    torch.nn.init.constant_(layer.alpha, 0.3)
    x, nodes = torch.randn(1, 13, 16).double(), torch.randn(1, len(TREE), 16).double()
    with torch.no_grad():
        _, state = layer(x, return_state=True)
        got, kv = layer.verify(state, nodes, TREE)
        for a in range(len(TREE)):
            path = path_to(TREE, a)
            line = layer(torch.cat([x, nodes[:, path]], 1))
            torch.testing.assert_close(got[:, a], line[:, -1], rtol=0, atol=1e-6)  # rotary angles are float32
            accepted = layer.accept(state, kv, path)
            _, want = layer(torch.cat([x, nodes[:, path]], 1), return_state=True)
            for y, z in zip(accepted[:4], want[:4]):
                torch.testing.assert_close(y, z, rtol=0, atol=1e-6)


def test_bad_input_is_named():
    _, (q, k, v), weight = draw(3, 1)
    for message, call in {
        "parents: expected -1 for the root": lambda: depths([0, 0]),
        "parents: expected a node before 1": lambda: ancestors([-1, 1]),
        "parents: expected an entry for each": lambda: tree_conv(v, weight, [-1, 0]),
        "tail: expected shape": lambda: tree_conv(v, weight, [-1, 0, 0], tail=v),
        "v: expected a floating-point": lambda: tree_conv(v[0], weight, [-1, 0, 0]),
        "q: expected as many nodes": lambda: tree_attention(None, q[:, :, :2], k, v, [-1, 0, 0]),
        "weight: expected a floating": lambda: unfold_matrix(weight[0], [-1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
