"""Which mechanisms have kernels to measure."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def kernel_module(slug: str) -> ModuleType:
    """``effattn_kernels.<slug>``; ``ValueError`` lists the slugs there are."""
    import effattn_kernels

    known = sorted(
        m.name for m in pkgutil.iter_modules(effattn_kernels.__path__) if not m.name.startswith("_")
    )
    if slug not in known:
        raise ValueError(f"slug: expected one of {', '.join(known)}, got {slug!r}")
    return importlib.import_module(f"effattn_kernels.{slug}")
