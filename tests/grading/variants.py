"""The flash lab as three people might solve it: the model solution, and two written without looking at it.

`model` is what the lab's source holds; `BATCHED` leans on the library's reductions, `PLAIN` spells things out. All
three pass the checks (a test proves it). `disguised` is what a hurried copier does to a solution.
"""

from __future__ import annotations

import re

from effattn_lab import notebooks

FUNCTIONS = {
    "safe_softmax": "safe_softmax",
    "merge": "merge",
    "tile_step": "tile_step",
    "forward": "flash_forward",
    "backward_tile": "backward_tile",
    "triton_forward": "flash_triton",
}

BATCHED = {
    "safe_softmax": """
def safe_softmax(s):
    shifted = s.sub(s.max(dim=-1, keepdim=True).values.nan_to_num(neginf=0.0))
    weights = shifted.exp()
    return weights.div(weights.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny))
""",
    "merge": """
def merge(o_a, lse_a, o_b, lse_b):
    total = torch.logaddexp(lse_a, lse_b)
    base = torch.nan_to_num(total, neginf=0.0)
    share = torch.stack((lse_a, lse_b)).sub(base).exp().unsqueeze(-1)
    return (share * torch.stack((o_a, o_b))).sum(0), total
""",
    "tile_step": """
def tile_step(m, l, acc, s, v):
    best = torch.cat((m.unsqueeze(1), s), dim=1).max(dim=1).values
    ref = best.nan_to_num(neginf=0.0)
    weights = s.sub(ref.unsqueeze(1)).exp()
    shrink = m.sub(ref).exp()
    return best, l.mul(shrink).add(weights.sum(1)), acc.mul(shrink.unsqueeze(1)).addmm(weights, v)
""",
    "forward": """
def flash_forward(q, k, v, causal, block_q, block_k):
    b, hq, nq, d = q.shape
    nk = k.size(2)
    k = torch.repeat_interleave(k, hq // k.size(1), dim=1)
    v = torch.repeat_interleave(v, hq // v.size(1), dim=1)
    pieces, logs = [], []
    first = 0
    for rows in q.split(block_q, dim=2):
        where = torch.arange(first, first + rows.size(2)) + (nk - nq)
        first += rows.size(2)
        top = rows.new_full((b, hq, rows.size(2), 1), -torch.inf)
        den = torch.zeros_like(top)
        num = torch.zeros_like(rows)
        seen = max(1, min(nk, int(where.max()) + 1)) if causal else nk
        visible_k, visible_v = (x[:, :, :seen].split(block_k, dim=2) for x in (k, v))
        for at, (keys, vals) in enumerate(zip(visible_k, visible_v)):
            x = torch.einsum("bhqd,bhkd->bhqk", rows, keys) / d**0.5
            if causal:
                cols = torch.arange(keys.size(2)) + at * block_k
                x = x.where(cols.unsqueeze(0) <= where.unsqueeze(1), -torch.inf)
            higher = torch.maximum(top, x.max(dim=-1, keepdim=True).values)
            safe = higher.nan_to_num(neginf=0.0)
            e = (x - safe).exp()
            keep = (top - safe).exp()
            den = den * keep + e.sum(-1, keepdim=True)
            num = num * keep + torch.einsum("bhqk,bhkd->bhqd", e, vals)
            top = higher
        pieces.append(num / den.masked_fill(den == 0, 1))
        logs.append((top + den.log()).squeeze(-1))
    return torch.cat(pieces, dim=2), torch.cat(logs, dim=2)
""",
    "backward_tile": """
def backward_tile(q, k, v, o, do, lse, keep, scale):
    logits = torch.einsum("id,jd->ij", q, k) * scale
    probs = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(1)).exp() * keep
    probs = torch.where(keep, probs, torch.zeros_like(probs))
    grad = torch.einsum("id,jd->ij", do, v) - torch.einsum("id,id->i", do, o).unsqueeze(1)
    grad = probs * grad * scale
    return grad.matmul(k), grad.t().matmul(q), probs.t().matmul(do)
""",
    "triton_forward": (
        """
        furthest = (tl.program_id(0) + 1) * BLOCK_M + (seqlen_k - seqlen_q)
        if furthest < end:
            end = furthest
""",
        """
        kt = tl.trans(k)
        x = tl.dot(q, kt, input_precision="ieee")
        x *= scale
        inside = (offs < seqlen_k)[None, :] & (rows < seqlen_q + BLOCK_M)[:, None]
        if CAUSAL:
            inside &= rows[:, None] - offs[None, :] >= seqlen_q - seqlen_k
        x = tl.where(inside, x, -float("inf"))
        higher = tl.max(x, axis=1)
        higher = tl.where(higher > m, higher, m)
        zero = tl.where(higher > -float("inf"), higher, 0.0)
        e = tl.exp(x - zero[:, None])
        shrink = tl.exp(m - zero)
        acc *= shrink[:, None]
        acc += tl.dot(e.to(v.dtype), v, input_precision="ieee")
        l *= shrink
        l += tl.sum(e, axis=1)
        m = higher
""",
    ),
}

PLAIN = {
    "safe_softmax": """
def safe_softmax(s):
    largest, _ = torch.max(s, -1)
    largest[largest == -math.inf] = 0
    e = torch.exp(s - largest.unsqueeze(-1))
    total = torch.sum(e, -1).unsqueeze(-1)
    total[total == 0] = 1
    return e / total
""",
    "merge": """
def merge(o_a, lse_a, o_b, lse_b):
    hi = torch.where(lse_a > lse_b, lse_a, lse_b)
    nothing = hi == -math.inf
    hi = hi.masked_fill(nothing, 0)
    ea = (lse_a - hi).exp()
    eb = (lse_b - hi).exp()
    both = ea + eb
    lse = both.log() + hi
    both = both.masked_fill(nothing, 1)
    frac_a, frac_b = (ea / both).unsqueeze(-1), (eb / both).unsqueeze(-1)
    return o_a * frac_a + o_b * frac_b, lse
""",
    "tile_step": """
def tile_step(m, l, acc, s, v):
    tile_max = torch.max(s, 1)[0]
    new = torch.where(tile_max > m, tile_max, m)
    shift = new.clone()
    shift[new == -math.inf] = 0
    old = torch.exp(m - shift)
    e = torch.exp(s - shift.view(-1, 1))
    l = old * l
    l = l + torch.sum(e, 1)
    acc = acc * old.view(-1, 1)
    acc = acc + torch.matmul(e, v)
    return new, l, acc
""",
    "forward": """
def one_head(q, k, v, causal, block_q, block_k):
    rows, cols = len(q), len(k)
    o, lse = torch.zeros_like(q), torch.zeros_like(q[:, 0])
    a = 0
    while a < rows:
        z = min(a + block_q, rows)
        m = torch.full_like(q[a:z, 0], -math.inf)
        l = torch.zeros_like(m)
        acc = torch.zeros_like(q[a:z])
        for c in range(0, cols, block_k):
            if causal and c > z - 1 + cols - rows:
                break
            s = torch.matmul(q[a:z], k[c : c + block_k].t()) / math.sqrt(q.shape[-1])
            if causal:
                pos = torch.arange(a, z).view(-1, 1) + cols - rows
                s[torch.arange(c, c + s.shape[1]).view(1, -1) > pos] = -math.inf
            m, l, acc = tile_step(m, l, acc, s, v[c : c + block_k])
        lse[a:z] = m + torch.log(l)
        l[l == 0] = 1
        o[a:z] = acc / l.view(-1, 1)
        a = z
    return o, lse


def flash_forward(q, k, v, causal, block_q, block_k):
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    lse = torch.zeros(q.shape[:3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            out[b, h], lse[b, h] = one_head(
                q[b, h], k[b, h // group], v[b, h // group], causal, block_q, block_k
            )
    return out, lse
""",
    "backward_tile": """
def backward_tile(q, k, v, o, do, lse, keep, scale):
    shift = lse.clone()
    shift[lse == -math.inf] = 0
    s = torch.matmul(q, k.t()) * scale
    p = torch.exp(torch.where(keep, s, torch.tensor(-math.inf, dtype=s.dtype)) - shift.view(-1, 1))
    dp = torch.matmul(do, v.t())
    row = torch.sum(o * do, 1).view(-1, 1)
    ds = p * dp - p * row
    dq = torch.matmul(ds, k) * scale
    dk = torch.matmul(ds.t(), q) * scale
    dv = torch.matmul(p.t(), do)
    return dq, dk, dv
""",
    "triton_forward": (
        """
        end = tl.minimum(end, tl.max(rows, 0) + seqlen_k - seqlen_q + 1)
""",
        """
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(offs[None, :] >= seqlen_k, float("-inf"), s)
        if CAUSAL:
            pos = rows + (seqlen_k - seqlen_q)
            s = tl.where(pos[:, None] < offs[None, :], float("-inf"), s)
        tile_max = tl.max(s, 1)
        new = tl.maximum(tile_max, m)
        shift = new
        shift = tl.where(shift == float("-inf"), 0.0, shift)
        old = tl.exp(m - shift)
        e = tl.exp(s - shift[:, None])
        l = l * old
        l = l + tl.sum(e, 1)
        acc = acc * old[:, None]
        pv = tl.dot(e.to(v.dtype), v, input_precision="ieee")
        acc = acc + pv
        m = new
""",
    ),
}


def given():
    """The released code cells."""
    return [c.source for c in notebooks.student_notebook("full/flash").cells if c.cell_type == "code"]


def model():
    """The model solution: exercise → the source of its cell."""
    cells = [c.source for c in notebooks.parse("full/flash").cells if notebooks.BEGIN in c.source]
    return dict(zip(FUNCTIONS, map(notebooks.solved, cells)))


def cells(variant):
    """exercise → source of its cell, the kernel's two blanks filled in."""
    filled = dict(variant)
    source = next(c.source for c in notebooks.parse("full/flash").cells if "def flash_kernel" in c.source)
    for text in variant["triton_forward"]:
        start = source.index(f"        {notebooks.BEGIN}")
        end = source.index(notebooks.END) + len(notebooks.END)
        source = source[:start] + text.strip("\n") + source[end:]
    filled["triton_forward"] = source
    return {name: text.strip("\n") for name, text in filled.items()}


def joined(parts):
    """As the grader stores a student's cells."""
    return "\n".join(f"# ---- cell {n}\n{text}\n" for n, text in enumerate(parts))


def disguised(parts):
    """Other names, other comments, other order of the cells, other line breaks; the same code."""
    out = []
    for text in parts:
        text = re.sub(r'(?m)^ +"""(.|\n)*?"""\n', "", text)
        text = re.sub(r"(?m) *# (?!fmt).*$", "", text)
        local = (
            "m_new",
            "origin",
            "alpha",
            "position",
            "delta",
            "scale",
            "ds",
            "dp",
            "p",
            "see",
            "l",
            "m",
            "acc",
        )
        for n, name in enumerate(local):
            text = re.sub(rf"(?<![\w.\"]){name}(?![\w\"(])", f"my_{'abcdefghijklmn'[n]}", text)
        lines = text.splitlines()
        lines.insert(1, "    # my own idea: first look at the shapes")
        out.append("\n\n".join(lines))
    return out[::-1]
