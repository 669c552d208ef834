"""Mistakes of the convolution kernel that leave the numbers right; see `solved_labs.by_text` in tests/grading."""

BY_TEXT = {
    "triton_conv": {
        "no kernel": (
            ("def conv_triton(v, weight, chunk_size=16):",
             "def conv_triton(v, weight):\n"
             "    x, n = repeat_kv(v, weight.shape[0] // v.shape[1]).float(), v.shape[2]\n"
             "    y, w = torch.zeros_like(x), weight.float()\n"
             "    for lag in range(min(weight.shape[1], n)):\n"
             "        y[:, :, lag:] += w[:, lag, None, None] * x[:, :, : n - lag]\n"
             "    return y.to(v.dtype)\n\n\n"
             "def unused(v, weight, chunk_size=16):"),
            # Judged alone, the kernel must not be the right one.
            ("    y += tl.dot(", "    y -= tl.dot("),
        ),
        "plain global": (
            ("@triton.jit\n", "FACTOR = 1.0\n\n\n@triton.jit\n"),
            ("    y = tl.dot(", "    y = FACTOR * tl.dot("),
        ),
    }
}  # fmt: skip
