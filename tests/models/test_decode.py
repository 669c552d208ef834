"""Caches inside the real model: a budget for all gives the model's own numbers, a small one loses what it must."""

from __future__ import annotations

import math

import pytest
import torch

from effattn_lab.models import smollm2
from effattn_lab.models.decode import Decoder, loss_after, read_prompt, rope_base, steps_together
from effattn_lab.sparse.adamas import AdamasCache
from effattn_lab.sparse.cache import FullCache
from effattn_lab.sparse.eviction import H2OCache, SnapKVCache
from effattn_lab.sparse.quest import OracleCache, QuestCache
from effattn_lab.sparse.streaming import StreamingCache
from effattn_lab.tasks.text import topics


@pytest.fixture(scope="module")
def lm():
    return smollm2.load()


@pytest.fixture(scope="module")
def ids(lm):
    return lm.ids(topics(4000), 60)


def makers(lm):
    base = rope_base(lm.model)
    return {
        "full": FullCache,
        "streaming": lambda: StreamingCache(rope_base=base),
        "oracle": OracleCache,
        "quest": QuestCache,
        "adamas": lambda: AdamasCache(thresholds=(-5, 0, 5)),
        "h2o": H2OCache,
        "snapkv": lambda: SnapKVCache(8),
    }


@pytest.fixture(scope="module")
def plain(lm, ids):
    """The model's own logits, and its loss on the tokens after a prompt of 40."""
    with torch.no_grad():
        logits = lm.model(ids, use_cache=False).logits[0]
    return logits, torch.nn.functional.cross_entropy(logits[40:-1], ids[0, 41:]).item()


def unequal(model):
    decoders = [Decoder(model, FullCache) for _ in range(2)]
    for n, decoder in zip((2, 3), decoders):
        decoder.start(read_prompt(model, torch.ones(1, n).long()))
    steps_together(decoders, torch.ones(2, 1).long())


def test_base(lm):
    assert rope_base(lm.model) == 100_000


@pytest.mark.parametrize("name", ["full", "streaming", "oracle", "quest", "adamas", "h2o", "snapkv"])
def test_a_budget_for_all_is_the_model_itself(lm, ids, plain, name):
    logits, _ = plain
    decoder = Decoder(lm.model, makers(lm)[name], 60)
    torch.testing.assert_close(decoder.prefill(ids[:, :57]), logits[:57], rtol=0, atol=2e-3)
    for t in (57, 58, 59):
        torch.testing.assert_close(decoder.step(ids[:, t : t + 1]), logits[t], rtol=0, atol=2e-3)
        assert decoder.read() == t + 1
    assert len(decoder.caches) == 30
    before = lm.model.config._attn_implementation
    assert before == "sdpa", "the model is as it was"


@pytest.mark.parametrize("name", ["streaming", "quest", "adamas", "h2o", "oracle"])
def test_a_small_budget_is_kept_and_costs(lm, ids, plain, name):
    decoder = Decoder(lm.model, makers(lm)[name], 16, dense_layers=2)
    got = loss_after(decoder, ids[:, :50], 40)
    assert got.tokens == 9
    assert got.read <= 16
    assert math.isfinite(got.perplexity)
    assert abs(got.nats - plain[1]) > 1e-4, "it is not full attention any more"
    assert decoder.caches[0].read == 49, "dense layers read all"


def test_loss_of_everything_is_the_models(lm, ids, plain):
    got = loss_after(Decoder(lm.model, FullCache), ids, 40)
    assert got.nats == pytest.approx(plain[1], abs=1e-3)
    assert got.perplexity == pytest.approx(math.exp(plain[1]), rel=1e-3)


def test_generation_is_the_models_own(lm):
    prompt = "The capital of France is"
    new = Decoder(lm.model, FullCache).generate(lm.ids(prompt), 8)
    assert lm.tokenizer.decode(new) == lm.generate(prompt, 8)


@pytest.mark.parametrize("name", ["full", "streaming", "oracle", "quest", "adamas", "h2o", "snapkv"])
def test_many_tokens_in_one_pass_are_the_same_as_one_by_one(lm, ids, name):
    """A small budget, so that what was dropped or read before matters for what comes."""
    one, many = (Decoder(lm.model, makers(lm)[name], 16, dense_layers=1) for _ in range(2))
    prompt = read_prompt(lm.model, ids[:, :40])
    one.start(prompt)
    many.start(prompt)
    want, read = [], []
    for t in range(40, 46):
        want.append(one.step(ids[:, t : t + 1]))
        read.append(one.read())
    torch.testing.assert_close(many.steps(ids[:, 40:46]), torch.stack(want), rtol=0, atol=2e-3)
    assert many.read() == pytest.approx(sum(read) / len(read))
    assert many.length == one.length == 46


def test_a_prompt_is_read_once_for_all(lm, ids, plain):
    logits, _ = plain
    prompt = read_prompt(lm.model, ids, all_logits=True)
    assert prompt.length == 60
    torch.testing.assert_close(prompt.logits, logits, rtol=0, atol=2e-3)
    assert read_prompt(lm.model, ids[:, :20]).logits.shape == (1, logits.shape[1])
    short = prompt.first(50)
    for part, own in zip(short.layers, read_prompt(lm.model, ids[:, :50]).layers):
        for got, want in zip(part, own):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    assert len(short.logits) == 50
    assert len(read_prompt(lm.model, ids[:, :20]).first(10).logits) == 0, "its logits were not kept"


def test_decoders_together_and_forks(lm, ids):
    """Each row is what that decoder gives alone, and a fork leaves its origin as it was."""
    make = makers(lm)
    prompt = read_prompt(lm.model, ids[:, :40])
    whole = Decoder(lm.model, make["h2o"])
    whole.start(prompt)
    forks = [whole.fork(budget) for budget in (12, 24)]
    other = Decoder(lm.model, make["adamas"], 12)
    other.start(prompt)
    tokens = torch.stack([ids[0, 40:43], ids[0, 10:13], ids[0, 40:43]])
    got = steps_together([*forks, other], tokens)
    assert [d.read() for d in forks] == [12, 24]
    for budget, row, want in zip((12, 24), tokens, got):
        alone = whole.fork(budget)
        torch.testing.assert_close(alone.steps(row[None]), want, rtol=0, atol=2e-3)
    assert whole.length == 40
    assert {cache.kept for cache in whole.caches} == {40}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: Decoder(m, FullCache, 0), "budget: expected an integer of at least 1, got 0"),
        (lambda m: Decoder(m, FullCache, dense_layers=31), "dense_layers: expected an integer from 0 to 30, got 31"),
        (lambda m: Decoder(m, FullCache).step(torch.tensor([[1]])), "step: expected a prompt read by prefill"),
        (lambda m: Decoder(m, FullCache).prefill(torch.tensor([1, 2])), "ids: expected one text .1, N."),
        (lambda m: loss_after(Decoder(m, FullCache), torch.ones(1, 5).long(), 4), "prompt: expected at most N - 2"),
        (lambda m: steps_together([], torch.tensor([[1]])), "decoders: expected at least one, got none"),
        (lambda m: read_prompt(m, torch.ones(2, 3).long()), "ids: expected one text .1, N., got shape .2, 3."),
        (lambda m: read_prompt(m, torch.ones(1, 3).long()).first(4), "n: expected at most the 3 tokens"),
        (lambda m: unequal(m), "decoders: expected one model and one length, got lengths .2, 3."),
    ],
)  # fmt: skip
def test_bad_input_is_named(lm, call, words):
    with pytest.raises(ValueError, match=words):
        call(lm.model)
