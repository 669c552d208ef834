"""The x-ray's compiler processes: jobs in, measurements out, as many at a time as there are cores."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effattn_lab.measure import _xray_worker
from effattn_lab.measure._carry import Carried
from effattn_lab.measure._gpu_limits import Target


@dataclass(frozen=True)
class Job:
    """One compilation."""

    carried: Carried
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    target: Target
    num_warps: int
    num_stages: int

    def key(self) -> str:
        """Name of the cached result: changes with the kernel, the options, triton and the reader of the result."""
        from importlib.metadata import version

        parts = [
            self.carried.digest,
            self.carried.name,
            sorted(self.signature.items()),
            sorted((k, repr(v)) for k, v in self.constexprs.items()),
            self.target.target,
            self.num_warps,
            self.num_stages,
            version("triton"),
            Path(_xray_worker.__file__).read_text(),
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def compile_all(todo: Mapping[str, Job]) -> dict[str, dict[str, int]]:
    """Feed the jobs to worker processes; one thread looks after one process."""
    work: queue.Queue[tuple[str, Job]] = queue.Queue()
    for item in todo.items():
        work.put(item)
    results: dict[str, dict[str, int]] = {}
    errors: list[BaseException] = []
    with tempfile.TemporaryDirectory(prefix="effattn_xray_") as scratch:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": scratch,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }

        def look_after() -> None:
            try:
                with _Worker(environment, scratch) as worker:
                    while not errors:
                        try:
                            key, job = work.get_nowait()
                        except queue.Empty:
                            return
                        results[key] = worker.compile(job)
                        _progress(len(results), len(todo))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=look_after) for _ in range(min(os.cpu_count() or 1, len(todo)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    _progress(None, len(todo))
    if errors:
        raise errors[0]
    return results


class _Worker:
    """A process that compiles: one JSON line in, one JSON line out."""

    def __init__(self, environment: dict[str, str], scratch: str) -> None:
        self.scratch = Path(scratch)
        self.process = subprocess.Popen(
            [sys.executable, _xray_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> _Worker:
        # Drained all the time, so that a talkative compiler never blocks on a full pipe; the end is kept for errors.
        self.said: list[str] = []
        self.drain = threading.Thread(target=self._drain, daemon=True)
        self.drain.start()
        return self

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said = [*self.said[-19:], line]

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.drain.join(timeout=5)

    def compile(self, job: Job) -> dict[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        carried = job.carried
        message: dict[str, Any] = {
            "id": 0,
            "name": carried.name,
            "module": carried.module,
            "signature": dict(job.signature),
            "constexprs": {name: encode(name, value) for name, value in job.constexprs.items()},
            "target": list(job.target.target),
            "num_warps": job.num_warps,
            "num_stages": job.num_stages,
        }
        if carried.source is not None:
            message["module"] = f"carried_{carried.digest[:16]}"
            path = self.scratch / f"{message['module']}_{threading.get_ident()}.py"
            path.write_text(carried.source)
            message["path"] = str(path)
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait(timeout=60)
            self.drain.join(timeout=5)
            raise RuntimeError(
                f"x-ray: the compiler's process ended with code {self.process.returncode} on {carried.name} for "
                f"{job.target.gpu}. It said:\n{''.join(self.said)}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(
                f"{carried.name} does not compile for {job.target.gpu} ({job.target.sm}): {answer['error']}"
            )
        result: dict[str, int] = answer["result"]
        return result


def encode(name: str, value: Any) -> Any:
    """JSON form of a compile-time value."""
    if type(value).__name__ == "constexpr":
        value = value.value
    if type(value).__name__ == "dtype" and hasattr(value, "primitive_bitwidth"):
        return {"dtype": value.name}
    if isinstance(value, (int, float, bool, str, type(None))):
        return value
    raise ValueError(
        f"constexprs: expected a number, a string or a triton dtype for {name!r}, got {type(value).__name__}"
    )


def _progress(done: int | None, total: int) -> None:
    """A counter on a terminal's last line; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(
            "\r\033[K" if done is None else f"\rx-ray: {done} of {total} kernels compiled",
            end="",
            file=sys.stderr,
        )
        sys.stderr.flush()
