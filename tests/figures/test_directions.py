"""The map chapter's decode table: the numbers, worked out by hand."""

from __future__ import annotations

import pytest

from effattn_lab.figures.directions import GIB, Step, delta_state_bytes, readable, steps

MIB = 2**20


def find(word: str, seqlen: int = 131_072) -> Step:
    return next(s for s in steps(seqlen) if word in s.model)


@pytest.mark.parametrize(
    ("model", "held", "moved"),
    [
        ("Llama-2-7B", 64 * GIB, 64 * GIB),
        ("GQA", 16 * GIB, 16 * GIB),
        ("MLA", 70_272 * 131_072, 70_272 * 131_072),  # 61 layers of 576 numbers of 2 bytes
        ("Jamba", 2 * GIB + 14 * MIB, 2 * GIB + 28 * MIB),
        ("Qwen3-Next", 3 * GIB + 72 * MIB, 3 * GIB + 144 * MIB),
        ("Quest", 17 * GIB, 1.5 * GIB),
        ("StreamingLLM", 256 * MIB, 256 * MIB),
        ("48 Gated DeltaNet", 96 * MIB, 192 * MIB),
    ],
)
def test_bytes_at_131072_tokens(model: str, held: float, moved: float) -> None:
    step = find(model)
    assert (step.held, step.moved) == (held, moved)


def test_states_do_not_grow_and_caches_do() -> None:
    for model in ("48 Gated DeltaNet", "StreamingLLM"):
        assert find(model, 1_048_576) == find(model)
    assert find("GQA", 262_144).held == 2 * find("GQA").held


def test_qwen_cache_equals_state_at_3072_tokens() -> None:
    assert find("Qwen3-Next", 3_072).held == 2 * delta_state_bytes(36)


def test_selection_reads_everything_when_the_budget_covers_it() -> None:
    short = find("Quest", 2_048)
    assert short.moved == short.held


@pytest.mark.parametrize(("nbytes", "text"), [(96 * MIB, "96 MiB"), (GIB, "1 GiB"), (8.578 * GIB, "8.6 GiB")])
def test_readable(nbytes: float, text: str) -> None:
    assert readable(nbytes) == text
