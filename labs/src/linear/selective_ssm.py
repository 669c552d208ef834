# %% [markdown]
# # The selective scan: the lab
#
# Mamba has no attention. Each of its channels is a tiny linear differential equation, sampled at steps whose length the
# network chooses token by token: a step near 0 skips a token, a long one forgets everything before it. You will write that
# machine from the equation up: one token, the short convolution in front, the scan that reads a whole text in logarithmic
# depth, the chunks that keep its memory small, its backward pass, and a GPU kernel. Then a small Mamba learns to remember on a
# real text, and you look at the steps it takes.
#
# **You will be able to** discretise a linear system in the paper's way and in the code's; say what $\Delta$, $B$ and $C$ do;
# turn a recurrence into an associative scan; write its gradient as another scan; and say what such a kernel is limited by.
#
# **Time:** about two hours; solved, the notebook runs in one to two minutes on two CPU cores.
# **Hardware:** none needed. Without a GPU the kernel runs in Triton's interpreter (same numbers, not the same speed); with
# one it is compiled. On Colab, choose the GPU runtime *before* you start (Runtime → Change runtime type) and save a copy
# (File → Save a copy in Drive), or what you write is gone when the tab is.
#
# **How it works.** A step has a little theory, mostly a prediction, a blank (`...  # your code`) and a check; answers to the
# predictions stand below. A failed check names the likely mistake. Stuck? `hint("linear/selective_ssm/step", 1)` nudges, `2`
# says more, `3` is nearly the complete code; `scan_step = reference("linear/selective_ssm/step")` takes the reference so that
# you can go on, and `solution("linear/selective_ssm/step")` prints one. The notebook can be run from top to bottom at any time:
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
needed = ("effattn_lab", "effattn_kernels")
if any(importlib.util.find_spec(name) is None for name in needed):
    install("the book's package (a minute)", f"effattn-lab @ git+{REPOSITORY}")
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

# %% [markdown]
# ## Step 1. From a differential equation to a step (10 minutes)
#
# One channel, one hidden number: $h' = A h + B u$ with $A < 0$. The text gives one $u$ a token; hold it for a time $\Delta$. The
# equation then has the exact solution
#
# $$ h(t + \Delta) = e^{\Delta A}\, h(t) + \frac{e^{\Delta A} - 1}{A}\, B u . $$
#
# So $\bar A = e^{\Delta A}$ and $\bar B = \frac{e^{\Delta A} - 1}{A} B$: *zero-order hold*, equation 4 of the paper. Mamba's code keeps
# $\bar A$ and takes only the first term of $\bar B$: since $e^{\Delta A} - 1 = \Delta A + \dots$, that is $\bar B = \Delta B$.
#
# A Mamba has $E$ channels with $S$ hidden numbers each. $A$ is $[E, S]$ and fixed; $\Delta$ is a number for each token and
# channel; $B$ is $S$ numbers for each token, shared by all channels. (These are the papers' letters: $S$ counts here, and what
# other labs call the state $S$ is $h$. The length of a chunk is $L$, since $C$ is taken.)
#
# *Predict:* in float32, how many digits of $e^x - 1$ are right for $x = -10^{-5}$, a channel with $A = -1$ and a step of $10^{-5}$?

# %% tags=["nbval-check-output"]
x = torch.tensor(-1e-5)
print("exp(x) - 1 in float32   ", f"{torch.exp(x) - 1:.6e}")
print("expm1(x)                ", f"{torch.expm1(x):.6e}")


# %%
def discretize(delta, A, B, exact):
    """A_bar and B_bar, both [N, E, S]. exact: zero-order hold (the paper); else delta B (the code).

    delta [N, E], positive; A [E, S], negative; B [N, S].
    """
    ### BEGIN SOLUTION
    x = delta[:, :, None] * A
    gain = torch.expm1(x) / A if exact else delta[:, :, None]
    return torch.exp(x), gain * B[:, None, :]
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/selective_ssm/discretize", discretize)

# %% [markdown]
# (Two or three: $1 - 10^{-5}$ is rounded to seven digits, and taking 1 away leaves the last of them. `torch.expm1` has all.)
#
# Does it matter that the code drops the rest? With $\Delta A$ small, no. With a long step the two rules write differently, by
# the factor $(e^{\Delta A} - 1) / (\Delta A)$:

# %% tags=["nbval-check-output"]
for x in (-0.01, -0.1, -1.0, -10.0):
    t = torch.tensor(x, dtype=torch.float64)
    print(
        f"delta A = {x:6.2f}: the exact rule writes {torch.expm1(t) / t:.3f} of what the code writes"
    )

# %% [markdown]
# The network can learn that factor away, since $B$ and $u$ are its own. What it cannot do without is $\bar A$, which decides what
# is remembered.
#
# ## Step 2. One token (10 minutes)
#
# What the network learns is not $\Delta$ but a number of any sign; softplus, $\log(1 + e^x)$, makes it positive. Then
#
# $$ \Delta = \mathrm{softplus}(dt + b), \qquad h \leftarrow e^{\Delta A} h + \Delta u\, B^\top, \qquad y = h\, C + D u . $$
#
# Decay the old state, write, then read: a token sees itself. $C$ is $S$ numbers a token, like a query; $B$ is like a key, and
# $\Delta u$ like a value. $D$ is a skip connection, one number a channel.
#
# *Predict:* what do $dt + b = -20$ and $dt + b = 20$ do to a channel with $A = -1$?


# %%
def scan_step(h, u, dt, bias, A, B, C, D):
    """One token: y [E] and the new state [E, S].

    h [E, S]; u, dt, bias, D [E]; A [E, S]; B, C [S].
    """
    ### BEGIN SOLUTION
    delta = F.softplus(dt + bias)
    h = torch.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B
    return h @ C + D * u, h
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/selective_ssm/step", scan_step)

# %% [markdown]
# ($-20$: a step of $2 \cdot 10^{-9}$, the token leaves no trace and nothing is forgotten. $20$: $e^{-20}$ of the state is left, and
# the token is written twenty times as large. One number opens both gates.)
#
# ## Step 3. The short convolution (10 minutes)
#
# In front of the scan each channel mixes its last $W = 4$ inputs: $y_t = b + w_3 x_t + w_2 x_{t-1} + w_1 x_{t-2} + w_0 x_{t-3}$. It
# lets a token see its neighbours before it decides on $\Delta$, $B$ and $C$. While a text is written token by token, the last
# $W - 1$ inputs have to be kept: the *tail*.
#
# *Predict:* PyTorch's `Conv1d(padding=3)` returns $N + 3$ outputs. Which $N$ of them are the causal ones? (Here it is refused: write the
# sum of $W$ shifted products.) Channels come first from here on, $[E, N]$: a convolution slides along the last axis.


# %%
def short_conv(x, weight, bias, tail):
    """Causal depthwise convolution: y [E, N], and the tail to go on from.

    x [E, N]; weight [E, W], its last column meets the newest input; bias [E]; tail [E, W - 1], oldest first.
    """
    ### BEGIN SOLUTION
    width, length = weight.shape[1], x.shape[1]
    seen = torch.cat([tail, x], dim=1)
    y = bias[:, None] + sum(
        weight[:, k, None] * seen[:, k : k + length] for k in range(width)
    )
    return y, seen[:, length:]
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/selective_ssm/short_conv", short_conv)

# %% [markdown]
# (The first $N$. The last three have seen inputs that are not there; whoever takes the middle ones trains a model that reads the
# next token before it predicts it.)
#
# ## Step 4. Two steps are one step (3 minutes)
#
# Token by token is right for writing. For reading a text of a million tokens it is a million steps, one after another. But look
# at one step as a *map*, $h \mapsto a h + b$. Two maps in a row are a map again.


# %%
def combine(a1, b1, a2, b2):
    """First h -> a1 h + b1, then h -> a2 h + b2, as one map (a, b)."""
    ### BEGIN SOLUTION
    return a2 * a1, a2 * b1 + b2
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/selective_ssm/combine", combine)

# %% [markdown]
# ## Step 5. A scan in logarithmic depth (10 minutes)
#
# Composing maps is associative: it does not matter which two neighbours are combined first. So all tokens can work at once. In
# the first round every token combines with its neighbour and stands for 2 tokens; in the second with the one 2 places before,
# and stands for 4; after $\lceil \log_2 N \rceil$ rounds it stands for everything up to itself (Hillis and Steele, 1986).
#
# *Predict:* how many rounds do 8,192 tokens take? How many combinations, compared with the 8,191 of one token after another?


# %%
def double(a, b, step):
    """One round: every entry absorbs the one `step` before it; the first `step` stay. a, b [N, ...]."""
    ### BEGIN SOLUTION
    new_a, new_b = combine(a[:-step], b[:-step], a[step:], b[step:])
    return torch.cat([a[:step], new_a]), torch.cat([b[:step], new_b])
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/selective_ssm/double", double)

# %% tags=["nbval-check-output"]
step5 = take("linear/selective_ssm/double", double)
n, noise = 8192, torch.Generator().manual_seed(0)
a, b = torch.rand(n, 3, generator=noise), torch.randn(n, 3, generator=noise)
h, slow = torch.zeros(3), []
for t in range(n):
    h = a[t] * h + b[t]
    slow.append(h)
fast_a, fast_b, rounds, combinations = a, b, 0, 0
while 2**rounds < n:
    fast_a, fast_b = step5(fast_a, fast_b, 2**rounds)
    combinations += n - 2**rounds
    rounds += 1
same = bool((fast_b - torch.stack(slow)).abs().max() < 1e-4)
print(
    f"{rounds} rounds, {combinations} combinations instead of {n - 1}; same states: {same}"
)
assert same

# %% [markdown]
# (13 rounds, twelve times the work. A GPU with enough processors does not mind; one that is busy anyway does. Blelloch's scan
# needs fewer than $2N$ combinations in twice the depth: it is in the book's package.)
#
# ## Step 6. Chunks (15 minutes)
#
# The scan of step 5 holds $a$, $b$ and the states for every token, channel and hidden number: three tensors, each $S = 16$ times
# as large as the inputs. Mamba never does. It scans one chunk, keeps the chunk's last state, and throws the rest away:
#
# $$ h_t = a_{1..t}\, h_{\text{before the chunk}} + b_{1..t} , $$
#
# where $(a_{1..t}, b_{1..t})$ is token $t$'s scanned map. Before the scan $a = e^{\Delta A}$ and $b = \Delta u\, B^\top$ (the rule of
# the code; $u$ belongs to $b$), and $y_t = h_t C_t$ without the skip. Discretise inside the loop, for the chunk's tokens only.
# The inputs have the time last, as the convolution left them; a slice's `.T` puts it first, where `double` wants it.
#
# *Predict:* one could also divide: $h_t = P_t\,(h_0 + \sum_{r \le t} b_r / P_r)$ with $P_t = a_1 \cdots a_t$, two cumulative sums and no
# rounds. After how many tokens does float32 (smallest number $10^{-45}$) make that infinite, for $A = -16$ and $\Delta = 1$?


# %%
def chunked_scan(u, delta, A, B, C, h, chunk_size):
    """The scan, a chunk at a time: y [E, N] and the last state [E, S].

    u, delta [E, N]; A [E, S]; B, C [S, N]; h [E, S], what was there before the first token.
    """
    out = []  # one entry a chunk, [E, L]
    # Inside the loop: a and b of this chunk, rounds of double(), the states, y, and h for the next chunk.
    ### BEGIN SOLUTION
    for i in range(0, u.shape[1], chunk_size):
        u_c, d_c, B_c, C_c = (
            x[:, i : i + chunk_size].T for x in (u, delta, B, C)
        )  # time first
        a = torch.exp(d_c[:, :, None] * A)
        b = (d_c * u_c)[:, :, None] * B_c[:, None, :]
        step = 1
        while step < len(a):
            a, b = double(a, b, step)
            step *= 2
        states = a * h + b
        out.append((states * C_c[:, None, :]).sum(-1).T)
        h = states[-1]
    ### STUB
    #| ...  # your code
    ### END SOLUTION
    # All chunks together.
    return torch.cat(out, dim=1), h


# %% tags=["nbval-check-output"]
check("linear/selective_ssm/chunked_scan", chunked_scan)

# %% [markdown]
# (After six: $P_6 = e^{-96} = 2 \cdot 10^{-42}$ still is a number, but one over it is above float32's largest, $3 \cdot 10^{38}$.
# After seven $P$ itself is 0. The scan only ever multiplies.)
#
# ## Step 7. Backward: a scan from the other end (15 minutes)
#
# Let $g_t$ be the gradient of the loss by $h_t$, through *every* later token. $h_t$ is used twice: it is read at token $t$, which
# gives $dh_t$, and it is decayed into $h_{t+1} = a_{t+1} h_t + b_{t+1}$. So
#
# $$ g_t = dh_t + a_{t+1}\, g_{t+1}, \qquad db_t = g_t, \qquad da_t = g_t\, h_{t-1} . $$
#
# *Predict:* in the forward pass token $t$ decays by $a_t$. By which decay does $g$ pass from token $t + 1$ to token $t$?


# %%
def scan_backward(a, h, h0, dh, dh_end):
    """Gradients of h[t] = a[t] h[t - 1] + b[t]: db [N, S], da [N, S], dh0 [S].

    a, h [N, S], h after each token; h0 [S] before the first; dh [N, S] direct gradients; dh_end [S] is what later
    chunks ask of the last state.
    """
    ### BEGIN SOLUTION
    g = torch.empty_like(dh)
    carry = dh_end
    for t in range(len(dh) - 1, -1, -1):
        g[t] = dh[t] + carry
        carry = a[t] * g[t]
    before = torch.cat([h0[None], h[:-1]])
    return g, g * before, carry
    ### END SOLUTION


# %% tags=["nbval-check-output"]
check("linear/selective_ssm/scan_backward", scan_backward)

# %% [markdown]
# (By $a_{t+1}$, the decay that stands between them: off by one from the forward pass, a mistake that trains, only worse.)
#
# The backward pass needs $h_{t-1}$ beside $g_t$, one made forwards and one backwards. So Mamba keeps a state now and then and
# computes the others again: it trades a second forward pass for $S$ times the memory.
#
# ## Step 8. The kernel (15 minutes)
#
# One *program* owns a block of channels of one sequence, with all their states, and walks the text. `h` is $[S, \text{BLOCK}]$, in
# registers, and never leaves the chip; nothing of size $N \cdot E \cdot S$ exists anywhere. The layout changes once more. Inputs are
# $[B, N, E]$ and $A$ is $[S, E]$ here: channels side by side in memory, so that a block of them is loaded at once. And $h$ has
# states for rows and channels for columns: a vector over channels becomes `[None, :]`, one over states `[:, None]`.
#
# The vocabulary: `tl.exp`, `tl.sum(x, 0)` sums over the rows; `[:, None]` and `[None, :]` add axes. Without a GPU this cell runs in
# Triton's interpreter, which allows more Python than the compiler: no ordinary global variable, no `@`, no call to anything but
# `tl.…`. The check compiles your kernel for an A100 as well, some seconds the first time.
#
# One blank: two lines, the new `h` and `y` (the skip included).


# %%
@triton.jit
def ssm_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr, seqlen, channels,
    S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chans = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    states = tl.arange(0, S)
    here = chans < channels
    first = tl.program_id(1).to(tl.int64) * seqlen
    A = tl.load(
        A_ptr + states[:, None] * channels + chans[None, :],
        mask=here[None, :],
        other=0.0,
    )  # [S, BLOCK]
    D = tl.load(D_ptr + chans, mask=here, other=0.0)
    h = tl.zeros([S, BLOCK], tl.float32)
    for t in range(0, seqlen):
        row = first + t
        at = row * channels + chans
        u = tl.load(u_ptr + at, mask=here, other=0.0).to(tl.float32)
        delta = tl.load(delta_ptr + at, mask=here, other=0.0).to(tl.float32)
        B = tl.load(B_ptr + row * S + states).to(tl.float32)
        C = tl.load(C_ptr + row * S + states).to(tl.float32)
        # The new state, then the output y [BLOCK].
        ### BEGIN SOLUTION
        h = tl.exp(delta[None, :] * A) * h + B[:, None] * (delta * u)[None, :]
        y = tl.sum(h * C[:, None], 0) + D * u
        ### STUB
        #| y = ...  # your code
        ### END SOLUTION
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=here)


def ssm_triton(u, delta, A, B, C, D, block=32):
    """Launch a program for each block of channels. u, delta [B, N, E]; A [S, E]; B, C [B, N, S]; D [E]."""
    # The kernel computes addresses from the shape alone.
    u, delta, A, B, C, D = (x.contiguous() for x in (u, delta, A, B, C, D))
    batch, seqlen, channels = u.shape
    y = torch.empty_like(u)
    grid = (triton.cdiv(channels, block), batch)
    ssm_kernel[grid](
        u, delta, A, B, C, D, y, seqlen, channels, S=A.shape[0], BLOCK=block
    )
    return y


# %%
check("linear/selective_ssm/triton_scan", ssm_triton)

# %% [markdown]
# ## Step 9. What does a network do with it? (10 minutes)
#
# A real text (Python's own documentation, byte by byte), and one question at every byte: *which capital letter came last?* It may
# be one byte ago or a hundred. The reader is one Mamba mixer without its convolution, and a linear map: whatever it knows about
# earlier bytes its state has carried. Twice the same mixer: once selective, and once with fixed $\Delta$, $B$ and $C$. Then the scan is
# a convolution with a fixed kernel, as in S4D, the model of diagonal state spaces that Mamba grew out of. Same seed, same rate,
# 300 rounds of 32 windows. (About a minute for both; the cell says when one is trained.)
#
# *Predict:* what must $\Delta$ do at a capital, and what between capitals? Can a fixed kernel do it?

# %%
from effattn_lab.figures import selective_ssm_lab as pictures
from effattn_lab.linear.selective_ssm_layer import Mamba
from effattn_lab.tasks.language import ByteText

page = ByteText()
unseen = page.validation(256, 40).inputs
readers = {}
for name, selective in (("selective", True), ("fixed", False)):
    torch.manual_seed(0)
    reader = pictures.Reader(Mamba(24, state_size=4, conv_width=1, selective=selective))
    pictures.learn(reader, page, rounds=300, length=96, lr=0.02)
    readers[name] = reader
    print(f"trained: {name}", flush=True)
print("right answers, by how long ago the capital was")
print("bytes ago             0    1-4   5-16  17-64")
rows = {name: pictures.recall(reader, unseen) for name, reader in readers.items()}
rows["always the same"] = pictures.commonest(unseen)
for name, found in rows.items():
    print(f"{name:16s}" + "".join(f"{share:7.0%}" for share in found))

# %% mystnb={"image": {"alt": "Above: for each channel and each character of a line of text, the share of the state that is kept; nearly all is kept everywhere, except in some channels at the capital letters, where next to nothing is, and in a few at the top also at a, i and spaces. Below: the mean share renewed, above 0.2 at the capitals and below 0.1 elsewhere."}}
begin = 4200
line = page.valid[begin : begin + 60]
reader = readers["selective"]
share = pictures.kept(reader.mixer, reader.embed(line[None]))
pictures.steps_picture(bytes(line.tolist()).decode(), share)

# %% [markdown]
# (At a capital some channels take a long step: they forget the old letter and write the new one. Between capitals the same
# channels take short ones, and the state stays.) Nobody told the network which bytes are capitals; $\Delta$ is where it keeps that
# knowledge. Other channels do something else: those near the top of the picture take long steps at some small letters and at
# spaces too, so that the bars below are not zero between capitals.
#
# The last row of the table is what a reader gets that always names the commonest letter. The fixed kernel is far better than
# that, and does not get worse with age: by the clock, the last capital and those before it fade together, and their proportion
# stays. What it cannot do is clear the older ones away when a new one comes. Be careful with the size of the gap, though: with
# twice the learning rate the fixed mixer reaches about 93 % and the selective one falls to about 88 %. One run at one rate shows
# what happens, not how large it is.
#
# **Your functions are the whole mixer.** Its weights, your step 6 in place of the package's scan:

# %% tags=["nbval-check-output"]
step6 = take("linear/selective_ssm/chunked_scan", chunked_scan)
mixer = reader.mixer
with torch.no_grad():
    x = reader.embed(line[None])
    u, z = mixer.in_proj(x)[0].T.chunk(2)
    u = F.silu(mixer.conv1d.weight[:, 0] * u + mixer.conv1d.bias[:, None])  # one tap
    dt, B, C = mixer.x_proj(u.T).T.split([mixer.dt_rank, 4, 4])
    delta = F.softplus(mixer.dt_proj.weight @ dt + mixer.dt_proj.bias[:, None])
    A = -torch.exp(mixer.A_log)
    y, _ = step6(u, delta, A, B, C, torch.zeros_like(A), 32)
    mine = mixer.out_proj(((y + mixer.D[:, None] * u) * F.silu(z)).T)
    same = bool((mine - mixer(x)[0]).abs().max() < 1e-3)
print("same outputs as the package's layer:", same)
assert same

# %% [markdown]
# ## Step 10. What does the kernel move? (5 minutes)
#
# One sequence, $N = 128$, $E = 64$, $S = 16$, float16 (2 bytes), blocks of 32 channels. Your kernel reads $u$ and $\Delta$ once and writes
# $y$ once. Each of the two programs reads all of $B$ and $C$. $A$ and $D$ are float32 and read once.
#
# *Predict* the bytes before you run the next cell.

# %%
N, E, S, BLOCK = 128, 64, 16, 32
### BEGIN SOLUTION
my_bytes = 3 * N * E * 2 + (E // BLOCK) * 2 * N * S * 2 + 4 * (E * S + E)
### STUB
#| my_bytes = None  # bytes
### END SOLUTION

# %% tags=["nbval-check-output"]
from effattn_lab.linear import selective_ssm_cost as cost
from effattn_lab.measure.traffic import count

step8 = take("linear/selective_ssm/triton_scan", ssm_triton)


def draw(n, e, s, dtype):
    """u, delta, A, B, C, D as the kernel takes them."""
    r = torch.randn(2, 1, n, e, generator=noise)
    shared = torch.randn(2, 1, n, s, generator=noise).to(dtype)
    A = -torch.arange(1.0, s + 1)[:, None].expand(s, e)
    return (
        r[0].to(dtype), F.softplus(r[1] - 3).to(dtype), A, shared[0], shared[1], torch.ones(e),
    )  # fmt: skip


if effattn_kernels.MODE == "interpreter":
    with count() as traffic:
        step8(*draw(N, E, S, torch.float16), BLOCK)
    formula = 3 * N * E * 2 + (E // BLOCK) * 2 * N * S * 2 + 4 * (E * S + E)
    plain = cost.materialized_bytes(E, N, S, itemsize=4)
    print(f"measured {traffic.bytes} bytes, by formula {formula}")
    if my_bytes is not None:
        print(f"your prediction: {my_bytes}")
    print(
        f"a scan with a, b and h of every token in memory, float32: {plain}, {plain / formula:.0f} times as much"
    )
else:
    print(
        "Bytes are counted in Triton's interpreter only: set INTERPRETER = True in the first code cell, restart,"
    )
    print("and run everything above again.")

# %% [markdown]
# ## Step 11. X-ray, and what it is limited by (10 minutes)
#
# What would a compiler make of *your* kernel on a T4, an A100 and an H100? Look for the column that was the whole point of the
# other labs. (*Occupancy* is the share of a processor's threads that can be there at once, given the registers of each. A
# kernel of your own takes half a minute the first time.)

# %%
from effattn_lab.exercises.linear.selective_ssm import reference_kernel
from effattn_lab.measure.xray import show, xray

types = dict.fromkeys(("u_ptr", "delta_ptr", "B_ptr", "C_ptr", "y_ptr"), "*fp16")
types |= {"A_ptr": "*fp32", "D_ptr": "*fp32", "seqlen": "i32", "channels": "i32:16"}
columns = (
    "gpu",
    "registers",
    "spill_bytes",
    "instructions",
    "tensor_core_instructions",
    "occupancy",
)


def examine(kernel):
    """One row for each block and GPU; one warp a program."""
    rows = []
    for block in (32, 128):
        sizes = {"S": 16, "BLOCK": block}
        for row in xray(
            kernel, types, sizes, gpus=["T4", "A100", "H100"], num_warps=1, num_stages=1
        ):
            rows.append(
                {"block": block} | {name: row.as_dict()[name] for name in columns}
            )
    return rows


mine, xrays = step8 is ssm_triton, []
if not mine:
    print("Your kernel does not pass step 8 yet: this is the reference kernel's x-ray.")
try:
    xrays = examine(ssm_kernel if mine else reference_kernel())
except (RuntimeError, ValueError) as error:
    print("Not compiled:", " ".join(str(error).split())[:200])
    if mine:
        print("This is the reference kernel's x-ray instead.")
        xrays = examine(reference_kernel())
show(xrays)

# %% [markdown]
# No tensor core anywhere: every channel and state has a decay of its own, so there is no matrix product in it. That is what
# Mamba-2 gave up (one decay a head) to get one.
#
# So what limits it? Each token, channel and state takes one exponential, and a multiprocessor does 16 of them a cycle where it
# does 64 (A100, T4) or 128 (H100) multiply-adds. A layer of 4,096 channels, 8,192 tokens, batch 8, 16-bit inputs: it reads
# $u$, $\Delta$ and a gate and writes $y$, all $[8, 8192, 4096]$. An A100 moves 2,039 GB/s, and has 108 multiprocessors at 1.41 GHz.
#
# *Predict:* is it waiting for memory or for exponentials?

# %% tags=["nbval-check-output"]
from effattn_lab.measure.roofline import gpu

channels, seqlen, batch = 4096, 8192, 8
exps = batch * cost.scan_exponentials(channels, seqlen)
nbytes = batch * cost.fused_bytes(channels, seqlen)
print("GPU     memory  exponentials  (at least, in ms)")
for name, lanes in (("T4", 64), ("A100", 64), ("H100", 128)):
    chip = gpu(name)
    exp_rate = chip.fp32_tflops * 1e12 / 2 / lanes * 16
    print(
        f"{name:6s} {nbytes / chip.bandwidth * 1e3:7.2f} {exps / exp_rate * 1e3:13.2f}"
    )

# %% [markdown]
# (On the A100 and the H100 for exponentials, on the T4 for memory; nowhere by as much as a factor of two. The scan sits at the
# corner of a roofline that has no matrix unit in it. Moving $a$, $b$ and $h$ of every token through memory in float32, as in
# step 10, would take 48 times the memory's time.)
# These are bounds: one layer, nothing else. The next cell measures, on this machine, three ways to the same states. On one core
# nothing is parallel, and the fewest operations win.

# %% tags=["timing", "nbval-ignore-output"]
from effattn_lab.linear.selective_ssm import (
    selective_scan_chunked,
    selective_scan_parallel,
)
from effattn_lab.measure.timing import measure

u, delta, A, B, C, D = draw(1024, 64, 16, torch.float32)
inputs = [u.mT, delta.mT, A.T, B.mT, C.mT]
for name, run in (
    (
        "doubling, all at once",
        lambda *x: selective_scan_parallel(*x, algorithm="hillis-steele"),
    ),
    ("Blelloch, all at once", selective_scan_parallel),
    ("chunks of 64", selective_scan_chunked),
):
    print(
        f"{name:24s} {measure(run, *inputs, min_run_time=0.2).median_s * 1e3:7.1f} ms"
    )

# %% [markdown]
# ## What you should have seen
#
# | question | the papers say | measured here |
# |---|---|---|
# | Which discretisation? | zero-order hold for $\bar A$ and $\bar B$ (Gu and Dao, 2023, eq. 4) | the code's $\Delta B$ is its first term; they part where $\Delta A$ is large |
# | What does selection do? | the model chooses what to remember, S4 cannot | on a real text steps are long at what matters and short elsewhere; how large the gain is depends on the learning rate |
# | Is it parallel? | an associative scan | 13 rounds for 8,192 tokens, at twelve times the work |
# | What does the kernel save? | states stay in fast memory, and are recomputed backwards | dozens of times fewer bytes than a scan in memory |
# | Does it use tensor cores? | no; Mamba-2 was made for that | none in the machine code |
#
# ## Questions
#
# 1. A channel has $A = -1$. Which $\Delta$ makes its memory last 100 tokens (to $1/e$), and which makes it forget in one (to 1 %)?
# 2. Why does one number $\Delta$ control both the decay and the write, and what would a model lose that had two?
# 3. How many bytes does this layer keep for a sequence of any length ($E = 4096$, $S = 16$, $W = 4$, float32)? After how many tokens is
#    the KV cache of attention with $M = 2048$ (16 bits) larger?
# 4. Blelloch's scan does less work than doubling. Inside one warp of 32 threads, would you use it?
# 5. Your kernel walks the text from end to end: one sequence of 4,096 channels launches 128 programs. How can the text be cut so that
#    more programs run, and which part of the work is then done twice?
#
# The chapter *Selective state spaces* of the book holds the derivations, the interview questions and the answers.
