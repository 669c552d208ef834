import pytest

from effattn_lab.tasks.text import stdlib_source, topics


def test_topics_is_english_and_long():
    text = topics()
    assert len(text) > 400_000
    assert "The assert statement" in text or '"assert"' in text
    assert topics(1000) == text[:1000]


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
