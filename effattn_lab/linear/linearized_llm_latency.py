"""Latency and memory of SmolLM2 with softmax and with linearized layers, and how much depends on the baseline.

``python -m effattn_lab.linear.linearized_llm_latency --json out.json``. One model, the same weights, the same text;
softmax once as transformers' unfused attention ("eager"), which writes every score, once as PyTorch's fused one
("sdpa"). Linearized: all layers but the first. How well the model then speaks is
:mod:`effattn_lab.linear.linearized_llm_experiment`'s question; its cost doesn't depend on that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from effattn_lab._command import file_to_write, positive
from effattn_lab._validate import check_positive_int
from effattn_lab.linear.linearized_llm_swap import linearized

VARIANTS = ("eager", "sdpa", "linearized")
SEQLENS = (512, 1024, 2048, 4096)
RECORD = Path(__file__).with_suffix(".json")


def recorded() -> list[dict[str, Any]]:
    """The rows of the recorded run, with this module's name and the ending ``json``."""
    found: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    return found


def rows(
    lm: Any, seqlens: Sequence[int] = SEQLENS, *, new_tokens: int = 16, repeats: int = 3, **options: Any
) -> Iterator[dict[str, Any]]:
    """One row a length: seconds of the prompt and of a step, bytes of cache or state, by variant, and reductions.

    Args:
        lm: :func:`effattn_lab.models.smollm2.load`'s.
        seqlens: prompt lengths, up to the model's 8,192 positions.
        new_tokens: steps to time after the prompt. Default 16.
        repeats: rounds, each through all variants in turn, so that a slow minute hits all; the fastest counts.
        options: of ``from_attention`` (``group_size``, ``conv_taps``).

    Reductions are percent of the baseline: ``prompt_less_than_sdpa`` = 100 (1 - linearized / sdpa) and so on;
    ``model_bytes_less`` counts weights and cache, ``cache_bytes_less`` the cache alone.
    """
    check_positive_int("new_tokens", new_tokens)
    check_positive_int("repeats", repeats)
    for seqlen in seqlens:
        check_positive_int("seqlens", seqlen)
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    generator = torch.Generator().manual_seed(0)
    for seqlen in seqlens:
        ids = torch.randint(lm.model.config.vocab_size, (1, seqlen + new_tokens), generator=generator)
        best: dict[str, dict[str, float]] = {}
        for _ in range(repeats):
            for name in VARIANTS:
                with _variant(lm.model, name, options):
                    seen = _once(lm.model, ids, seqlen)
                before = best.get(name, seen)
                best[name] = {key: min(value, before[key]) for key, value in seen.items()}
        row: dict[str, Any] = {"seqlen": seqlen, "weights_bytes": weights, **best}
        ours = best["linearized"]
        for base in ("eager", "sdpa"):
            for what in ("prompt", "step"):
                row[f"{what}_less_than_{base}"] = _less(ours[f"{what}_s"], best[base][f"{what}_s"])
        theirs = best["sdpa"]["cache_bytes"]
        row["cache_bytes_less"] = _less(ours["cache_bytes"], theirs)
        row["model_bytes_less"] = _less(weights + ours["cache_bytes"], weights + theirs)
        yield row


def _less(ours: float, theirs: float) -> float:
    return 100 * (1 - ours / theirs)


@contextlib.contextmanager
def _variant(model: Any, name: str, options: dict[str, Any]) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if name == "linearized" else name)
    try:
        with contextlib.ExitStack() as stack:
            if name == "linearized":
                stack.enter_context(linearized(model, range(1, len(model.model.layers)), **options))
            yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def _once(model: Any, ids: torch.Tensor, seqlen: int) -> dict[str, float]:
    """Seconds of the prompt, mean seconds of a step, bytes kept between two steps."""
    begun = time.perf_counter()
    # Logits of the last position only, as generation asks for.
    said = model(ids[:, :seqlen], use_cache=True, logits_to_keep=1)
    prompt, cache = time.perf_counter() - begun, said.past_key_values
    begun = time.perf_counter()
    for at in range(seqlen, ids.shape[1]):
        model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
    step = (time.perf_counter() - begun) / (ids.shape[1] - seqlen)
    return {"prompt_s": prompt, "step_s": step, "cache_bytes": float(_bytes(cache))}


def _bytes(cache: Any) -> int:
    kept = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    for state in getattr(cache, "linearized_states", {}).values():
        kept += [part for part in state if isinstance(part, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in kept)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: a line of JSON a length, and all of it in ``--json``."""
    from effattn_lab.models.smollm2 import load

    parser = argparse.ArgumentParser(prog="python -m effattn_lab.linear.linearized_llm_latency")
    parser.add_argument("--json", type=file_to_write, help="where to write the rows")
    parser.add_argument("--seqlens", type=positive, nargs="+", default=list(SEQLENS))
    parser.add_argument("--repeats", type=positive, default=3)
    chosen = parser.parse_args(arguments)
    found = []
    for row in rows(load(), chosen.seqlens, repeats=chosen.repeats):
        found.append(row)
        print(json.dumps(row), flush=True)
    if chosen.json:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "repeats": chosen.repeats}
        chosen.json.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
