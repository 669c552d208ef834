import pytest

from effattn_lab.tasks.text import passages_once, stdlib_source, topics


def test_topics_is_english_and_long():
    text = topics()
    assert len(text) > 400_000
    assert "The assert statement" in text or '"assert"' in text
    assert topics(1000) == text[:1000]


def test_passages_once():
    text = "a b\n\nc\n\na\nb\n\nd\n\nc"
    assert passages_once(text) == "a b\n\nc\n\nd", "the same words, however the lines break"
    assert passages_once(passages_once(text)) == passages_once(text)
    whole, once = topics(), passages_once(topics())
    assert 0.6 < len(once) / len(whole) < 0.95
    assert {" ".join(p.split()) for p in once.split("\n\n")} == {
        " ".join(p.split()) for p in whole.split("\n\n")
    }


def test_source_is_code():
    assert "class ArgumentParser" in stdlib_source("argparse")


@pytest.mark.parametrize("module", ["no_such_module", "sys"])
def test_source_that_is_not_there(module):
    with pytest.raises(ValueError, match=f"module: expected .* got '{module}'"):
        stdlib_source(module)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_max_chars(value):
    with pytest.raises(ValueError, match="max_chars"):
        topics(value)
