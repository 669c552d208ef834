"""Mistakes of the delta-rule kernel that leave the numbers right; read by `solved_labs.by_text`."""

BY_TEXT = {
    "triton_forward": {
        "no kernel": (
            ("def delta_triton(q, k, v, beta, scale, chunk_size=16):",
             "def delta_triton(q, k, v, beta, scale):\n"
             "    groups, k, v, b = q.shape[1] // k.shape[1], k.float(), v.float(), beta.float()\n"
             "    S, outs = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3]), []\n"
             "    for t in range(q.shape[2]):\n"
             "        error = v[:, :, t] - (k[:, :, t, None] @ S)[:, :, 0]\n"
             "        S = S + (b[:, :, t, None] * k[:, :, t])[..., None] * error[:, :, None]\n"
             "        outs.append(scale * q[:, :, t, None].float() @ repeat_kv(S, groups))\n"
             "    return torch.cat(outs, dim=2).to(q.dtype)\n\n\n"
             "def unused(q, k, v, beta, scale, chunk_size=16):"),
            # Judged alone, the kernel must not be the right one.
            ("        s += tl.dot(tl.trans(k), x", "        s = tl.dot(tl.trans(k), x"),
        ),
        "plain global": (
            ("@triton.jit\n", "LAST = 15\n\n\n@triton.jit\n"),
            ("for j in range(0, C - 1):", "for j in range(0, LAST):"),
        ),
    }
}  # fmt: skip
