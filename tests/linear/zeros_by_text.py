"""Mistakes of the ZeroS kernel that leave the numbers right; read by `solved_labs.by_text`."""

BY_TEXT = {
    "triton_states": {
        "no kernel": (
            ("def zeros_triton(k, v, s, chunk_size=16):",
             "def zeros_triton(k, v, s):\n"
             "    m = s.amax(dim=-1)\n"
             "    s = s - m[..., None]\n"
             "    kt, v, w = k.float().transpose(-1, -2), v.float(), torch.exp(s)\n"
             "    f, g = (kt * w[..., None, :]) @ v, (kt * s[..., None, :]) @ v\n"
             "    return f, g, kt @ v, w.sum(dim=-1), s.sum(dim=-1), m\n\n\n"
             "def unused(k, v, s, chunk_size=16):"),
            # Judged alone, the kernel must not be the right one.
            ("        h += tl.dot(tl.trans(k), v", "        h = tl.dot(tl.trans(k), v"),
        ),
        "plain global": (
            ("@triton.jit\n", "LOWEST = float(\"-inf\")\n\n\n@triton.jit\n"),
            ("mask=here, other=float(\"-inf\"))", "mask=here, other=LOWEST)"),
        ),
    }
}  # fmt: skip
