"""Mistakes of the gated-linear kernel that leave the numbers right; read by `solved_labs.by_text`."""

BY_TEXT = {
    "triton_forward": {
        "no kernel": (
            ("def gated_triton(q, k, v, g, scale, chunk_size=16):",
             "def gated_triton(q, k, v, g, scale):\n"
             "    groups = q.shape[1] // k.shape[1]\n"
             "    k, v, g = (repeat_kv(x, groups) for x in (k, v, g))\n"
             "    weights = (q.float() @ k.float().transpose(-1, -2)) * decay_mask(g)\n"
             "    return (scale * weights @ v.float()).to(q.dtype)\n\n\n"
             "def unused(q, k, v, g, scale, chunk_size=16):"),
            # Judged alone, the kernel must not be the right one.
            ("        s = tl.exp(total) * s + tl.dot(", "        s = tl.dot("),
        ),
        "plain global": (
            ("@triton.jit\n", "FACTOR = 1.0\n\n\n@triton.jit\n"),
            ("        out = scale * out\n", "        out = FACTOR * scale * out\n"),
        ),
    }
}  # fmt: skip
