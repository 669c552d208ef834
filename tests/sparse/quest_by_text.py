"""Mistakes of the kernel for bounds of pages that leave the numbers right; read by `solved_labs.by_text`."""

BY_TEXT = {
    "triton_bounds": {
        "no kernel": (
            ("def bounds_triton(k, page, block=16):",
             "def bounds_triton(k, page):\n"
             "    pages = [k[:, :, i : i + page] for i in range(0, k.shape[2], page)]\n"
             "    least = torch.stack([p.amin(dim=2) for p in pages], dim=2)\n"
             "    return least, torch.stack([p.amax(dim=2) for p in pages], dim=2)\n\n\n"
             "def unused(k, page, block=16):"),
            # Judged alone, the kernel must not be the right one.
            ('tl.where(real, k, float("-inf"))', "k"),
        ),
        "loaded twice": (
            ('tl.where(real, k, float("-inf"))',
             'tl.load(k_ptr + token * D + channels, mask=real, other=float("-inf")).to(tl.float32)'),
        ),
        "plain global": (
            ("@triton.jit\ndef bounds_kernel", 'INFINITY = float("inf")\n\n\n@triton.jit\ndef bounds_kernel'),
            ('tl.where(real, k, float("-inf"))', "tl.where(real, k, -INFINITY)"),
        ),
    }
}  # fmt: skip
