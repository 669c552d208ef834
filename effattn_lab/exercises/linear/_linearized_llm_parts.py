"""Exercises on the convolution and on one decoded token of grouped linear attention."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal

#: What the lab asks to write: gone from the environment in which its exercises are graded.
FROM_SCRATCH = (
    "effattn_lab.linear.linearized_llm",
    "effattn_lab.linear.linearized_llm_conv",
    "effattn_lab.linear.linearized_llm_tree",
    "effattn_kernels.linearized_llm",
)


def unit(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Rows of length 1, float32."""
    return F.normalize(normal(rng, *shape), dim=-1)


# ---- masked convolution ------------------------------------------------------------------------------------


def masked_conv(v: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Keep the taps up to the centre; by lag they are weights of v_t, v_{t-1}, ..."""
    taps, n = kernel.shape[1] // 2 + 1, v.shape[2]
    padded = F.pad(v, (0, 0, taps - 1, 0))
    out = torch.zeros_like(v)
    for m in range(taps):  # tap m looks taps - 1 - m back
        out = out + kernel[:, m, None, None] * padded[:, :, m : m + n]
    return out


def _conv_reference(v: torch.Tensor, kernel: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tap by tap and token by token."""
    centre, n = kernel.shape[1] // 2, v.shape[2]
    out = torch.zeros_like(v)
    for t in range(n):
        for m in range(centre + 1):
            if t + m - centre >= 0:
                out[:, :, t] += kernel[:, m, None] * v[:, :, t + m - centre]
    return (out,)


def _conv_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, taps: int, heads: int = 3, batch: int = 2) -> Case:
        return Case(name, {"v": normal(rng, batch, heads, n, 4), "kernel": normal(rng, heads, taps)})

    return [
        case("equals the definition", 20, 7),
        case("a kernel longer than the text", 5, 15),
        case("length 1", 1, 7),
        case("one tap", 9, 1),
        case("as many heads as tokens", 6, 5, heads=6, batch=1),
        case("63 taps", 70, 63, heads=1, batch=1),
    ]


def _conv_mutant(fault: str, v: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    centre, n = kernel.shape[1] // 2, v.shape[2]
    weights = kernel.flip(1) if fault == "taps reversed" else kernel
    weights = kernel[:1].expand_as(kernel) if fault == "one kernel for all heads" else weights
    first, last = 0, centre + 1
    if fault == "symmetric":
        last = kernel.shape[1]
    if fault == "one tap too many":
        last = min(centre + 2, kernel.shape[1])
    if fault == "centre dropped":
        last = centre
    if fault == "future half":
        first, last = centre, kernel.shape[1]
    out = torch.zeros_like(v)
    for m in range(first, last):
        back = centre - m
        if fault == "wraps around":
            moved = torch.roll(v, back, dims=2)
        elif back >= 0:
            moved = F.pad(v, (0, 0, min(back, n), 0))[:, :, :n]
        else:
            moved = F.pad(v[:, :, min(-back, n) :], (0, 0, 0, min(-back, n)))
        out = out + weights[:, m, None, None] * moved
    return out


MASKED_CONV = Exercise(
    id="linear/linearized_llm/masked_conv",
    title="the depthwise convolution without its future",
    signature="masked_conv(v [B, H, N, D], kernel [H, 2p + 1]) -> y [B, H, N, D]",
    outputs=(Output("y", "v"),),
    make_inputs=_conv_inputs,
    reference=_conv_reference,
    solution=masked_conv,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals the definition": "y_t = sum over m <= p of kernel[m] * v_{t + m - p}.",
        "a kernel longer than the text": "Taps that reach before the first token meet nothing.",
        "length 1": "One token: the centre tap times its value.",
        "one tap": "p = 0: every value times its head's one weight.",
        "as many heads as tokens": "With H = N no shape stops you from shifting along the wrong axis.",
        "63 taps": "The released models have 63 taps, of which 32 are left.",
    },
    tolerance=Tolerance(1e-5, 2e-5, "sums of at most 32 products in float32 in another order."),
    mutants=mutants(
        _conv_mutant,
        {
            "symmetric": "All taps are used, also those right of the centre: y_t reads values that come after "
            "t. That "
            "is the leak.",
            "one tap too many": "One tap right of the centre is still in: y_t reads v_{t+1}, and that is the "
            "very next "
            "token.",
            "centre dropped": "The centre tap is missing: the token's own value takes no part.",
            "future half": "The wrong half is kept: taps right of the centre look ahead, those left of it back.",
            "taps reversed": "The taps are in reverse order: tap 0 looks p back, the centre tap 0 back.",
            "one kernel for all heads": "Every head got the first head's kernel; each has its own.",
            "wraps around": "What falls out at one end comes in at the other (torch.roll): the first tokens read the "
            "last ones.",
        },
    ),
    hints=(
        "Which taps look at the past or at the token itself? Tap m looks m - p ahead.",
        "Pad p zeros in front of the time axis: F.pad(v, (0, 0, p, 0)). Then tap m of token t is row t + m of that.",
        "p, n = kernel.shape[1] // 2, v.shape[2]\npadded = F.pad(v, (0, 0, p, 0))\n"
        "out = sum(kernel[:, m, None, None] * padded[:, :, m : m + n] for m in range(p + 1))",
    ),
)

# ---- token by token ----------------------------------------------------------------------------------------


def grouped_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: float, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token joins the open group, reads it and the state; a full group is folded into the state."""
    S = torch.zeros(k.shape[1], v.shape[1])
    keys, values, out = k[:0], v[:0], []
    for t in range(len(q)):
        keys, values = torch.cat([keys, k[t : t + 1]]), torch.cat([values, v[t : t + 1]])
        out.append(torch.relu(keys @ q[t]).square() @ values + alpha * (q[t] @ S))
        if len(keys) == group_size:
            S, keys, values = S + keys.T @ values, keys[:0], values[:0]
    return torch.stack(out), S


def _decode_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: float, group_size: int
) -> tuple[torch.Tensor, ...]:
    """The matrix of weights, and one product for the state."""
    scores, t = q @ k.T, torch.arange(len(q))
    group, own = t // group_size, t[:, None] // group_size
    weights = torch.where((group == own) & (t <= t[:, None]), scores.relu() ** 2, 0.0)
    weights = weights + alpha * torch.where(group < own, scores, 0.0)
    whole = len(q) // group_size * group_size
    return weights @ v, k[:whole].T @ v[:whole]


def _decode_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, group: int, alpha: float = 0.3) -> Case:
        return Case(name, {
            "q": unit(rng, n, 8), "k": unit(rng, n, 8), "v": normal(rng, n, 6), "alpha": alpha, "group_size": group,
        })  # fmt: skip

    return [
        case("the numbers of the whole text", 30, 8),
        case("ends inside a group", 21, 8),
        case("ends with a group", 16, 8),
        case("within the first group", 5, 8),
        case("length 1", 1, 8),
        case("groups of one", 7, 1),
        case("alpha", 20, 4, alpha=-1.5),
    ]


def _decode_mutant(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: float, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    S = torch.zeros(k.shape[1], v.shape[1])
    keys, values, out = k[:0], v[:0], []
    full = {"closed one late": group_size + 1, "closed one early": max(1, group_size - 1)}.get(
        fault, group_size
    )
    for t in range(len(q)):
        new_keys, new_values = torch.cat([keys, k[t : t + 1]]), torch.cat([values, v[t : t + 1]])
        seen = (keys, values) if fault == "token does not see itself" else (new_keys, new_values)
        scores = seen[0] @ q[t]
        weights = {
            "relu not squared": scores.relu(), "squared without relu": scores.square(),
            "softmax": torch.softmax(scores, dim=0),
        }.get(fault, scores.relu().square())  # fmt: skip
        read = S
        if fault == "written before read":
            read = S + torch.outer(k[t], v[t])
        if fault == "open group in the state":
            read = S + new_keys.T @ new_values
        out.append(weights @ seen[1] + (q[t] @ read) * (1.0 if fault == "alpha forgotten" else alpha))
        keys, values = new_keys, new_values
        if fault == "never closed" or len(keys) < full:
            continue
        S = keys.T @ values + (0 if fault == "state replaced" else S)
        if fault != "group kept open too" or len(keys) >= 2 * group_size:
            keys, values = keys[:0], values[:0]
    return torch.stack(out), S


GROUPED_DECODE = Exercise(
    id="linear/linearized_llm/grouped_decode",
    title="the same, token by token",
    signature="grouped_decode(q [N, D], k [N, D], v [N, Dv], alpha, group_size) -> (out [N, Dv], S [D, Dv])",
    outputs=(Output("out", "q"), Output("S", "v")),
    make_inputs=_decode_inputs,
    reference=_decode_reference,
    solution=grouped_decode,
    from_scratch=FROM_SCRATCH,
    properties={
        "the numbers of the whole text": "The token joins the open group, then reads it (ReLU, squared) and the "
        "state (times alpha). Then, and only then, a full group is folded.",
        "ends inside a group": "S holds the complete groups alone.",
        "ends with a group": "The last token closes its group: it is in S that comes back.",
        "within the first group": "Nothing is in the state yet: S is all zeros.",
        "length 1": "relu(q . k)^2 v.",
        "groups of one": "Every token closes its group.",
        "alpha": "alpha multiplies what comes from the state, and nothing else.",
    },
    tolerance=Tolerance(
        2e-5, 3e-5, "sums of at most 30 products of numbers of size 1, in float32 in another order."
    ),
    mutants=mutants(
        _decode_mutant,
        {
            "written before read": "The token is in the state before it reads: it sees itself twice, once in the "
            "group.",
            "open group in the state": "The open group's own keys are in the state that is read: they count twice.",
            "token does not see itself": "The token is not among the keys that it reads: it joins the group first.",
            "relu not squared": "The local weight is relu(q . k), squared.",
            "squared without relu": "Squared without ReLU, a key that points away counts as much as one that points "
            "along.",
            "softmax": "There is no softmax and no denominator here: the local weight is relu(q . k)^2.",
            "alpha forgotten": "What is read from the state is not multiplied by alpha.",
            "never closed": "A full group stays open: the state never grows, and the group grows like a KV cache.",
            "closed one late": "The group is closed one token late: at group_size, not above it.",
            "closed one early": "The group is closed one token early.",
            "state replaced": "The closed group replaces the state: all earlier groups are forgotten. Add to it.",
            "group kept open too": "The group is folded into the state but stays open as well: its keys count twice.",
        },
    ),
    hints=(
        "Three steps a token, in this order: it joins the open group; it reads group and state; a full group is "
        "folded into the state.",
        "torch.cat([keys, k[t : t + 1]]) appends a row. relu(keys @ q[t]) squared are the local weights; q[t] @ S is "
        "what the state holds. An empty group is keys[:0].",
        "keys, values = torch.cat([keys, k[t : t + 1]]), torch.cat([values, v[t : t + 1]])\n"
        "out.append(torch.relu(keys @ q[t]).square() @ values + alpha * (q[t] @ S))\n"
        "if len(keys) == group_size:\n    S, keys, values = S + keys.T @ values, keys[:0], values[:0]",
    ),
)
