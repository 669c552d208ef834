"""Exercise: the whole tiled forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, NotMeasured, Output, Probe, Tolerance
from effattn_lab.exercises.full._flash_rows import FROM_SCRATCH, INF, finite
from effattn_lab.exercises.full._flash_trials import memory_trial, skip_trial
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.probes import watch
from effattn_lab.foundations.attention import attention, lse, repeat_kv

LN2 = math.log(2.0)


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, block_q: int, block_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention, tile by tile: q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D] give out and lse [B, Hq, Nq]."""
    k, v = repeat_kv(k, q.shape[1] // k.shape[1]), repeat_kv(v, q.shape[1] // v.shape[1])
    scale = q.shape[-1] ** -0.5
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    offset = seqlen_k - seqlen_q
    out, lse_out = torch.empty_like(q), torch.empty_like(q[..., 0])
    for i in range(0, seqlen_q, block_q):
        q_i = q[:, :, i : i + block_q]
        rows = i + offset + torch.arange(q_i.shape[2])  # positions of these queries
        m = torch.full_like(q_i[..., 0], float("-inf"))
        l, acc = torch.zeros_like(m), torch.zeros_like(q_i)
        end = min(seqlen_k, int(rows[-1]) + 1) if causal else seqlen_k
        for j in range(0, end, block_k):
            k_j, v_j = k[:, :, j : j + block_k], v[:, :, j : j + block_k]
            s = scale * (q_i @ k_j.transpose(-1, -2))
            if causal:
                s = s.masked_fill(torch.arange(j, j + k_j.shape[2]) > rows[:, None], float("-inf"))
            m_new = torch.maximum(m, s.amax(dim=-1))
            origin = torch.where(torch.isneginf(m_new), torch.zeros_like(m_new), m_new)
            alpha, p = torch.exp(m - origin), torch.exp(s - origin[..., None])
            l, acc, m = alpha * l + p.sum(dim=-1), alpha[..., None] * acc + p @ v_j, m_new
        out[:, :, i : i + block_q] = acc / torch.where(l == 0, torch.ones_like(l), l)[..., None]
        lse_out[:, :, i : i + block_q] = m + torch.log(l)
    return out, lse_out


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, **_: Any
) -> tuple[torch.Tensor, ...]:
    return attention(q, k, v, causal=causal), lse(q, k, causal=causal)


def integers(rng: np.random.Generator, *shape: int, largest: int = 50) -> torch.Tensor:
    """Whole numbers, so that scores of thousands are exact in float32 (D = 16: the scale is 1/4)."""
    return torch.from_numpy(rng.integers(-largest, largest + 1, shape)).float()


def _forward_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, nq: int, nk: int, bq: int, bk: int, causal: bool, *, hq: int = 2, hkv: int = 2,
        d: int = 16, size: float = 1.0, large: bool = False,
    ) -> Case:  # fmt: skip
        if large:
            q, k = integers(rng, 1, hq, nq, d), integers(rng, 1, hkv, nk, d)
        else:
            q, k = normal(rng, 1, hq, nq, d, size=size), normal(rng, 1, hkv, nk, d, size=size)
        v = normal(rng, 1, hkv, nk, d)
        return Case(name, {"q": q, "k": k, "v": v, "causal": causal, "block_q": bq, "block_k": bk})

    return [
        case("equals attention", 64, 64, 16, 16, False),
        case("length not a multiple of the block", 37, 37, 16, 16, False),
        case("length not a multiple of the block", 16, 41, 16, 16, False),
        case("length 1", 1, 1, 16, 16, False),
        case("any block size", 33, 50, 8, 24, False),
        case("any block size", 33, 50, 64, 5, False),
        case("spread-out scores", 40, 70, 16, 16, False, size=2.5),
        case("large scores", 32, 48, 16, 16, False, large=True),
        case("causal", 64, 64, 16, 16, True),
        case("causal", 45, 45, 8, 32, True),
        case("causal, fewer queries than keys", 9, 50, 8, 16, True),
        case("causal, more queries than keys", 50, 23, 16, 8, True),
        case("grouped heads", 20, 30, 16, 16, False, hq=6, hkv=2),
        case("odd head size", 20, 30, 16, 16, True, d=10),
    ]


def _forward_mutant(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, block_q: int, block_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, head_dim = q.shape[1] // k.shape[1], q.shape[-1]
    if fault == "heads tiled":
        k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)
    else:
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    if fault == "whole matrix":
        block_q, block_k = q.shape[2], k.shape[2]
    scales = {"no scale": 1.0, "scale twice": 1 / head_dim, "scale by Nk": k.shape[2] ** -0.5}
    scale = scales.get(fault, head_dim**-0.5)
    nq, nk = q.shape[2], k.shape[2]
    offset = 0 if fault == "top-left" else nk - nq
    out, lse_out = torch.empty_like(q), torch.empty_like(q[..., 0])
    first = True
    for i in range(
        0, nq - nq % block_q if fault == "last query tile dropped" and nq > block_q else nq, block_q
    ):
        q_i = q[:, :, i : i + block_q]
        rows = i + offset + torch.arange(q_i.shape[2])
        if first or fault != "state not reset":
            m = torch.full_like(q_i[..., 0], -INF)
            l, acc = torch.zeros_like(m), torch.zeros_like(q_i)
        if m.shape[-1] != q_i.shape[2]:
            m, l, acc = m[..., : q_i.shape[2]], l[..., : q_i.shape[2]], acc[:, :, : q_i.shape[2]]
        first = False
        end = nk
        if causal and fault not in ("masks every tile", "mask forgotten"):
            end = min(nk, int(rows[-1]) + 1)
            if fault == "diagonal tile skipped":
                end = min(nk, max(0, int(rows[0])) // block_k * block_k)
        if fault == "last keys dropped":
            end -= end % block_k
        parts = []
        for j in range(0, end, block_k):
            k_j, v_j = k[:, :, j : j + block_k], v[:, :, j : j + block_k]
            s = scale * (q_i @ k_j.transpose(-1, -2))
            if causal and fault != "mask forgotten":
                here, cols = rows[:, None], j + torch.arange(k_j.shape[2])
                if fault == "mask local":
                    here, cols = torch.arange(q_i.shape[2])[:, None], torch.arange(k_j.shape[2])
                if fault == "keys local":
                    cols = torch.arange(k_j.shape[2])
                here = here + {"mask too strict": -1, "mask too loose": 1}.get(fault, 0)
                s = s.masked_fill(cols > here, -1e6 if fault == "finite mask" else -INF)
            m_new = torch.zeros_like(m) if fault == "no max" else torch.maximum(m, s.amax(dim=-1))
            origin = m_new if fault == "no guard" else finite(m_new)
            alpha, p = torch.exp(m - origin), torch.exp(s - origin[..., None])
            if fault == "half":
                p = p.half().float()
            l_tile = p.sum(dim=-1)
            l = (l if fault == "l not rescaled" else alpha * l) + l_tile
            acc = (acc if fault == "acc not rescaled" else alpha[..., None] * acc) + p @ v_j
            m = m_new
            parts.append(p @ v_j / torch.where(l_tile == 0, torch.ones_like(l), l_tile)[..., None])
            if fault == "divided inside":
                acc = acc / torch.where(l == 0, torch.ones_like(l), l)[..., None]
        divisor = torch.where(l == 0, torch.ones_like(l), l)
        o_i = acc if fault == "no division" else acc / (l if fault == "no guard" else divisor)[..., None]
        if fault == "tiles averaged" and parts:
            o_i = torch.stack(parts).mean(dim=0)
        if fault == "tiles added" and parts:
            o_i = torch.stack(parts).sum(dim=0)
        lses = {"lse without m": torch.log(l), "lse is m": m, "lse in base 2": (m + torch.log(l)) / LN2}
        out[:, :, i : i + block_q] = o_i
        lse_out[:, :, i : i + block_q] = lses.get(fault, m + torch.log(l))
    return out, lse_out


# Lengths for the probes: five tiles a side, so that a tile is much smaller than the matrix.
_N, _BLOCK = 160, 32


def _probe_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(7)
    return normal(rng, 1, 2, _N, 16), normal(rng, 1, 1, _N, 16), normal(rng, 1, 1, _N, 16)


def _largest_tensor(fn: Callable[..., Any]) -> str | None:
    q, k, v = _probe_inputs()
    allowed = 3 * q.numel() // 2
    for causal in (False, True):
        seen = watch(fn, q.clone(), k.clone(), v.clone(), causal, _BLOCK, _BLOCK)
        if seen.largest > allowed:
            return f"a tensor of shape {seen.shape} was made for N = {_N} with tiles of {_BLOCK} x {_BLOCK}"
    return None


def _skips_tiles(fn: Callable[..., Any]) -> str | None:
    q, k, v = _probe_inputs()
    full = watch(fn, q, k, v, False, _BLOCK, _BLOCK).matmul_flops
    half = watch(fn, q, k, v, True, _BLOCK, _BLOCK).matmul_flops
    if full == 0:
        raise NotMeasured("no matrix product was seen")
    tiles = _N // _BLOCK
    needed = (tiles + 1) / (2 * tiles)
    if half > 1.05 * needed * full:
        return f"causal did {half / full:.2f} of the full work; {needed:.2f} is enough for {tiles} x {tiles} tiles"
    return None


_NEVER_HOLDS = "never holds an N x N tensor"
_SKIPS = "skips the tiles above the diagonal"
_WHOLE = (
    "A tensor with whole rows of scores (or a whole mask) is made. Scores and masks are needed for one tile at a "
    "time: build them inside the inner loop."
)
_SKIP = (
    "Tiles above the diagonal are computed and then masked. End the loop over keys after the tile that holds the "
    "last key the tile's last query sees."
)

FORWARD = Exercise(
    id="full/flash/forward",
    title="the whole forward pass, tile by tile",
    signature="flash_forward(q, k, v, causal, block_q, block_k) -> (out [B, Hq, Nq, D], lse [B, Hq, Nq])",
    outputs=(Output("out", "q"), Output("lse", "q")),
    make_inputs=_forward_inputs,
    reference=attention_reference,
    solution=flash_forward,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals attention": "Scale the scores by D ** -0.5, carry (m, l, acc) over the key tiles, divide once at the "
        "end; lse = m + log(l).",
        "length not a multiple of the block": "The last tile is smaller than the block: slices shorten by "
        "themselves, "
        "so take sizes from the slice.",
        "length 1": "One query and one key: out is v, lse is the scaled score.",
        "any block size": "The result must not depend on block_q and block_k, also when one exceeds the length.",
        "spread-out scores": "Check the factor alpha on l and on acc, and that the division happens once.",
        "large scores": "The running maximum must be subtracted before every exp.",
        "causal": "Query i sees keys j <= i: compare positions in the whole sequence, not inside the tile.",
        "causal, fewer queries than keys": "The queries are the last positions: query i stands at i + Nk - Nq.",
        "causal, more queries than keys": "The first Nq - Nk queries see no key: out is 0 and lse is -inf there, "
        "without NaN.",
        "grouped heads": "Query head h reads key head h // (Hq // Hkv): neighbours share.",
        "odd head size": "Nothing may depend on the head size being 16.",
    },
    tolerance=Tolerance(
        5e-5,
        5e-5,
        "float32 scores up to 40 are rounded to about 1e-5 (D products, order of summation), which changes "
        "weights by "
        "that fraction; outputs are weighted means of numbers of size 1 to 4.",
    ),
    loose={
        "large scores": Tolerance(
            1e-6,
            2e-2,
            "scores up to 10000 are exact in float32 here, but with log2(e) folded into the scale they "
            "are rounded to 1e-3, which moves a weight by that fraction.",
        )
    },
    probes=(
        Probe(_NEVER_HOLDS, _largest_tensor, _WHOLE, memory_trial(_NEVER_HOLDS)),
        Probe(_SKIPS, _skips_tiles, _SKIP, skip_trial(_SKIPS)),
    ),
    mutants=mutants(
        _forward_mutant,
        {
            "no scale": "The scores are not multiplied by D ** -0.5.",
            "scale twice": "The scale is applied twice: scores are divided by D instead of its square root.",
            "scale by Nk": "The scale uses the number of keys. It is one over the square root of the head size D.",
            "acc not rescaled": "acc is not multiplied by alpha = exp(m_old - m_new) when the maximum moves.",
            "l not rescaled": "l is not multiplied by alpha = exp(m_old - m_new) when the maximum moves.",
            "no max": "No maximum is subtracted before exp: large scores overflow.",
            "divided inside": "acc is divided by l inside the loop over keys, and so divided again and again. Divide "
            "once, after the loop.",
            "no division": "acc is never divided by l.",
            "tiles averaged": "The tiles' outputs are averaged with equal weights. A tile counts by its sum of "
            "exponentials, which is what m and l carry.",
            "tiles added": "Each tile is normalised by itself and the results are added. Normalise once, over "
            "all keys.",
            "state not reset": "m, l and acc are not started anew for the next query tile.",
            "last keys dropped": "The last, ragged tile of keys is dropped: the loop must run to Nk, not to a "
            "multiple "
            "of block_k.",
            "last query tile dropped": "The last, ragged tile of queries is never written.",
            "mask forgotten": "The causal mask is missing: queries see the future.",
            "mask too strict": "The causal mask is off by one: a query does not see its own position. Hide j > "
            "i, not "
            "j >= i.",
            "mask too loose": "The causal mask is off by one: a query sees the position after its own.",
            "mask local": "The mask compares indices inside the tile. Add the tile's start (i, j) and the offset "
            "Nk - Nq first.",
            "keys local": "The queries stand at their positions in the sequence, the keys are counted from the start "
            "of their tile: the two do not compare.",
            "top-left": "The mask is aligned to the top-left corner. Queries are the last positions: query i "
            "stands at "
            "i + Nk - Nq.",
            "diagonal tile skipped": "The loop over keys ends before the diagonal tile: a query tile must also visit "
            "the tile that holds its own positions.",
            "finite mask": "Hidden scores are a large negative number instead of -inf: a query that sees "
            "nothing then "
            "averages what it must not see, and its lse is finite.",
            "no guard": "A query that sees no key becomes NaN: -inf - -inf in the exponent, then 0/0.",
            "heads tiled": "The key heads are repeated as a list (h % Hkv). Query head h reads key head "
            "h // (Hq // Hkv): use repeat_interleave.",
            "lse without m": "lse lacks the maximum: lse = m + log(l).",
            "lse is m": "lse is the maximum alone: lse = m + log(l).",
            "lse in base 2": "lse is in base 2. It should be natural: m + log(l).",
            "half": "The weights are rounded to half precision: three digits are left. Stay in float32.",
            "whole matrix": _WHOLE,
            "masks every tile": _SKIP,
        },
    ),
    hints=(
        "Write it without the mask first, and check: the first six properties should hold. Your tile step is the "
        "body, but its tensors were 2-D: which of its lines say so? Then: which key is the last that a tile needs?",
        "Positions: query r of tile i stands at i + r + Nk - Nq, key c of tile j at j + c. Hide where the key's is "
        "larger. With causal the inner loop ends at min(Nk, position of the last query + 1).",
        "for i in range(0, Nq, block_q):\n    q_i = q[:, :, i : i + block_q]\n"
        "    rows = i + Nk - Nq + torch.arange(q_i.shape[2])\n"
        "    end = min(Nk, int(rows[-1]) + 1) if causal else Nk\n    for j in range(0, end, block_k):\n"
        "        s = scale * (q_i @ k[:, :, j : j + block_k].transpose(-1, -2))\n"
        "        ... hide, then the tile step\n    ... divide by l (1 where l is 0), write out and lse",
    ),
)
