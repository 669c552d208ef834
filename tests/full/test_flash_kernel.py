"""The Triton flash kernels, forward and backward, against the float64 reference.

Without a GPU they run in Triton's interpreter; on a machine with one the same tests run compiled, and those
marked ``gpu`` add sizes that the interpreter is too slow for.

The tolerance is a ratio, not a number: the kernel's error may be at most twice that of a plain PyTorch run in the
same dtype, both against float64, plus one unit in the last place of the largest value (the rounding of the result
alone can cost half of one, and the plain run may be exact by luck). fp32 cases carry the weight: there the ratio
shows a half-precision shortcut a thousandfold.
"""

import math
import os
import subprocess
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels._tiles import TABLE, choose_tiles, pad_head_dim
from effattn_kernels.flash import architecture, flash_attention

from effattn_lab.foundations.attention import attention, lse, repeat_kv, visible

if effattn_kernels.MODE == "unavailable" and sys.platform != "linux":
    pytest.skip("kernels need triton, which exists for Linux only", allow_module_level=True)

DEVICE = torch.device("cuda" if effattn_kernels.MODE == "compiled" else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Outputs start as NaN: what a kernel forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def fill(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return fill

    monkeypatch.setattr("effattn_kernels.flash.torch.empty", poisoned(empty))
    monkeypatch.setattr("effattn_kernels.flash.torch.empty_like", poisoned(empty_like))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # references are fp32 where they say so
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def draw(shape, dtype, spread=3.0, seed=0):
    """q, k, v with spread-out scores: attention that is nearly uniform would hide most mistakes."""
    batch, hq, hkv, nq, nk, dim = shape
    g = torch.Generator().manual_seed(seed)
    q = spread * torch.randn(batch, hq, nq, dim, generator=g)
    k = torch.randn(batch, hkv, nk, dim, generator=g)
    v = torch.randn(batch, hkv, nk, dim, generator=g)
    return [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v)]


def plain_attention(q, k, v, *, causal=False, scale=None, window_size=None):
    """Three lines of PyTorch, every one of them in the dtype of the inputs: the yardstick."""
    k, v = (repeat_kv(x, q.shape[1] // k.shape[1]) for x in (k, v))
    hidden = ~visible(q.shape[2], k.shape[2], causal=causal, window_size=window_size, device=q.device)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    blind = hidden.all(-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(hidden & ~blind, -math.inf), -1).masked_fill(blind, 0.0)
    return probs @ v


def gradients(out, inputs, do):
    return [g.double() for g in torch.autograd.grad(out, inputs, do.to(out.dtype))]


def assert_rounding_only(name, got, plain, truth, dtype, magnitude=0.0):
    """Kernel error at most twice the plain run's, both against float64.

    ``magnitude``: what a gradient may add to that is one rounding of a number of this size. Output and log-sum-exp
    have no such allowance.
    """
    got, plain = got.double(), plain.double()
    assert not got.isnan().any(), f"{name}: NaN (unwritten output?)"
    error = (got - truth).nan_to_num(0.0).abs().max().item()  # -inf - -inf, where both agree
    allowed = 2 * (plain - truth).nan_to_num(0.0).abs().max().item() + torch.finfo(dtype).eps * magnitude
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    assert torch.equal(got.isinf(), truth.isinf()), f"{name}: infinities differ"


def check(shape, dtype, spread=3.0, **options):
    """Output, log-sum-exp and the three gradients of one case."""
    q, k, v = draw(shape, dtype, spread)
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)
    got, got_lse = flash_attention(q, k, v, return_lse=True, **options)
    assert got.dtype == dtype
    assert got_lse.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = attention(*exact, **options)
    plain = plain_attention(q, k, v, **options)
    assert_rounding_only("out", got, plain, truth, dtype)
    # The log-sum-exp is fp32 whatever the inputs are.
    truth_lse = lse(exact[0], exact[1], **options)
    plain_lse = lse(q.float(), k.float(), **options)
    assert_rounding_only("lse", got_lse, plain_lse, truth_lse, torch.float32)
    # dS = P (dP - D) is a difference, of two equal numbers where a row sees one key: what is left of it there
    # is the rounding of dP, and no run, plain or not, can do better.
    dp = (do.double() @ repeat_kv(exact[2], q.shape[1] // v.shape[1]).transpose(-1, -2)).abs().max().item()
    scale = abs(options.get("scale") or q.shape[-1] ** -0.5)
    wanted = gradients(truth, exact, do)
    # P is rebuilt as e^(s - L), from two rounded numbers of the size of L; the plain run still has its P. In fp32
    # that makes dV up to 2.7 times as far off as the plain run in 5 cases here, where all else keeps to twice.
    magnitudes = (
        scale * dp * k.abs().max().item(),
        scale * dp * q.abs().max().item(),
        wanted[2].abs().max().item(),
    )
    for name, a, b, c, magnitude in zip(
        ("dq", "dk", "dv"), gradients(got, (q, k, v), do), gradients(plain, (q, k, v), do), wanted, magnitudes
    ):
        assert_rounding_only(name, a, b, c, dtype, magnitude)


# The interpreter's tile is 32 x 32: 31, 32 and 33 are one less, equal and one more.
LENGTHS = (1, 31, 32, 33, 63, 111)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", LENGTHS, ids=lambda n: f"T{n}")
def test_lengths(length, causal):
    check((1, 2, 2, length, length, 64), torch.float32, causal=causal)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("head_dim", [16, 17, 60, 64, 96, 128, 256], ids=lambda d: f"D{d}")
def test_head_dims(head_dim, dtype):
    check((1, 1, 1, 40, 40, head_dim), DTYPES[dtype], causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (4, 1)], ids=lambda h: f"H{h[0]}-{h[1]}")
def test_grouped_heads(heads, dtype):
    check((2, *heads, 37, 37, 32), DTYPES[dtype], causal=True)


CROSS = [(1, 70), (33, 70), (64, 65), (70, 33), (40, 3)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", CROSS, ids=lambda n: f"Tq{n[0]}-Tk{n[1]}")
def test_different_lengths(lengths, causal):
    """Causal with fewer keys than queries: the first rows see nothing, output 0, lse -inf, no gradient."""
    check((1, 2, 1, *lengths, 32), torch.float32, causal=causal)


WINDOWS = {
    "W1": dict(window_size=1, causal=True),
    "W20": dict(window_size=20, causal=True),
    "W64": dict(window_size=64, causal=True),
    "W1000": dict(window_size=1000, causal=True),
    "W1-both-sides": dict(window_size=1),
    "W20-both-sides": dict(window_size=20),
    "W80-both-sides": dict(window_size=80),
}


@pytest.mark.parametrize("lengths", [(111, 111), (40, 100), (100, 40)], ids=lambda n: f"Tq{n[0]}-Tk{n[1]}")
@pytest.mark.parametrize("window", WINDOWS)
def test_window(window, lengths):
    check((1, 1, 1, *lengths, 16), torch.float32, **WINDOWS[window])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, causal):
    check((2, 4, 2, 63, 63, 64), DTYPES[dtype], causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype):
    """Scores around ±1000: exp overflows unless the maximum is subtracted, in every dtype."""
    q, k, v = draw((1, 1, 1, 40, 40, 64), DTYPES[dtype], spread=100.0)
    out, rows = flash_attention(q, k, v, causal=True, scale=1.0, return_lse=True)
    assert rows.abs().max() > 700  # exp(710) overflows even in float64
    exact = [x.detach().double() for x in (q, k, v)]
    truth = attention(*exact, causal=True, scale=1.0)
    assert_rounding_only("out", out, plain_attention(q, k, v, causal=True, scale=1.0), truth, DTYPES[dtype])
    for g in gradients(out, (q, k, v), torch.ones_like(out)):
        assert g.isfinite().all()


def test_rows_without_keys():
    q, k, v = draw((1, 1, 1, 50, 10, 16), torch.float32)
    out, rows = flash_attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :40] == 0).all()
    assert (rows[:, :, :40] == -math.inf).all()
    assert rows[:, :, 40:].isfinite().all()
    dq, dk, dv = gradients(out, (q, k, v), torch.ones_like(out))
    assert (dq[:, :, :40] == 0).all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
def test_scale(scale):
    check((1, 2, 1, 40, 40, 16), torch.float32, spread=1.0, causal=True, scale=scale)


LAYOUTS = {
    "BNHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every-other-column": lambda x: torch.stack([x, x * 0], -1).flatten(-2)[..., ::2],
    "reversed-heads-slice": lambda x: torch.cat([x, x * 0], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    """Any strides give the same bits as contiguous inputs, and so does an upstream gradient with strides."""
    q, k, v = draw((2, 4, 2, 37, 45, 32), torch.float32)
    change = LAYOUTS[layout]
    a = flash_attention(q, k, v, causal=True)
    b = flash_attention(change(q), change(k), change(v), causal=True)
    assert torch.equal(a, b)
    do = torch.randn_like(a)
    for x, y in zip(torch.autograd.grad(a, (q, k, v), do), torch.autograd.grad(b, (q, k, v), change(do))):
        assert torch.equal(x, y)


def test_expanded_keys_and_gradients():
    """Stride 0: one key head shown as two, and an upstream gradient that is one number."""
    q, k, v = draw((1, 2, 1, 33, 33, 16), torch.float32)
    a = flash_attention(q, k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1))
    b = flash_attention(q, k, v)
    assert torch.equal(a, b)
    for x, y in zip(torch.autograd.grad(a.sum(), (q, k, v)), torch.autograd.grad(b.sum(), (q, k, v))):
        torch.testing.assert_close(x, y)


def test_gradient_through_lse():
    q, k, v = draw((1, 2, 1, 50, 40, 16), torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weights = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    out, rows = flash_attention(q, k, v, causal=True, return_lse=True)
    seen = rows.isfinite()
    got = torch.autograd.grad(out.sum() + (rows * weights)[seen].sum(), (q, k, v))
    truth_rows = lse(exact[0], exact[1], causal=True)
    truth = attention(*exact, causal=True).sum() + (truth_rows * weights)[seen].sum()
    for x, y in zip(got, torch.autograd.grad(truth, exact)):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5)
    # only the log-sum-exp is used: the output's gradient never arrives
    (dq,) = torch.autograd.grad(flash_attention(q, k, v, return_lse=True)[1].sum(), q)
    (want,) = torch.autograd.grad(lse(exact[0], exact[1]).sum(), exact[0])
    torch.testing.assert_close(dq.double(), want, rtol=0, atol=1e-5)


def test_gradients_only_where_asked():
    q, k, v = draw((1, 1, 1, 33, 33, 16), torch.float32)
    full = torch.autograd.grad(flash_attention(q, k, v).sum(), (q, k, v))
    only_q = torch.autograd.grad(flash_attention(q, k.detach(), v.detach()).sum(), q)
    only_v = torch.autograd.grad(flash_attention(q.detach(), k.detach(), v).sum(), v)
    assert torch.equal(full[0], only_q[0])
    assert torch.equal(full[2], only_v[0])


def test_backward_is_deterministic():
    q, k, v = draw((1, 4, 2, 70, 70, 32), torch.float16)
    first = torch.autograd.grad(flash_attention(q, k, v, causal=True).sum(), (q, k, v))
    for _ in range(2):
        again = torch.autograd.grad(flash_attention(q, k, v, causal=True).sum(), (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_second_derivative_is_refused():
    q, k, v = draw((1, 1, 1, 4, 4, 16), torch.float32)
    out = flash_attention(q, k, v)
    do = torch.ones_like(out).requires_grad_()
    (dq,) = torch.autograd.grad(out, q, do, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


interpreter = pytest.mark.skipif(effattn_kernels.MODE != "interpreter", reason="counted in the interpreter")


def dot_flops(shape, **options):
    """FLOPs of each kernel's tl.dot in one forward and backward."""
    from effattn_lab.measure.traffic import count

    q, k, v = draw(shape, torch.float32)
    with count() as t:
        flash_attention(q, k, v, **options).sum().backward()
    return {name.split("_")[-2]: kernel.flops for name, kernel in t.by_kernel.items() if kernel.flops}


@interpreter
def test_causal_tiles_are_skipped():
    """4 x 4 tiles: 10 of 16 lie on or under the diagonal."""
    shape = (1, 1, 1, 128, 128, 16)
    full, causal = dot_flops(shape), dot_flops(shape, causal=True)
    assert set(full) == {"fwd", "dkdv", "dq"}
    for kernel in full:
        assert causal[kernel] * 16 == full[kernel] * 10, kernel


@interpreter
def test_window_tiles_are_skipped():
    """A window of 32 keys, 32-row tiles: each query tile needs its own key tile and the one before."""
    shape = (1, 1, 1, 256, 256, 16)
    full = dot_flops(shape)
    causal, both = dot_flops(shape, causal=True, window_size=32), dot_flops(shape, window_size=32)
    for kernel in full:
        assert causal[kernel] * 64 == full[kernel] * (8 + 7), kernel
        assert both[kernel] * 64 == full[kernel] * (8 + 7 + 7), kernel


@interpreter
def test_rows_without_keys_cost_nothing():
    """64 queries, 32 keys, causal: the first 32 queries stand before the first key."""
    assert dot_flops((1, 1, 1, 64, 32, 16), causal=True) == dot_flops((1, 1, 1, 32, 32, 16), causal=True)


def tensors(**change):
    good = {"q": torch.randn(1, 4, 8, 16), "k": torch.randn(1, 2, 8, 16), "v": torch.randn(1, 2, 8, 16)}
    return {**{name: x.to(DEVICE) for name, x in good.items()}, **change}


BAD = {
    "rank": (dict(q=torch.randn(4, 8, 16)), "q: expected 4 dimensions"),
    "not-a-tensor": (dict(v=[1.0]), "v: expected a torch.Tensor, got list"),
    "integers": (dict(k=torch.ones(1, 2, 8, 16, dtype=torch.int32)), "k: expected float16"),
    "float64": (dict(q=torch.randn(1, 4, 8, 16).double()), "q: expected float16"),
    "length-0": (dict(k=torch.randn(1, 2, 0, 16), v=torch.randn(1, 2, 0, 16)), "k: expected every dimension"),
    "batch": (
        dict(k=torch.randn(2, 2, 8, 16), v=torch.randn(2, 2, 8, 16)),
        "k: expected the batch size of q",
    ),
    "head-dim-differs": (dict(v=torch.randn(1, 2, 8, 32)), "v: expected the head dimension of q"),
    "head-dim-small": (
        dict(q=torch.randn(1, 4, 8, 8), k=torch.randn(1, 2, 8, 8), v=torch.randn(1, 2, 8, 8)),
        "q: expected a head dimension from 16 to 256, got 8",
    ),
    "v-heads": (dict(v=torch.randn(1, 1, 8, 16)), "v: expected the number of heads of k"),
    "v-length": (dict(v=torch.randn(1, 2, 7, 16)), "v: expected the length of k"),
    "groups": (
        dict(k=torch.randn(1, 3, 8, 16), v=torch.randn(1, 3, 8, 16)),
        "k: expected a number of heads that divides",
    ),
    "dtypes": (dict(v=torch.randn(1, 2, 8, 16).half()), "v: expected the dtype of q"),
    "devices": (dict(k=torch.randn(1, 2, 8, 16, device="meta")), "k: expected the device of q"),
    "scale-nan": (dict(scale=math.nan), "scale: expected a finite number or None, got nan"),
    "scale-inf": (dict(scale=math.inf), "scale: expected a finite number or None, got inf"),
    "scale-text": (dict(scale="1"), "scale: expected a finite number"),
    "window-0": (dict(window_size=0), "window_size: expected an integer of at least 1 or None, got 0"),
    "window-float": (dict(window_size=2.0), "window_size: expected an integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    change = {
        n: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
        for n, x in change.items()
    }
    with pytest.raises(ValueError, match=message):
        flash_attention(**tensors(**change))


def test_cpu_tensors_in_compiled_mode(monkeypatch):
    monkeypatch.setattr("effattn_kernels.flash.MODE", "compiled")
    x = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"q: expected a tensor on the GPU .* TRITON_INTERPRET=1"):
        flash_attention(x, x, x)


@pytest.mark.parametrize(
    ("before", "environment", "expected"),
    [
        ("", {}, "interpreter"),
        ("import torch, triton; ", {"TRITON_INTERPRET": "0"}, "compiled"),
        ("", {"TRITON_INTERPRET": "1"}, "interpreter"),
    ],
    ids=["no-gpu", "asked-to-compile", "asked-to-interpret"],
)
def test_mode(before, environment, expected):
    if torch.cuda.is_available() and not environment:
        expected = "compiled"
    code = f"{before}import effattn_kernels as e; print(e.MODE, '|', e.describe())"
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    mode, line = done.stdout.strip().split(" | ")
    assert mode == expected
    assert line.startswith("effattn_kernels: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is nothing to be early for")
def test_triton_imported_too_early():
    code = (
        "import triton, torch, effattn_kernels.flash as f; x = torch.randn(1, 1, 4, 16)\n"
        "try: f.flash_attention(x, x, x)\n"
        "except RuntimeError as e: print(e)"
    )
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert "Restart Python" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout


def test_without_triton():
    """macOS and Windows: the import works, a call says what to do."""
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "import torch, effattn_kernels.flash as f, effattn_kernels as e; x = torch.randn(1, 1, 4, 16)\n"
        "print(e.MODE)\n"
        "try: f.flash_attention(x, x, x)\n"
        "except RuntimeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("unavailable")
    assert "Linux" in done.stdout
    assert "pip install triton" in done.stdout


@pytest.mark.parametrize("arch", sorted({arch for arch, _ in TABLE}))
def test_tile_table_is_complete(arch):
    for dtype in DTYPES.values():
        for head_dim in (16, 60, 64, 96, 128, 256):
            for tile in choose_tiles(head_dim, dtype, arch):
                sizes = (tile.block_m, tile.block_n, tile.num_warps)
                assert all(n & (n - 1) == 0 for n in sizes), "triton wants powers of two"
                assert min(tile.block_m, tile.block_n) >= 16, "tl.dot wants 16"
    assert choose_tiles(64, torch.float16, "sm999") == choose_tiles(64, torch.float16, "sm75")


@pytest.mark.parametrize(("head_dim", "width"), [(16, 16), (17, 32), (60, 64), (96, 128), (256, 256)])
def test_pad_head_dim(head_dim, width):
    assert pad_head_dim(head_dim) == width


def gpu_dtypes():
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return ["fp16", "fp32"] + (["bf16"] if capable else [])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", gpu_dtypes())
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256], ids=lambda d: f"D{d}")
@pytest.mark.parametrize(
    "lengths", [(1000, 1000), (1, 2049), (300, 1111)], ids=lambda n: f"Tq{n[0]}-Tk{n[1]}"
)
def test_on_gpu(lengths, head_dim, dtype):
    check((2, 4, 2, *lengths, head_dim), DTYPES[dtype], causal=True)
    check((2, 4, 2, *lengths, head_dim), DTYPES[dtype], causal=True, window_size=200)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", gpu_dtypes())
def test_agrees_with_sdpa(dtype):
    """PyTorch's own fused attention, forward and backward, on the same inputs."""
    q, k, v = draw((2, 4, 4, 1024, 1024, 64), DTYPES[dtype])
    ours = flash_attention(q, k, v, causal=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    do = torch.randn_like(ours)
    tolerance = {"fp32": 2e-4, "fp16": 2e-2, "bf16": 1.5e-1}[
        dtype
    ]  # gradients reach 20: 2-4 units in the last place
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), do), torch.autograd.grad(theirs, (q, k, v), do)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_architecture_has_a_row():
    assert choose_tiles(64, torch.float16, architecture(DEVICE))
