"""Mistakes of the kernel for sinks and window that leave the numbers right; read by `solved_labs.by_text`."""

BY_TEXT = {
    "triton_forward": {
        "no kernel": (
            ("def streaming_triton(q, k, v, scale, sinks, window, block=16):",
             "def streaming_triton(q, k, v, scale, sinks, window):\n"
             "    groups, nq, nk = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]\n"
             "    i, j = torch.arange(nk - nq, nk)[:, None], torch.arange(nk)\n"
             "    keep = (j <= i) & ((j < sinks) | (i - j < window))\n"
             "    k, v = (x.nan_to_num(posinf=0.0).repeat_interleave(groups, 1).float() for x in (k, v))\n"
             "    s = scale * q.float() @ k.transpose(-1, -2)\n"
             "    return (torch.softmax(s.masked_fill(~keep, float('-inf')), -1) @ v).to(q.dtype)\n\n\n"
             "def unused(q, k, v, scale, sinks, window, block=16):"),
            # Judged alone, the kernel must not be the right one.
            ("(pos - j < window))\n        s = tl.where", "(pos - j <= window))\n        s = tl.where"),
        ),
        "the future read": (
            ("    end = tl.minimum((begin + BLOCK - 1) // BLOCK + 1, tl.cdiv(seqlen_k, BLOCK))\n",
             "    end = tl.cdiv(seqlen_k, BLOCK)\n"),
        ),
        "plain global": (
            ("@triton.jit\n", "FACTOR = 1\n\n\n@triton.jit\n"),
            ("    first = tl.maximum(begin - window + 1, 0)", "    first = tl.maximum(begin - window + FACTOR, 0)"),
        ),
    }
}  # fmt: skip
