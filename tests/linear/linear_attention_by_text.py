"""Mistakes of the linear-attention kernel that leave the numbers right; read by `solved_labs.by_text`."""

BY_TEXT = {
    "triton_forward": {
        "no kernel": (
            ("def linear_triton(q, k, v, scale, chunk_size=16):",
             "def linear_triton(q, k, v, scale):\n"
             "    groups = q.shape[1] // k.shape[1]\n"
             "    weights = q.float() @ repeat_kv(k, groups).float().transpose(-1, -2)\n"
             "    return (scale * weights.tril() @ repeat_kv(v, groups).float()).to(q.dtype)\n\n\n"
             "def unused(q, k, v, scale, chunk_size=16):"),
            # Judged alone, the kernel must not be the right one.
            ("        s += tl.dot(tl.trans(k), v", "        s = tl.dot(tl.trans(k), v"),
        ),
        "plain global": (
            ("@triton.jit\n", "FACTOR = 1.0\n\n\n@triton.jit\n"),
            ("        out = scale * out\n", "        out = FACTOR * scale * out\n"),
        ),
    }
}  # fmt: skip
