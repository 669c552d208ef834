"""What every lab notebook calls first: say what this machine is, stop early where it cannot work."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

#: Oldest versions that the labs are known to work with; newer ones are welcome.
OLDEST = {"torch": (2, 6), "triton": (3, 2)}


def start(seed: int = 0) -> torch.device:
    """Print versions, device and how kernels run; check the versions; seed torch; apply the picture style.

    Returns:
        the device that kernels run on.

    Raises:
        RuntimeError: a version is too old; says which and what to do.
    """
    # A bar that is written once to a notebook stays in it.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # First of all: it decides how kernels run, before anything imports triton.
    import effattn_kernels

    from effattn_lab.figures import style

    names = ["torch", "triton"] if platform.system() == "Linux" else ["torch"]
    found = {name: importlib.metadata.version(name) for name in names}
    for name, version in found.items():
        digits = tuple(
            int("".join(filter(str.isdigit, part)) or 0) for part in version.split("+")[0].split(".")[:2]
        )
        if digits < OLDEST[name]:
            oldest = ".".join(map(str, OLDEST[name]))
            raise RuntimeError(
                f"{name} {version} is too old: {oldest} or newer is needed (choose a newer runtime)"
            )
    device = torch.device(
        "cuda" if effattn_kernels.MODE == "compiled" and torch.cuda.is_available() else "cpu"
    )
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    print(f"Python {platform.python_version()}, {versions}; tensors for kernels on: {device}")
    print(effattn_kernels.describe())
    torch.manual_seed(seed)
    style.use()
    return device
