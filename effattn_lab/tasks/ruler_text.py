"""What RULER's tasks are filled with, made here: sentences and paragraphs of Python's reference, words, class notes.

RULER takes essays, SQuAD, HotpotQA and a word package. All that is local: essays are the prose of
:func:`effattn_lab.tasks.text.topics`, documents its paragraphs and the notes of the interpreter's own classes.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import lru_cache
from typing import NamedTuple

from effattn_lab.tasks.text import topics

_ADJECTIVES = """
able bitter bold brave brief bright broad calm careful cheap clean clever cold common cosy crisp curious dark deep
dense distant dry dull eager early easy empty even faint fair famous fancy fast fierce fine firm flat fond free fresh
full gentle giant glad golden grand grave great green grey happy hard heavy high hollow honest huge humble icy ideal
jolly keen kind large late lazy light little lively lonely long loose loud low lucky mellow
"""
_NOUNS = """
acorn anchor apple arrow atlas badge baker barn basket beacon bell bench bicycle blanket boat bottle branch brick
bridge broom bucket button cabin camel candle canoe carpet castle chair cherry circle clock cloud coat compass copper
corner cotton cradle curtain dancer desk diary dolphin drum eagle engine falcon farmer feather fence fiddle flower
forest fountain garden glove guitar hammer harbour hotel island jacket jungle kettle ladder lantern lemon lion mirror
mountain needle notebook orchard oyster painter
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
#: One short run of trivial sentences, repeated: the dullest haystack.
NOISE = (
    "The river is wide.",
    "The hill is steep.",
    "The moon is pale.",
    "Off we walk.",
    "Up and down once more.",
)

_DESCRIBED = """
builtins argparse asyncio collections configparser csv decimal email.errors http.client http.server io json logging
logging.handlers queue smtplib socketserver ssl subprocess tarfile threading unittest urllib.error urllib.request
zipfile
"""
#: Modules whose classes are described.
_MODULES = tuple(_DESCRIBED.split())


@lru_cache
def paragraphs() -> tuple[str, ...]:
    """Prose paragraphs of Python's reference, in its order, each once; lists, tables and code are left out."""
    found: dict[str, None] = {}
    for block in topics().split("\n\n"):
        text = re.sub(r"\s+", " ", block).strip()
        prose = len(text.split()) >= 8 and text[0].isupper() and text[-1] == "."
        if prose and ">>>" not in text and "::=" not in text:
            found[text] = None
    return tuple(found)


@lru_cache
def sentences() -> tuple[str, ...]:
    """The sentences of :func:`paragraphs`, in order: the essays."""
    return tuple(s for p in paragraphs() for s in re.split(r"(?<=[.?!])\s+(?=[A-Z])", p))


@lru_cache
def plain_words() -> tuple[str, ...]:
    """The lowercase words of the reference's prose, 4 to 10 letters, in alphabetical order."""
    return tuple(sorted(set(re.findall(r"(?<![\w.*\"])[a-z]{4,10}(?![\w(=.\"*])", " ".join(paragraphs())))))


def words(count: int) -> tuple[str, ...]:
    """At least ``count`` distinct words, if there are so many: the plain ones; for more, adjective-noun pairs too."""
    plain = plain_words()
    return plain if count <= len(plain) else (*plain, *(f"{a}-{n}" for a in ADJECTIVES for n in NOUNS))


class ClassNote(NamedTuple):
    """A class of the interpreter: its qualified name, the first sentence of its documentation, its base's name."""

    name: str
    says: str
    base: str

    def text(self) -> str:
        return f"{self.name} is a class. Its documentation says: {self.says} It derives from {self.base}."


@lru_cache
def class_notes() -> dict[str, ClassNote]:
    """Notes of the documented classes of some modules, by qualified name, in the order of their names."""
    found = {}
    for module in _MODULES:
        for name, item in inspect.getmembers(importlib.import_module(module), inspect.isclass):
            own = inspect.getdoc(item) if item.__doc__ else None
            base = item.__base__
            if (
                own is None
                or base is None
                or name.startswith("_")
                or item.__module__.split(".")[0] != module.split(".")[0]
            ):
                continue
            says = re.sub(r"\s+", " ", re.split(r"\n\s*\n", own)[0]).strip()
            if len(says.split()) >= 3 and len(says) <= 200:
                note = ClassNote(qualified(item), says if says.endswith(".") else says + ".", qualified(base))
                found[note.name] = note
    return dict(sorted(found.items()))


def qualified(item: type) -> str:
    """``module.Name``, for built-in classes the name alone."""
    return item.__name__ if item.__module__ == "builtins" else f"{item.__module__}.{item.__qualname__}"
