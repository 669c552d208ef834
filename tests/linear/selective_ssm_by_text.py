"""Mistakes of the selective-scan kernel that leave the numbers right; see `solved_labs.by_text` in tests/grading."""

BY_TEXT = {
    "triton_scan": {
        "no kernel": (
            ("def ssm_triton(u, delta, A, B, C, D, block=32):",
             "def ssm_triton(u, delta, A, B, C, D):\n"
             "    like = u\n"
             "    u, delta, B, C = (x.float() for x in (u, delta, B, C))\n"
             "    h, rows = 0.0, []\n"
             "    for t in range(u.shape[1]):\n"
             "        write = B[:, t, :, None] * (delta * u)[:, t, None, :]\n"
             "        h = torch.exp(delta[:, t, None, :] * A) * h + write\n"
             "        rows.append((h * C[:, t, :, None]).sum(1) + D * u[:, t])\n"
             "    return torch.stack(rows, dim=1).to(like.dtype)\n\n\n"
             "def unused(u, delta, A, B, C, D, block=32):"),
            # Judged alone, the kernel must not be the right one.
            ("        y = tl.sum(h * C[:, None], 0) + D * u\n", "        y = tl.sum(h * C[:, None], 0)\n"),
        ),
        "plain global": (
            ("@triton.jit\n", "FACTOR = 1.0\n\n\n@triton.jit\n"),
            ("        y = tl.sum(h * C[:, None], 0) + D * u\n",
             "        y = FACTOR * tl.sum(h * C[:, None], 0) + D * u\n"),
        ),
    }
}  # fmt: skip
