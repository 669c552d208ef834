"""Mistakes of the kernel for distances of codes that leave the numbers right; read by `solved_labs.by_text`."""

BY_TEXT = {
    "triton_distances": {
        "no kernel": (
            ("def distances_triton(a, b, block=128):",
             "def distances_triton(a, b):\n"
             "    places = 2 * torch.arange(16)\n"
             "    b = b.repeat_interleave(a.shape[1] // b.shape[1], 1)\n"
             "    x, y = ((w.long()[..., None] >> places & 3).flatten(-2) for w in (a, b))\n"
             "    return (x[:, :, None] - y).abs().sum(-1).to(torch.int32)\n\n\n"
             "def unused(a, b, block=128):"),
            # Judged alone, the kernel must not be the right one.
            ("        x = x ^ (central << 1)\n", "        x = x ^ central\n"),
        ),
        "plain global": (
            ("@triton.jit\ndef distances_kernel", "MASK = 0x55555555\n\n\n@triton.jit\ndef distances_kernel"),
            ("(a ^ (a >> 1)) & 0x55555555\n", "(a ^ (a >> 1)) & MASK\n"),
        ),
    }
}  # fmt: skip
