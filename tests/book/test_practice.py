"""The practice page in Chromium with the keyboard alone, from a server and from a file; its rules against Python."""

from __future__ import annotations

import json
import random
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import fsrs
import pytest
from test_browser import GRAVE, NARROW, WIDE, Watched, show

from effattn_lab.interview import load, numeric, schedule
from effattn_lab.interview.progress import ProgressError, Review, export_reviews, import_reviews

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
PAGE = "chapters/practice/practise.html"
START = datetime(2026, 11, 28, 10, 0, tzinfo=timezone.utc)
TRAINER = "() => document.querySelector('practice-trainer').contains(document.activeElement)"
SCHEDULER = fsrs.Scheduler(
    desired_retention=0.9, learning_steps=(), relearning_steps=(), enable_fuzzing=False
)
QUESTIONS, DRILLS = load(), numeric.load()
MODEL = {"parameters": list(fsrs.Scheduler().parameters), "retention": 0.9, "maximum_interval": 36500,
         "stability_min": 0.001, "difficulty_min": 1, "difficulty_max": 10}  # fmt: skip
UNITS = numeric.UNITS


# ---- the rules, without the book ----


@pytest.fixture(scope="module")
def rules(browser):
    page = browser.new_page()
    page.set_content("<!doctype html><title>t</title>")
    page.add_script_tag(path=str(ROOT / "_sims" / "practice-core.js"))
    yield page
    page.close()


def histories(count: int, seed: int = 0) -> list[list[tuple[int, int]]]:
    """Ratings with seconds since the start: same-day reviews, ordinary gaps, lapses after years."""
    draw = random.Random(seed)
    out = []
    for _ in range(count):
        at, history = 0, []
        for _ in range(draw.randint(1, 14)):
            history.append((draw.choices((1, 2, 3, 4), (3, 2, 5, 2))[0], at))
            gap = draw.choice(
                (0, draw.uniform(0, 0.99), draw.uniform(1, 5), draw.uniform(5, 90), draw.uniform(300, 3000))
            )
            at += int(gap * 86400)
        out.append(history)
    # On the very edges of a day, and the longest interval there is.
    return [
        *out,
        [(3, 0), (3, 86399)],
        [(3, 0), (3, 86400)],
        [(4, 0)] + [(4, 86400 * 3000 * i) for i in range(1, 9)],
    ]


def test_scheduling_equals_the_library(rules):
    cases = histories(300)
    reviews = [
        [{"id": f"{i:08d}", "question": str(n), "rating": rating,
          "reviewed_at": (START + timedelta(seconds=at)).isoformat()} for i, (rating, at) in enumerate(case)]
        for n, case in enumerate(cases)
    ]  # fmt: skip
    got = rules.evaluate(
        """([cases, settings]) => {
            const model = window.effattn.practice.fsrs(settings);
            return cases.map((history) => {
                const [state] = model.replay(history).values();
                const recall = [0, 0.5, 1, 30, 1000].map((days) => model.recall(state, state.last + days * 864e5));
                return { ...state, recall };
            });
        }""",
        [reviews, MODEL],
    )
    longest = 0
    for case, js in zip(cases, got):
        card = fsrs.Card(card_id=0, due=START)
        for rating, at in case:
            card, _ = SCHEDULER.review_card(card, fsrs.Rating(rating), START + timedelta(seconds=at))
        assert js["stability"] == pytest.approx(card.stability, rel=1e-9), case
        assert js["difficulty"] == pytest.approx(card.difficulty, rel=1e-9), case
        assert js["due"] == card.due.timestamp() * 1000, case
        assert js["reviews"] == len(case)
        for days, recall in zip((0, 0.5, 1, 30, 1000), js["recall"]):
            want = SCHEDULER.get_card_retrievability(card, card.last_review + timedelta(days=days))
            assert recall == pytest.approx(want, rel=1e-9)
        longest = max(longest, (card.due - card.last_review).days)
    assert longest == 36500, "the cap on intervals was met"


def test_order_of_reviews_and_repeats_do_not_matter(rules):
    case = [{"id": f"{i:08d}", "question": "q", "rating": 3, "reviewed_at": (START + timedelta(days=i)).isoformat()}
            for i in range(5)]  # fmt: skip
    replay = "([r, s]) => [...window.effattn.practice.fsrs(s).replay(r).values()][0]"
    assert rules.evaluate(replay, [case, MODEL]) == rules.evaluate(replay, [[*case[::-1], case[2]], MODEL])


def test_proposal_equals_the_terminal(rules):
    for total in range(7):
        for ticked in range(total + 1):
            points = [i < ticked for i in range(total)]
            assert rules.evaluate("(p) => window.effattn.practice.proposal(p)", points) == schedule.proposal(
                points
            )


def test_order_due_by_recall_then_new_then_later(rules):
    now = START.timestamp() * 1000
    day = 86_400_000
    states = {
        "shaky": {"stability": 1, "last": now - 10 * day, "due": now - 9 * day},
        "firm": {"stability": 100, "last": now - 120 * day, "due": now - 20 * day},
        "far": {"stability": 9, "last": now, "due": now + 9 * day},
        "near": {"stability": 9, "last": now, "due": now + 2 * day},
    }
    got = rules.evaluate(
        """([ids, states, now, settings]) => window.effattn.practice.order(ids.map((id) => ({ id })),
            new Map(Object.entries(states)), now, window.effattn.practice.fsrs(settings)).map((card) => card.id)""",
        [["far", "b", "firm", "near", "a", "shaky"], states, now, MODEL],
    )
    assert got == ["shaky", "firm", "b", "a", "near", "far"]


def reviews_for_a_file() -> list[Review]:
    given = [("full/flash/merge", 1), ("gone/for/good", 4), ("numeric/ridge", 3)]
    return [
        Review.new(question, rating, START + timedelta(hours=7 * i), [True, False][: i % 3], 10.4 * i)
        for i, (question, rating) in enumerate(given)
    ]


def test_file_is_the_terminals(rules, tmp_path):
    reviews = reviews_for_a_file()
    export_reviews(tmp_path / "python.json", reviews)
    read = rules.evaluate(
        "(t) => window.effattn.practice.readFile(t)", (tmp_path / "python.json").read_text()
    )
    assert read == [review.to_json() for review in reviews]
    written = rules.evaluate("(r) => window.effattn.practice.writeFile([...r].reverse())", read)
    (tmp_path / "page.json").write_text(written)
    assert import_reviews(tmp_path / "page.json") == reviews


ONE = reviews_for_a_file()[0].to_json()
BAD_FILES = [
    ("not json", "not a JSON file"),
    ("[]", "not a file of practice reviews"),
    ("null", "not a file of practice reviews"),
    ({"format": "other", "version": 1, "reviews": []}, 'expected format "effattn-practice", got "other"'),
    ({"format": "effattn-practice", "version": 2, "reviews": []}, "A newer program wrote this file"),
    ({"format": "effattn-practice", "version": "1", "reviews": []}, "version: expected 1"),
    ({"format": "effattn-practice", "version": 0, "reviews": []}, "version: expected 1, got 0"),
    ({"format": "effattn-practice", "version": 1}, "reviews: expected a list"),
    ({**ONE, "id": "7"}, "reviews[1]: id: expected a UUID"),
    ({**ONE, "question": ""}, "reviews[1]: question"),
    ({**ONE, "question": "q" * 201}, "reviews[1]: question"),
    ({**ONE, "rating": 5}, "reviews[1]: rating: expected 1, 2, 3 or 4, got 5"),
    ({**ONE, "rating": True}, "reviews[1]: rating"),
    ({**ONE, "rating": "3"}, "reviews[1]: rating"),
    ({**ONE, "reviewed_at": "yesterday"}, "reviews[1]: reviewed_at: expected a time like"),
    ({**ONE, "reviewed_at": "2026-11-28T10:00:00"}, "reviews[1]: reviewed_at"),
    ({**ONE, "reviewed_at": "2026-13-28T10:00:00Z"}, "reviews[1]: reviewed_at"),
    ({**ONE, "reviewed_at": "1999-12-31T10:00:00Z"}, "reviews[1]: reviewed_at"),
    ({**ONE, "points": [1]}, "reviews[1]: points"),
    ({**ONE, "points": None}, "reviews[1]: points"),
    ({**ONE, "seconds": -1}, "reviews[1]: seconds"),
    ({**ONE, "seconds": None}, "reviews[1]: seconds"),
    ({key: value for key, value in ONE.items() if key != "points"}, "reviews[1]: points: missing"),
    (7, "reviews[1]: expected an object, got 7"),
]


def as_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not (isinstance(content, dict) and "format" in content):
        content = {"format": "effattn-practice", "version": 1, "reviews": [ONE, content]}
    return json.dumps(content)


@pytest.mark.parametrize(("content", "says"), BAD_FILES, ids=[says for _, says in BAD_FILES])
def test_bad_file_is_refused_here_and_in_the_terminal(rules, tmp_path, content, says):
    text = as_text(content)
    got = rules.evaluate(
        "(t) => { try { return window.effattn.practice.readFile(t); } catch (error) { return error.message; } }",
        text,
    )
    assert isinstance(got, str)
    assert says in got
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ProgressError):
        import_reviews(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("text", "dimension", "unit", "want"),
    [
        ("1500", "flops", "GFLOP", 1.5e12), ("1,500", "flops", "FLOP", 1500),
        ("1.5e9", "bytes", "B", 1.5e9), ("1.5E9 B", "bytes", "GiB", 1.5e9),
        ("16 GiB", "bytes", "GiB", 16 * 2**30), ("16gb", "bytes", "GiB", 16e9),
        ("16", "bytes", "GiB", 16 * 2**30), ("128 KB", "bytes", "KiB", 128e3),
        ("128 kib", "bytes", "KiB", 131072), ("2 G", "bytes", "GiB", 2e9), ("2 Gi", "bytes", "GB", 2**31),
        ("3 bytes", "bytes", "GB", 3), ("1.5 × 10^9", "flops", "FLOP", 1.5e9),
        ("1.5*10**9", "flops", "FLOP", 1.5e9), ("12 TFLOPs", "flops", "GFLOP", 12e12),
        ("12 T", "flops", "GFLOP", 12e12), (".5", "time", "ms", 5e-4), ("4.5 ms", "time", "ms", 4.5e-3),
        ("320 us", "time", "ms", 320e-6), ("320 µs", "time", "ms", 320e-6), ("22 %", "number", "", 0.22),
        ("x2", "number", "×", None), ("2x", "number", "×", 2), ("2 times", "number", "×", 2),
        ("114k", "number", "tokens", 114e3), ("59 sequences", "number", "sequences", 59),
        ("295 FLOP/byte", "intensity", "FLOP/B", 295), ("$0.22", "money", "$", 0.22),
        ("0.22 dollars", "money", "$", 0.22), ("−3", "number", "", -3), ("≈ 7", "number", "", 7),
        ("1 048 576", "number", "", 1048576), ("", "number", "", None), ("abc", "number", "", None),
        ("1,5", "number", "", None), ("1.2.3", "number", "", None), ("3 apples", "bytes", "GiB", None),
        ("16 Gbit", "bytes", "GiB", None), ("5 GB", "time", "ms", None), ("e9", "number", "", None),
        ("--5", "number", "", None), ("Infinity", "number", "", None), ("$5", "bytes", "GiB", None),
    ],
)  # fmt: skip
def test_reading_a_number(rules, text, dimension, unit, want):
    got = rules.evaluate(
        "([t, d, u, units]) => window.effattn.practice.parseAnswer(t, d, u, units)",
        [text, dimension, unit, UNITS],
    )
    if want is None:
        assert len(got["error"]) > 15
    else:
        assert got["value"] == pytest.approx(want, rel=1e-12)


def test_judging_every_instance(rules):
    """Each answer is right, each slip is named as itself, mixed prefixes are noticed, and noise is neither."""
    judge = """([drill, units]) => drill.instances.map((instance) => {
        const of = (value, given = null) => window.effattn.practice.judge({ value, given }, drill, instance, units);
        const size = units[drill.dimension][drill.unit];
        return { right: [1, 1 + 0.9 * drill.tol, 1 - 0.9 * drill.tol].map((f) => of(instance.a * f).right),
            slips: instance.w.map(([index, value]) => [index, of(value)]),
            mixed: drill.mixed.map(([factor]) => of(instance.a * factor)),
            bare: drill.dimension === "bytes" ? of(instance.a * size, instance.a).say : "in B,",
            noise: of(instance.a * 1.37), minus: of(-instance.a),
            zero: of(0, 0), endless: of(Infinity, Infinity) }; })"""
    for drill in numeric.page_data(count=12):
        for instance, got in zip(drill["instances"], rules.evaluate(judge, [drill, UNITS])):
            assert got["right"] == [True] * 3
            for index, verdict in got["slips"]:
                assert (verdict["right"], verdict["slip"]) == (False, True)
                assert verdict["say"] == drill["says"][index].format(**instance["p"])
            assert all(not verdict["right"] and verdict["slip"] for verdict in got["mixed"])
            assert "in B," in got["bare"]
            assert got["minus"]["right"] is False
            assert got["noise"]["right"] is False
            assert got["zero"]["say"] == "Not that. It is more.", "nought has no digits to be right"
            assert got["endless"]["say"] == "Not that. It is less."


# ---- the page ----


class Trainer:
    """A reader without a mouse."""

    def __init__(self, browser: Any, local: str, *, size: dict[str, int] = WIDE, script: str = "") -> None:
        self.context = browser.new_context(
            viewport=size, color_scheme="light", reduced_motion="reduce", accept_downloads=True
        )
        if script:
            self.context.add_init_script(script)
        self.local = local
        self.open_tab()

    def open_tab(self) -> None:
        self.page = self.context.new_page()
        self.page.clock.set_fixed_time(START)
        self.watched = Watched(self.page, self.local)
        self.page.goto(self.local + PAGE, wait_until="load")
        self.page.wait_for_function("() => customElements.get('practice-trainer')")

    def press(self, *keys: str) -> Trainer:
        for key in keys:
            self.page.keyboard.press(key)
        return self

    def enter(self) -> Trainer:
        """Tab from the top of the page until the trainer has the focus."""
        for _ in range(80):
            if self.page.evaluate(TRAINER):
                return self
            self.press("Tab")
        raise AssertionError("Tab never reaches the trainer")

    def into_the_card(self) -> Trainer:
        self.enter()
        return self.press("/", *["Tab"] * 4, "Escape")

    def choose(self, **filters: str) -> Trainer:
        """Pick options of the filter by typing what they begin with."""
        self.enter().press("/")
        for name in ("topic", "level", "kind", "show"):
            if name in filters:
                self.press("Home")
                self.page.keyboard.type(filters[name])
            self.press("Tab")
        return self.press("Escape")

    @property
    def card(self) -> Any:
        return self.page.locator(".practice-card:visible")

    @property
    def id(self) -> str:
        return self.card.get_attribute("data-id")

    @property
    def counts(self) -> str:
        return self.page.locator(".practice-counts").inner_text()

    @property
    def said(self) -> str:
        return self.page.locator(".practice-status").inner_text()

    @property
    def focus(self) -> str:
        return self.page.evaluate(
            "() => document.activeElement.className || document.activeElement.localName"
        )

    def stored(self) -> list[dict[str, Any]]:
        texts = self.page.evaluate("""() => Object.keys(localStorage)
            .filter((key) => key.startsWith('effattn-practice/review/')).map((key) => localStorage[key])""")
        return sorted(
            (json.loads(text) for text in texts), key=lambda review: (review["reviewed_at"], review["id"])
        )

    def close(self, served: bool = True) -> None:
        # The theme preloads its icon font in a way that a page opened from a file may not.
        faults = [f for f in self.watched.faults if served or not re.search("font at 'file:|ERR_FAILED", f)]
        self.context.close()
        assert faults == []


@pytest.fixture
def trainer(browser, address):
    trainer = Trainer(browser, address)
    yield trainer
    trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["served", "file"])
def test_a_whole_session(browser, address, site, tmp_path, how):
    t = Trainer(browser, address if how == "served" else f"{site.as_uri()}/")
    everything = len(QUESTIONS) + len(DRILLS)
    assert t.counts == f"Card 1 of {everything}. 0 due, {everything} new, 0 later."

    # Filter.
    t.choose(topic="Cost model", level="junior", kind="Questions")
    wanted = ("foundations/cost_model", "junior", "question")
    chosen = [q for q in QUESTIONS if (q.topic, q.level, q.kind) == wanted]
    assert t.counts.startswith(f"Card 1 of {len(chosen)}.")
    assert t.id == chosen[0].id
    assert t.said == f"{len(chosen)} cards chosen."

    # Write, reveal, tick, take the proposal.
    t.press("j", "k")
    assert t.focus == "practice-card"
    assert t.card.locator(".practice-answer").is_hidden()
    t.press("3")
    assert t.said == "Show the answer first (Space)."
    t.press("w")
    t.page.keyboard.type("1 2 3 j k ? u / are letters here")
    assert t.id == chosen[0].id
    t.press("Control+Enter")
    assert t.focus == "practice-answer"
    assert t.card.locator("textarea").input_value() == "1 2 3 j k ? u / are letters here"
    assert t.card.locator(
        ".practice-answer mjx-container, .practice-answer .interview-strong"
    ).first.is_visible()
    assert "0 of" in t.card.locator(".practice-why").inner_text()
    assert t.card.locator(".practice-proposed").inner_text().startswith("1 Again")
    points = len(chosen[0].key_points)
    t.press("Enter", "Space")  # into the rubric; the first point has the focus
    t.press(*[str(i) for i in range(2, points + 1)])  # digits tick, and do not rate
    assert t.card.locator("input:checked").count() == points
    assert t.card.locator(".practice-proposed").inner_text().startswith("3 Good")
    t.press(str(points))
    assert t.card.locator(".practice-proposed").inner_text().startswith("2 Hard")
    t.press(str(points), "Enter", "Enter")  # to the proposal, and take it
    assert "Good. It comes back in 2 days" in t.said
    assert t.focus == "practice-card"
    assert t.id == chosen[1].id
    t.press("Space", "1")  # rated at once: Again
    reviews = t.stored()
    assert [(r["question"], r["rating"]) for r in reviews] in (
        [(chosen[0].id, 3), (chosen[1].id, 1)], [(chosen[1].id, 1), (chosen[0].id, 3)])  # fmt: skip
    good = next(r for r in reviews if r["rating"] == 3)
    assert good["points"] == [True] * points
    assert good["reviewed_at"] == "2026-11-28T10:00:00Z"
    Review.from_json(good)

    # A reload keeps it; tomorrow one is due, in three days both, the shakier first.
    t.page.reload()
    t.choose(topic="Cost model", level="junior", kind="Questions")
    assert f"0 due, {len(chosen) - 2} new, 2 later." in t.counts
    t.page.clock.set_fixed_time(START + timedelta(days=1))
    t.page.reload()
    t.choose(show="Due (")
    assert t.counts.startswith(f"Card 1 of 1. 1 due, {everything - 2} new, 1 later.")
    assert t.id == chosen[1].id
    t.page.clock.set_fixed_time(START + timedelta(days=3))
    t.page.reload()
    t.choose(show="Due (")
    assert t.counts.startswith("Card 1 of 2. 2 due")
    assert t.id == chosen[1].id

    # Export, forget, import; importing twice adds nothing.
    with t.page.expect_download() as download:
        t.page.locator("[data-do=export]").press("Enter")
    assert download.value.suggested_filename == "effattn-practice-2026-12-01.json"
    path = tmp_path / "progress.json"
    download.value.save_as(path)
    assert [r.to_json() for r in import_reviews(path)] == reviews
    t.page.locator("[data-do=forget]").press("Enter")
    assert t.page.locator("dialog.practice-confirm").is_visible()
    assert "2 reviews will be deleted" in t.page.locator("dialog.practice-confirm").inner_text()
    t.press("Enter")  # "Keep it" has the focus
    assert t.stored() == reviews
    t.page.locator("[data-do=forget]").press("Enter")
    t.page.locator("[data-do=really-forget]").press("Enter")
    assert t.stored() == []
    assert f"{everything} new" in t.counts or "0 due" in t.counts
    for said in ("2 reviews added, 0 known already.", "0 reviews added, 2 known already."):
        with t.page.expect_file_chooser() as chooser:
            t.page.locator("[data-do=import]").press("Enter")
        chooser.value.set_files(path)
        t.page.wait_for_function(
            "(s) => document.querySelector('.practice-status').textContent === s", arg=said
        )
    assert t.stored() == reviews
    t.close(served=how == "served")


@pytest.mark.slow
def test_a_numeric_drill(trainer):
    t = trainer
    t.choose(topic="Cost model", kind="Numbers")
    drill = next(d for d in numeric.page_data() if d["id"] == t.id)
    assert drill["id"] == "numeric/kv-cache"

    def instance():
        return drill["instances"][int(t.card.get_attribute("data-instance"))]

    def answer(text):
        t.card.locator("input[type=text]").focus()
        t.press("Control+A")
        t.page.keyboard.type(text)
        t.press("Enter")
        return t.card.locator(".practice-feedback").inner_text()

    t.press("j", "k", "Enter")
    assert t.focus == "input"
    assert "is not a number I can read" in answer("forty-two")
    assert t.card.locator("input").get_attribute("aria-invalid") == "true"
    assert "bits" in answer("16 Gbit")
    gib = instance()["a"] / 2**30
    assert "Half of it. There are two tensors" in answer(f"{gib / 2:.6g}")
    assert t.card.locator("input").get_attribute("aria-invalid") is None
    assert "Right digits, wrong prefix: it is that many GB" in answer(f"{gib * 1.0737418:.6g} GiB")
    assert "Right digits, wrong prefix: it is that many GiB" in answer(f"{gib:.6g} GB")
    assert "Not that. It is less." in answer(f"{gib * 1.37:.6g}")
    assert t.card.locator(".practice-answer").is_hidden()
    answer(f"{gib:.6g} GiB")
    assert t.focus == "practice-answer"
    assert instance()["s"] in t.card.locator(".practice-worked").inner_text()
    assert t.card.locator(".interview-formula mjx-container").count() == 1
    assert t.card.locator(".practice-proposed").inner_text().startswith("2 Hard"), "right, but not at once"

    # Fresh numbers: another instance, right at once.
    before = instance()
    t.press("r")
    assert instance() != before
    assert t.card.locator(".practice-answer").is_hidden()
    answer(f"{instance()['a']:.6e} B")
    assert t.card.locator(".practice-proposed").inner_text().startswith("3 Good")
    t.press("Enter", "Enter")
    (review,) = t.stored()
    assert (review["question"], review["rating"], review["points"]) == ("numeric/kv-cache", 3, [])
    assert t.id != "numeric/kv-cache"
    t.press("Space")
    assert t.card.locator(".practice-proposed").inner_text().startswith("1 Again"), "shown without an answer"


@pytest.mark.slow
def test_tab_leads_to_the_card_and_space_shows_the_answer(trainer):
    t = trainer.enter()
    t.press(*["Tab"] * 4)
    assert t.focus == "practice-card"
    t.press("Space")
    assert t.focus == "practice-answer"


@pytest.mark.slow
def test_keys_help_undo_and_the_end(trainer):
    t = trainer
    t.choose(topic="FlashAttention", level="staff", kind="Questions")
    t.press("?")
    assert t.page.locator("dialog.practice-help").is_visible()
    for key in ("Space", "1 2 3 4", "t", "w", "r", "j or n", "k or p", "u", "/", "?"):
        assert key in t.page.locator("dialog.practice-help").inner_text()
    t.press("j", "Escape")
    assert t.page.locator("dialog.practice-help").is_hidden()
    first, total = t.id, int(re.search(r"of (\d+)", t.counts)[1])
    t.press("n")
    assert (t.id != first) == (total > 1)
    t.press("p")
    assert t.id == first
    t.press("Space", "t", "2")
    assert t.card.locator("input:checked").count() == 1  # in the rubric, a digit ticks
    assert t.stored() == []
    t.press("Enter", "Enter")  # Again is proposed
    assert t.stored()[0]["points"][:2] == [False, True]
    t.press("u")
    assert t.stored() == []
    assert t.id == first
    assert t.said == "The last rating is taken back."
    for _ in range(total):
        t.press("Space", "1")
    assert t.focus == "practice-end"
    end = t.page.locator(".practice-end").inner_text()
    assert f"{total} card" in end
    assert f"{total} of them Again or Hard" in end
    assert "due tomorrow (29 Nov)" in end
    assert t.page.locator(".practice-end li a").count() >= 1
    t.press("k")
    assert t.card.count() == 1


@pytest.mark.slow
def test_two_tabs_lose_nothing(trainer):
    t = trainer
    one = t.page
    t.into_the_card().press("j")
    t.open_tab()
    two = t.page
    t.into_the_card().press("j", "Space", "3")
    one.wait_for_function("() => / 1 later/.test(document.querySelector('.practice-counts').textContent)")
    t.page = one
    one.bring_to_front()
    t.press("k", "Space", "4")  # saves beside the other tab's review
    assert sorted(r["rating"] for r in t.stored()) == [3, 4]
    # The second card was rated in the other tab; it is not asked again.
    assert t.counts.startswith("Card 3 of")
    two.wait_for_function("() => / 2 later/.test(document.querySelector('.practice-counts').textContent)")
    two.bring_to_front()
    t.page = two
    two.locator("[data-do=forget]").press("Enter")
    two.locator("[data-do=really-forget]").press("Enter")
    one.wait_for_function("() => / 0 later/.test(document.querySelector('.practice-counts').textContent)")
    t.page = one
    one.bring_to_front()
    t.press("Space", "2")
    assert [r["rating"] for r in t.stored()] == [2], "what one tab forgot does not come back from the other"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "says"),
    [
        ("Object.defineProperty(window, 'localStorage', "
         "{ get() { throw new DOMException('no', 'SecurityError'); } });",
         "This browser lets the page store nothing."),
        ("const set = Storage.prototype.setItem; Storage.prototype.setItem = function (key, value) { "
         "if (key.startsWith('effattn')) throw new DOMException('full', 'QuotaExceededError'); "
         "set.call(this, key, value); };",
         "The browser's storage is full. 1 review could not be stored"),
    ],
    ids=["unavailable", "full"],
)  # fmt: skip
def test_without_room_it_says_so_and_goes_on(browser, address, tmp_path, without, says):
    t = Trainer(browser, address, script=without)
    t.into_the_card().press("j", "k", "Space", "3")
    alarm = t.page.locator(".practice-alarm")
    assert says in alarm.inner_text()
    assert "export" in alarm.inner_text()
    assert "1 later" in t.counts
    with t.page.expect_download() as download:
        t.page.locator("[data-do=export]").press("Enter")
    download.value.save_as(tmp_path / "kept.json")
    assert [r.rating for r in import_reviews(tmp_path / "kept.json")] == [3]
    # The theme itself stumbles over a storage that throws.
    t.watched.faults = [fault for fault in t.watched.faults if not re.search("error: no$|theme mode", fault)]
    t.close()


@pytest.mark.slow
def test_bad_import_changes_nothing_and_strange_entries_stay(trainer, tmp_path):
    t = trainer
    t.page.evaluate(
        "() => { localStorage['effattn-practice/review/x'] = '{'; localStorage.theirs = 'kept'; }"
    )
    t.page.reload()
    t.into_the_card()
    assert (
        "1 stored entry cannot be read and is left alone." in t.page.locator(".practice-alarm").inner_text()
    )

    def give(text):
        (tmp_path / "given.json").write_text(text)
        with t.page.expect_file_chooser() as chooser:
            t.page.locator("[data-do=import]").press("Enter")
        chooser.value.set_files(tmp_path / "given.json")
        t.page.wait_for_function(
            "() => /added|imported/.test(document.querySelector('.practice-status').textContent)"
        )
        said = t.said
        t.page.evaluate("() => { document.querySelector('.practice-status').textContent = ''; }")
        return said

    before = t.page.evaluate("() => JSON.stringify(localStorage)")
    for content, says in (BAD_FILES[0], BAD_FILES[4], BAD_FILES[11]):
        said = give(as_text(content))
        assert says in said
        assert said.endswith("Nothing was imported.")
        assert t.page.evaluate("() => JSON.stringify(localStorage)") == before
    # A question that the bank no longer has is kept, and comes out again.
    gone = {**ONE, "question": "gone/for/good"}
    assert give(as_text(gone).replace(json.dumps(ONE) + ", ", "")) == "1 review added, 0 known already."
    with t.page.expect_download() as download:
        t.page.locator("[data-do=export]").press("Enter")
    assert [r.question for r in import_reviews(download.value.path())] == ["gone/for/good"]
    # No room for all of a file: none of it stays.
    t.page.evaluate("""() => {
        const set = Storage.prototype.setItem;
        let left = 2;
        Storage.prototype.setItem = function (key, value) {
            if (left-- <= 0) throw new DOMException('full', 'QuotaExceededError');
            set.call(this, key, value);
        };
    }""")
    before = t.page.evaluate("() => JSON.stringify(localStorage)")
    many = [Review.new("q", 3, START, [], 1).to_json() for _ in range(5)]
    said = give(json.dumps({"format": "effattn-practice", "version": 1, "reviews": many}))
    assert "no room for these reviews. Nothing was imported." in said
    assert json.loads(t.page.evaluate("() => JSON.stringify(localStorage)")) == json.loads(before)
    t.page.locator("[data-do=forget]").press("Enter")
    t.page.locator("[data-do=really-forget]").press("Enter")
    assert t.page.evaluate("() => Object.keys(localStorage).filter((k) => /effattn|theirs/.test(k))") == [
        "theirs"
    ]


def faults(page: Any) -> list[str]:
    """Serious and critical violations that axe-core finds in the trainer; `test_browser` looks at the whole page."""
    from axe_playwright_python.sync_playwright import Axe

    # Of some 60 cards one is shown; without the others axe is five times as fast.
    page.evaluate("""() => { window.aside = [...document.querySelectorAll('.practice-card[hidden]')].map((card) => {
        const mark = document.createComment(''); card.replaceWith(mark); return [mark, card]; }); }""")
    context = {"include": [["practice-trainer"]], "exclude": [["mjx-container"]]}
    found = (
        Axe().run(page, context=context, options={"preload": False, "resultTypes": ["violations"]}).response
    )
    page.evaluate("() => window.aside.forEach(([mark, card]) => mark.replaceWith(card))")
    return [
        f"{v['id']}: {n['html'][:160]}"
        for v in found["violations"]
        if v["impact"] in GRAVE
        for n in v["nodes"][:4]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_no_serious_fault_and_room_for_a_thumb(browser, address, size):
    t = Trainer(browser, address, size=size)
    page = t.page

    def look(what):
        for mode in (
            ("light", "dark") if size is WIDE and what in ("answer", "number", "confirm") else ("light",)
        ):
            show(page, mode)
            assert faults(page) == [], f"{what}, {mode}"
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"] + 1, what
        small = page.evaluate("""() => [...document.querySelectorAll('practice-trainer :is(button, select, textarea, '
            + 'input[type=text], summary, .practice-rubric label)')].filter((e) => e.checkVisibility())
            .filter((e) => e.getBoundingClientRect().height < 40).map((e) => e.outerHTML.slice(0, 80))""")
        assert small == [], what

    t.into_the_card().press("j", "k", "Space", "t", "1")
    look("answer")
    t.press("Enter")
    assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
    t.choose(kind="Numbers")
    t.card.locator("input").focus()
    t.press("7", "Enter")
    look("number")
    t.card.locator("[data-do=show]").press("Enter")
    look("working")
    t.press("?")
    look("help")
    t.press("Escape")
    page.locator("[data-do=forget]").press("Enter")
    look("confirm")
    t.press("Escape")
    t.close()


@pytest.mark.slow
def test_without_javascript_the_page_leads_to_the_bank(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address + PAGE)
    assert "The trainer needs JavaScript" in page.locator("practice-trainer").inner_text()
    assert page.locator(".practice-card:visible").count() == 0
    assert (
        page.locator("practice-trainer noscript a").get_attribute("href") == "interview.html#interview-bank"
    )
    context.close()


@pytest.mark.slow
def test_every_question_is_in_the_page_as_the_bank_has_it(site):
    html = (site / PAGE).read_text(encoding="utf-8")
    ids = re.findall(r'data-id="([^"]+)"', html)
    assert sorted(ids) == sorted([q.id for q in QUESTIONS] + [f"numeric/{d.id}" for d in DRILLS])
    assert html.count('class="practice-rubric"') == len(QUESTIONS)
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.S)[1])
    assert data["fsrs"] == MODEL
    assert data["units"] == UNITS
    assert data["drills"] == json.loads(json.dumps(numeric.page_data()))
