"""The x-ray: kernels compiled for GPUs that this machine doesn't have."""

import json
import linecache
import os
import subprocess
import sys
import textwrap

import effattn_kernels  # first: it switches triton to its interpreter where there is no GPU
import pytest

from effattn_lab.measure import _gpu_limits, _xray_worker
from effattn_lab.measure._carry import carry
from effattn_lab.measure.xray import XRay, show, xray, xray_rows

if effattn_kernels.MODE == "unavailable" and sys.platform != "linux":
    pytest.skip("the x-ray needs triton's compiler, which exists for Linux only", allow_module_level=True)

ALL = list(_gpu_limits.TARGETS)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Compile for real in every run, and leave the user's cache alone."""
    before = os.environ.get("EFFATTN_CACHE")
    os.environ["EFFATTN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["EFFATTN_CACHE"]
    else:
        os.environ["EFFATTN_CACHE"] = before


def cell(source, number=[0]):  # noqa: B006
    """Run text the way a notebook runs a cell: in ``__main__``, its source known to linecache only."""
    number[0] += 1
    name, text = f"<cell {number[0]}>", textwrap.dedent(source)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names = {"__name__": "__main__"}
    exec(compile(text, name, "exec"), names)
    return names


CELL = """
    import triton
    import triton.language as tl
    from triton.language import exp2 as two_to_the

    HALF = tl.constexpr(0.5)

    @triton.jit
    def halve(x):
        return x * HALF

    def make(step):
        @triton.jit
        def scaled_product(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
            '''def inside a string'''
            i = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i[:, None] * n + i[None, :])
            y = halve(tl.dot(x, x)) + two_to_the(1.0 * step)
            tl.store(y_ptr + i[:, None] * n + i[None, :], y)
        return scaled_product

    scaled_product = make(tl.constexpr(3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_flash_on_all_gpus(mask):
    """What ships at head dims 64 and 128: no spills anywhere, tensor cores on all but the T4, nothing too large."""
    rows = xray_rows("flash", gpus="all", head_dims=(64, 128), dtypes=("fp16",), masks=(mask,))
    assert len(rows) == len(ALL) * 2 * 4
    for row in rows:
        what = f"{row['kernel']} D={row['head_dim']} on {row['gpu']}"
        assert row["spill_bytes"] == 0, what
        assert row["fits"], what
        assert 0 < row["occupancy"] <= 1, what
        matrices = row["kernel"] != "_flash_bwd_preprocess_kernel" and row["gpu"] != "T4"
        assert (row["tensor_core_instructions"] > 0) == matrices, what


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "gpus"), [("bf16", "A100,H100"), ("fp32", "T4,L4,MI300X")])
def test_flash_in_other_dtypes(dtype, gpus):
    for row in xray_rows("flash", gpus=gpus, head_dims=(64,), dtypes=(dtype,)):
        assert row["spill_bytes"] == 0, row
        assert row["fits"], row


def test_no_bf16_on_t4():
    assert {row["gpu"] for row in xray_rows("flash", gpus="T4,A100", head_dims=(64,), dtypes=("bf16",))} == {
        "A100"
    }
    with pytest.raises(ValueError, match="a T4 has no bf16"):
        xray_rows("flash", gpus="T4", dtypes=("bf16",))


@pytest.fixture(scope="module")
def from_a_cell():
    names = cell(CELL)
    signature = {"x_ptr": "*fp16", "y_ptr": "*fp32", "n": "i32"}
    return (
        names,
        signature,
        xray(names["scaled_product"], signature, {"BLOCK": 64}, gpus=["T4", "A100", "MI300X"]),
    )


def test_kernel_in_a_notebook_cell(from_a_cell):
    """Helpers, constants, imports and closures travel with it."""
    _, _, rows = from_a_cell
    assert [row.gpu for row in rows] == ["T4", "A100", "MI300X"]
    t4, a100, mi300x = rows
    assert t4.tensor_core_instructions == 0
    assert a100.tensor_core_instructions > 0
    assert mi300x.tensor_core_instructions > 0
    assert all(row.registers > 0 and row.instructions > 50 for row in rows)
    assert json.dumps([row.as_dict() for row in rows])


def test_spilling_is_reported(from_a_cell):
    """A 64 x 64 x 64 product has no tensor-core path on a T4: its operands do not fit into one warp's registers."""
    names, signature, _ = from_a_cell
    (row,) = xray(names["scaled_product"], signature, {"BLOCK": 64}, gpus="T4", num_warps=1)
    assert row.registers == 255
    assert row.spill_bytes > 500


def test_second_call_compiles_nothing(from_a_cell, monkeypatch):
    names, signature, first = from_a_cell
    monkeypatch.setattr("effattn_lab.measure.xray.compile_all", lambda todo: pytest.fail("compiled again"))
    assert xray(names["scaled_product"], signature, {"BLOCK": 64}, gpus="T4,A100,MI300X") == first


def test_digest_follows_helpers_and_constants():
    one = carry(cell(CELL)["scaled_product"])
    assert one.digest == carry(cell(CELL)["scaled_product"]).digest
    assert one.digest != carry(cell(CELL.replace("0.5", "0.25"))["scaled_product"]).digest
    assert one.digest != carry(cell(CELL.replace("x * HALF", "x - HALF"))["scaled_product"]).digest
    assert one.digest != carry(cell(CELL.replace("constexpr(3)", "constexpr(4)"))["scaled_product"]).digest


BORROWS = """
    import triton
    import triton.language as tl
    from effattn_kernels._common import dot

    @triton.jit
    def square(x_ptr, BLOCK: tl.constexpr):
        rows = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + rows[:, None] * BLOCK + rows[None, :])
        y = dot(x, x)
        tl.store(x_ptr + rows[:, None] * BLOCK + rows[None, :], y)
"""


def test_what_an_imported_helper_names_is_carried_too():
    """``dot`` is imported in the other process and names ``tl`` there; the kernel here names ``tl`` for itself."""
    kernel = cell(BORROWS)["square"]
    assert "tl = " in carry(kernel).source
    (row,) = xray(kernel, {"x_ptr": "*fp16"}, {"BLOCK": 32}, gpus="A100")
    assert row.tensor_core_instructions > 0


BROKEN = """
    import triton
    import triton.language as tl

    TABLE = [1, 2]
    PLAIN = 4

    @triton.jit
    def uses_a_list(x_ptr):
        tl.store(x_ptr, TABLE)

    @triton.jit
    def uses_a_plain_global(x_ptr):
        tl.store(x_ptr, PLAIN)

    @triton.jit
    def uses_nothing_known(x_ptr):
        tl.store(x_ptr, no_such_name)
"""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda n: xray(n["uses_a_list"], {"x_ptr": "*i32"}),
            "it uses the global 'TABLE' .list., which cannot",
        ),
        (
            lambda n: xray(n["uses_nothing_known"], {"x_ptr": "*i32"}),
            "it uses 'no_such_name', which is not defined",
        ),
        (lambda n: xray(len, {}), "kernel: expected a function decorated with @triton.jit"),
        (
            lambda n: xray(n["uses_a_list"], {}),
            "signature: expected a type or a compile-time value for 'x_ptr'",
        ),
        (lambda n: xray(n["uses_a_list"], {"y": "i32"}), "has no argument 'y'"),
        (
            lambda n: xray(n["uses_a_list"], {"x_ptr": "*i32"}, gpus="V100"),
            "gpus: expected 'all' or some of T4, A100",
        ),
        (lambda n: xray_rows("mamba"), "slug: expected one of .*flash.*, got .mamba."),
        (lambda n: xray_rows("flash", gpus="T4", head_dims=(512,)), "head_dim: expected 16 to 256, got 512"),
        (lambda n: xray_rows("flash", gpus="T4", head_dims=(-4,)), "head_dim: expected 16 to 256, got -4"),
        (lambda n: xray_rows("flash", gpus="T4", masks=("banded",)), "masks: expected some of full"),
        (lambda n: xray_rows("flash", gpus="T4", dtypes=("fp8",)), "dtypes: expected some of fp16"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(cell(BROKEN))


def test_what_a_gpu_would_refuse_is_refused():
    """The interpreter reads ordinary globals; a compiled kernel may not. The x-ray says so before a GPU does."""
    with pytest.raises(
        RuntimeError, match=r"uses_a_plain_global does not compile for T4 (?s:.*)global variable PLAIN"
    ):
        xray(cell(BROKEN)["uses_a_plain_global"], {"x_ptr": "*i32"}, gpus="T4")


def test_missing_cuobjdump(monkeypatch, tmp_path):
    import triton

    monkeypatch.setattr(triton, "__file__", str(tmp_path / "triton" / "__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cuobjdump was found neither .* install triton"):
        _xray_worker.tool("cuobjdump")


def test_without_triton():
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "from effattn_lab.measure.xray import xray\n"
        "try: xray(None, {})\n"
        "except RuntimeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Linux only" in done.stdout


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "warps", "expected"),
    [
        ("T4", 64, 0, 4, (1.0, "warps")),  # 32 warps x 64 x 32 = 65,536 registers, to the last one
        ("A100", 64, 0, 4, (0.5, "registers")),
        ("A100", 32, 0, 4, (1.0, "warps")),
        ("A100", 255, 0, 4, (0.125, "registers")),  # 8 warps
        ("A100", 32, 48 * 1024, 4, (3 * 4 / 64, "shared memory")),  # 3 x 49 KiB of 164
        ("A100", 32, 164 * 1024, 4, (0.0, "shared memory")),  # 163 KiB is the most one block may take
        ("L4", 32, 48 * 1024, 8, (2 * 8 / 48, "shared memory")),
        ("H100", 128, 100 * 1024, 8, (2 * 8 / 64, "registers")),
        ("MI300X", 128, 0, 4, (0.5, "registers")),  # 4 of 8 waves on each SIMD
        ("MI300X", 32, 32 * 1024, 4, (8 / 32, "shared memory")),
    ],
)
def test_occupancy(gpu, registers, shared, warps, expected):
    assert _gpu_limits.occupancy(_gpu_limits.TARGETS[gpu], registers, shared, warps) == expected


def test_tensor_memory_limits_blackwell():
    b200 = _gpu_limits.TARGETS["B200"]
    assert _gpu_limits.occupancy(b200, 32, 0, 4, tensor_memory_columns=512) == (4 / 64, "tensor memory")


def test_gpu_names():
    assert [t.gpu for t in _gpu_limits.targets("all")] == ALL
    assert [t.gpu for t in _gpu_limits.targets("t4, sm_90,H200")] == ["T4", "H100"]
    assert [t.gpu for t in _gpu_limits.targets(["RTX PRO 6000"])] == ["RTX PRO 6000"]


@pytest.mark.parametrize(
    ("line", "counted"),
    [
        ("        /*0a10*/                   HMMA.16816.F32 R4, R8, R12, R4 ;", True),
        ("        /*0a10*/              @!P0 HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;", True),
        ("        /*0a10*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;", True),
        ("        /*0a10*/                   FFMA R4, R8, R12, R4 ;", False),
    ],
)
def test_sass_instructions(line, counted):
    (name,) = _xray_worker.SASS_INSTRUCTION.findall(line)
    assert bool(_xray_worker.SASS_TENSOR_CORE.match(name)) == counted


def test_show(capsys):
    row = XRay("k", "T4", "sm_75", 32, 0, 1024, 100, 0, 1.0, "warps", True, 4, 2)
    show([row, row.as_dict()])
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert "spill bytes" in head
    assert "head dim" not in head, "empty columns are left out"
    assert set(rule) == {"-", " "}
    assert len(lines) == 2
