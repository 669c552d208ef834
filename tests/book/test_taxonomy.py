"""The map of the book: complete, true to the design's list of chapters, and drawn without a dead link."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"

# Every system and method that the five summaries name, by name or alias on the map.
NAMED = [
    # overview of efficient transformers
    "ZeroS",
    "Elastic Attention",
    "FAL",
    "FAL+",
    "EcoSpa",
    "AGFT",
    "WAIT",
    "Nested WAIT",
    "Hydra Ensembles",
    "Deep Ensembles",
    "vLLM",
    "Sarathi",
    "Linear attention",
    "FlashAttention",
    "KV cache optimisation",
    "GQA",
    "MQA",
    "Mamba",
    "SSM",
    "Tensor parallelism",
    # Elastic Attention
    "Retrieval heads",
    "MoBA",
    "NSA",
    "XAttention",
    "SSA",
    # the survey
    "Linear RNN",
    "State space model",
    "Longformer",
    "MoE",
    "Jamba",
    "Diffusion LLM",
    "CV",
    "Audio",
    # linearized LLMs
    "Linearized LLM",
    "Speculative sampling",
    "Grouped linear attention",
    "Linformer",
    "LongNet",
    # Adamas
    "Adamas",
    "StreamingLLM",
    "Quest",
    "FlashInfer",
]

# The chapters of the whole book, written or to come.
ROOMS = {
    "foundations": ["attention", "cost_model", "kv_cache"],
    "full": ["flash", "heads", "decoding"],
    "linear": ["linear_attention", "gated_linear", "selective_ssm", "delta_rule", "zeros", "linearized_llm"],
    "sparse": ["static_patterns", "streaming", "block_sparse", "quest", "adamas", "elastic"],
    "moe": ["experts"],
    "hybrid": ["hybrid"],
    "diffusion": ["diffusion_llm"],
    "training": ["fal", "ecospa"],
    "serving": ["scheduling", "wait", "agft"],
    "uncertainty": ["hydra"],
    "modalities": ["vision", "audio"],
}


# Pages of a part that compare its mechanisms and so belong to no single system of the map.
STUDIES = {"linear/recall", "sparse/budget"}


def extension(name: str) -> Any:
    """A module of ``_ext``, imported without a Sphinx application."""
    if str(ROOT / "_ext") not in sys.path:
        sys.path.insert(0, str(ROOT / "_ext"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


svg = extension("taxonomy_svg")
taxonomy = extension("taxonomy")
DATA = taxonomy.load_map(ROOT / "map.yml")
SYSTEMS = {s["id"]: s for s in DATA["systems"]}


def resolve(kind: str, name: str) -> tuple[str | None, bool]:
    """As the extension resolves, against the files that are there."""
    if kind == "direction":
        return f"map.html#direction-{name}", True
    chapter = taxonomy.chapter_of(SYSTEMS[name])
    if (ROOT / f"{chapter}.md").is_file():
        return f"{chapter}.html", True
    return f"map.html#sys-{name}", False


@pytest.mark.parametrize("name", NAMED)
def test_every_named_system_is_on_the_map(name: str) -> None:
    known = {n.lower() for s in DATA["systems"] for n in (s["name"], *s.get("aliases", []))}
    assert name.lower() in known


@pytest.mark.parametrize("system", DATA["systems"], ids=lambda s: s["id"])
def test_system_entry(system: dict[str, Any]) -> None:
    part, slug = system["room"].split("/")
    assert slug in ROOMS[part], "every system belongs to a chapter of the plan"
    assert system["line"].endswith("."), "one sentence"
    assert len(system["line"]) <= 140, "one line"
    assert "arxiv" not in system or re.fullmatch(r"\d{4}\.\d{5}|\d{4}\.\d{4}", system["arxiv"])
    if system["placed"] == "survey":
        assert "leaf" in system, "what the survey names sits on one of its leaves"


def test_directions_follow_the_survey() -> None:
    sections = [d["section"] for d in DATA["directions"] if "section" in d]
    assert sections == [2, 3, 4, 5, 6, 7, 8]
    assert [d["id"] for d in DATA["directions"]][:7] == [
        "linear",
        "sparse",
        "full",
        "moe",
        "hybrid",
        "diffusion",
        "modalities",
    ]
    for direction in DATA["directions"]:
        for leaf in direction.get("leaves", []):
            assert leaf["id"].startswith(f"{direction['section']}.")
        assert any(s["direction"] == direction["id"] for s in DATA["systems"]), "no empty direction"


def test_written_chapters_of_mechanisms_are_on_the_map() -> None:
    rooms = {s["room"] for s in DATA["systems"]}
    for part in ROOMS:
        for chapter in (ROOT / "chapters" / part).glob("*.md"):
            if part != "foundations":
                assert f"{part}/{chapter.stem}" in rooms | STUDIES


@pytest.mark.parametrize("style", [svg.WIDE, svg.NARROW], ids=["wide", "narrow"])
def test_svg_is_well_formed_and_complete(style: Any) -> None:
    tree = ElementTree.fromstring(svg.draw(DATA, style, resolve, "t"))
    links = tree.findall(f".//{SVG}a")
    assert len(links) == len(DATA["systems"]) + len(DATA["directions"])
    assert all(a.get("aria-label") and a.find(f"{SVG}title") is not None for a in links)
    assert tree.find(f"{SVG}title") is not None
    assert tree.find(f"{SVG}desc") is not None
    ids = [e.get("id") for e in tree.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    shown = [t.text for t in tree.iter(f"{SVG}text")]
    assert {s["name"] for s in DATA["systems"]} <= set(shown)


@pytest.mark.parametrize("style", [svg.WIDE, svg.NARROW], ids=["wide", "narrow"])
def test_svg_stays_inside_its_frame(style: Any) -> None:
    tree = ElementTree.fromstring(svg.draw(DATA, style, resolve, "t"))
    left, top, width, height = map(float, tree.get("viewBox", "").split())
    for group in [*tree.findall(f".//{SVG}a"), *tree.findall(f"{SVG}g")]:
        for rect in group.findall(f"{SVG}rect"):
            x, y, w, h = (float(rect.get(k, "nan")) for k in ("x", "y", "width", "height"))
            assert left <= x <= x + w <= left + width
            assert top <= y <= y + h <= top + height


def test_links_lead_somewhere() -> None:
    chapter = (ROOT / "chapters" / "map.md").read_text(encoding="utf-8")
    for direction in DATA["directions"]:
        assert f"(direction-{direction['id']})=" in chapter, "a direction leads to its section"
        assert f"{{taxonomy-systems}} {direction['id']}" in chapter, "a system leads to its line in a table"


def test_the_picture_in_the_readme_is_the_map_of_today() -> None:
    stored = (ROOT / "_static" / "map.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(stored)
    assert stored == taxonomy.standalone(ROOT), "run `python _ext/taxonomy.py`"


def test_map_without_its_chapter_has_no_links() -> None:
    tree = ElementTree.fromstring(svg.draw(DATA, svg.WIDE, lambda kind, name: (None, False), "t"))
    assert tree.findall(f".//{SVG}a") == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"direction": "nowhere"}, "direction 'nowhere'"),
        ({"leaf": "9.9"}, "leaf '9.9'"),
        ({"cuts": ["weight"]}, "weight"),
        ({"placed": "anyone"}, "placed"),
        ({"id": "flash"}, "twice"),
    ],
)
def test_mistakes_in_the_file_are_named(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    wrong = {**SYSTEMS["quest"], **change}
    systems = [wrong if s["id"] == "quest" else s for s in DATA["systems"]]
    path = tmp_path / "map.yml"
    path.write_text(yaml.safe_dump({**DATA, "systems": systems}, allow_unicode=True), encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        taxonomy.load_map(path)
