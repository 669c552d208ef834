"""Mistakes of the kernel over a list that leave the numbers right; read by `solved_labs.by_text`."""

BY_TEXT = {
    "triton_forward": {
        "no kernel": (
            ("def block_list_triton(q, k, v, scale, index, count, block=16):",
             "def block_list_triton(q, k, v, scale, index, count):\n"
             "    groups, n, m = q.shape[1] // k.shape[1], q.shape[2], index.shape[2]\n"
             "    real = torch.arange(index.shape[3]) < count[..., None]\n"
             "    keep = torch.zeros(*index.shape[:3], m + 1, dtype=torch.bool)\n"
             "    keep = keep.scatter(-1, index.long().masked_fill(~real, m), True)[..., :m]\n"
             "    keep = keep.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :n, :n]\n"
             "    keep = keep & torch.ones(n, n, dtype=torch.bool).tril()\n"
             "    k, v = (x.nan_to_num(posinf=0.0).repeat_interleave(groups, 1).float() for x in (k, v))\n"
             "    s = scale * q.float() @ k.transpose(-1, -2)\n"
             "    return (torch.softmax(s.masked_fill(~keep, float('-inf')), -1) @ v).to(q.dtype)\n\n\n"
             "def unused(q, k, v, scale, index, count, block=16):"),
            # Judged alone, the kernel must not be the right one.
            ("    count = tl.load(count_ptr + line)", "    count = tl.load(count_ptr + line) * 0 + 1"),
        ),
        "plain global": (
            ("@triton.jit\n", 'NOTHING = float("-inf")\n\n\n@triton.jit\n'),
            ('s = tl.where(col[None, :] <= row, s, float("-inf"))', "s = tl.where(col[None, :] <= row, s, NOTHING)"),
        ),
    }
}  # fmt: skip
