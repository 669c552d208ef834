"""The loop with a KV cache: the same greedy text whatever the draft, the target's distribution when sampling."""

from __future__ import annotations

import pytest
import torch

from effattn_lab.linear import speculative as spec
from effattn_lab.linear import speculative_decode as decode
from effattn_lab.linear import speculative_drafts as drafts
from effattn_lab.linear import speculative_proof as proof
from effattn_lab.linear import speculative_smollm2 as experiment
from effattn_lab.linear import speculative_tree as tree
from effattn_lab.linear.speculative_cache import CachedModel
from effattn_lab.models import smollm2
from effattn_lab.tasks.text import topics

transformers = pytest.importorskip("transformers")
VOCAB = 40
HOT = 6.0  # the random Llama is sure of itself; this leaves every pair of tokens a few per cent


def tiny(vocab: int = VOCAB, layers: int = 3, seed: int = 0):
    """A random Llama: the loop doesn't care what the model knows."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.4,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


PROMPT = [3, 17, 5, 9, 3, 17, 21]


@torch.no_grad()
def plain_greedy(model, prompt, count):
    """No cache, no drafts."""
    known = list(prompt)
    for _ in range(count):
        known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(prompt) :]


# ---- the cached model --------------------------------------------------------------------------------------


def test_cached_logits_are_those_of_the_whole(model):
    text = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(text[None]).logits[0]
    lm = CachedModel(model)
    got = torch.cat([lm.logits(part) for part in (text[:7], text[7:8], text[8:])])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert lm.length == 20
    lm.keep(9)
    again = lm.logits(text[9:])
    torch.testing.assert_close(again, want[9:], rtol=1e-5, atol=1e-5)


def test_a_part_of_the_layers_leaves_the_model_as_it_was(model):
    layers, norm = model.model.layers, model.model.norm
    early = CachedModel(model, 2)
    hidden = early.hidden(torch.tensor(PROMPT))
    assert model.model.layers is layers
    assert model.model.norm is norm
    assert model.config.num_hidden_layers == 3
    with torch.no_grad():
        states = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden, states[2][0], rtol=1e-5, atol=1e-5)
    assert len(early.cache.layers) == 2


def test_tree_logits_are_those_of_each_path(model):
    parents = torch.tensor([-1, 0, 0, 1, 1, 3, 2])
    tokens = torch.tensor([4, 8, 15, 16, 23, 12, 8])
    lm = CachedModel(model)
    lm.hidden(torch.tensor(PROMPT))
    got = lm.logits(tokens, parents)
    for n in range(7):
        sequence = [*PROMPT, *(int(tokens[m]) for m in tree.path(parents, n))]
        with torch.no_grad():
            want = model(torch.tensor([sequence])).logits[0, -1]
        torch.testing.assert_close(got[n], want, rtol=1e-4, atol=1e-5)
    chosen = tree.path(parents, 5)
    lm.keep([*range(len(PROMPT)), *(len(PROMPT) + n for n in chosen)])
    sequence = [*PROMPT, *(int(tokens[n]) for n in chosen), 30]
    with torch.no_grad():
        want = model(torch.tensor([sequence])).logits[0, -1]
    torch.testing.assert_close(lm.logits(torch.tensor([30]))[0], want, rtol=1e-4, atol=1e-5)


# ---- greedy ------------------------------------------------------------------------------------------------


class Junk:
    """Random guesses."""

    name = "junk"

    def propose(self, tokens, gamma, temperature=0.0, generator=None):
        g = torch.Generator().manual_seed(sum(tokens))
        return drafts.Proposal(torch.randint(0, VOCAB, (gamma,), generator=g).tolist())


class Oracle:
    """Knows the text."""

    name = "oracle"

    def __init__(self, text):
        self.text = list(text)

    def propose(self, tokens, gamma, temperature=0.0, generator=None):
        return drafts.Proposal(self.text[len(tokens) : len(tokens) + gamma])


@pytest.mark.parametrize("gamma", [0, 1, 2, 5])
def test_greedy_text_does_not_depend_on_the_draft(model, gamma):
    want = plain_greedy(model, PROMPT, 40)
    whole = [*PROMPT, *want, *([0] * 8)]
    text = torch.randint(0, VOCAB, (500,), generator=torch.Generator().manual_seed(2)).tolist() + want * 3
    made = {
        "junk": Junk(),
        "oracle": Oracle(whole),
        "lookup": drafts.PromptLookup(),
        "ngram": drafts.NGram(text, vocab_size=VOCAB),
        "exit": drafts.EarlyExit(model, 2),
        "small exit": drafts.EarlyExit(model, 1, vocab=torch.arange(0, VOCAB, 2)),
    }
    for draft in made.values():
        got = decode.speculate(model, draft, PROMPT, 40, gamma)
        assert got.tokens == want, draft.name
        assert 1 <= got.tokens_per_pass <= gamma + 1
        assert all(0 <= accepted <= n <= gamma for n, accepted in got.rounds)
    perfect = decode.speculate(model, made["oracle"], PROMPT, 40, gamma)
    assert len(perfect.rounds) == -(-40 // (gamma + 1))


@pytest.mark.parametrize("prompt", [[5], PROMPT])
def test_greedy_trees_too(model, prompt):
    want = plain_greedy(model, prompt, 30)
    text = torch.randint(0, VOCAB, (300,), generator=torch.Generator().manual_seed(3)).tolist() + want * 2
    ngram = drafts.NGram(text, vocab_size=VOCAB)
    got = decode.speculate_tree(model, lambda known: ngram.tree(known, (3, 2)), prompt, 30)
    assert got.tokens == want
    chain = decode.speculate_tree(model, lambda known: ngram.tree(known, (1, 1)), prompt, 30)
    assert chain.tokens == want
    assert chain.rounds == decode.speculate(model, ngram, prompt, 30, 2).rounds
    assert got.tokens_per_pass >= chain.tokens_per_pass


def test_replay_counts_what_a_live_run_does(model):
    want = plain_greedy(model, PROMPT, 40)
    for draft in (drafts.PromptLookup(), Junk(), drafts.NGram(want * 2 + PROMPT, vocab_size=VOCAB)):
        live = decode.speculate(model, draft, PROMPT, 40, 3)
        copied = decode.replay(draft, PROMPT, want, 3)
        assert copied.rounds == live.rounds[: len(copied.rounds)]
        assert copied.tokens == want[: len(copied.tokens)]
        assert len(live.rounds) - len(copied.rounds) <= 3


def test_the_real_model_writes_the_same_text():
    """SmolLM2 with each draft against transformers' own generate; and the tree."""
    lm = smollm2.load()
    ids = lm.ids(topics(40_000))[0]
    prompt = ids[2000:2100].tolist()
    with torch.no_grad():
        want = lm.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, 100, dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )[0, 100:].tolist()
    vocab = lm.model.config.vocab_size
    ngram = drafts.NGram(ids[2100:].tolist(), vocab_size=vocab)
    for draft in (drafts.PromptLookup(), drafts.EarlyExit(lm.model, 2)):
        assert decode.speculate(lm.model, draft, prompt, 12, 4).tokens == want, draft.name
    assert decode.speculate_tree(lm.model, lambda known: ngram.tree(known, (3, 2)), prompt, 12).tokens == want


# ---- sampled -----------------------------------------------------------------------------------------------


class Random:
    """Draws from fixed distributions of its own."""

    name = "random"

    def __init__(self, table):
        self.table = table

    def propose(self, tokens, gamma, temperature=0.0, generator=None):
        known, rows = list(tokens), []
        for _ in range(gamma):
            rows.append(self.table[known[-1]])
            known.append(int(torch.multinomial(rows[-1], 1, generator=generator)))
        return drafts.Proposal(known[len(tokens) :], torch.stack(rows))


@torch.no_grad()
def joint_of(model, prompt, vocab, temperature):
    first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, -1)
    second = torch.softmax(
        model(torch.tensor([[*prompt, x] for x in range(vocab)])).logits[:, -1].double() / temperature, -1
    )
    return (first.double()[:, None] * second).flatten()


@pytest.mark.parametrize("kind", ["random", "fixed", "tree"])
def test_sampled_tokens_have_the_models_distribution(kind):
    """Two tokens of a random Llama over four words, 600 runs through cache, draft and judgement."""
    small = tiny(vocab=4, layers=1, seed=5)
    prompt, runs = [1, 3], 600
    joint = joint_of(small, prompt, 4, HOT)
    table = torch.softmax(torch.randn(4, 4, generator=torch.Generator().manual_seed(6)), -1)
    fixed = drafts.NGram([0, 1, 2, 3, 1, 1, 3, 2, 0, 2], vocab_size=4)
    g = torch.Generator().manual_seed(7)
    counts = torch.zeros(16)
    for _ in range(runs):
        if kind == "tree":
            run = decode.speculate_tree(
                small, lambda known: fixed.tree(known, (2, 1)), prompt, 2, temperature=HOT, generator=g
            )
        else:
            draft = Random(table) if kind == "random" else Oracle([*prompt, 2, 0, 1])
            run = decode.speculate(small, draft, prompt, 2, 2, temperature=HOT, generator=g)
        counts[4 * run.tokens[0] + run.tokens[1]] += 1
    assert proof.chi_square(counts, joint).p_value > 1e-3
    # what accepting everything would give is found out at this size
    eager = (table[3][:, None] * table).flatten().double()
    assert proof.power(joint, eager, runs) > 0.999


def test_transformers_judges_alike(monkeypatch):
    """`_speculative_sampling` of transformers with our random numbers in the place of its own."""
    from transformers.generation.utils import _speculative_sampling

    g = torch.Generator().manual_seed(8)
    for _ in range(200):
        gamma, vocab = 4, 12
        target = torch.randn(1, gamma + 1, vocab, generator=g, dtype=torch.float64)
        cheap = target[:, :gamma] + torch.randn(1, gamma, vocab, generator=g, dtype=torch.float64)
        p, q = torch.softmax(target, -1), torch.softmax(cheap, -1)
        u = torch.rand(2 * gamma + 1, generator=g, dtype=torch.float64)
        guesses = spec.sample(q[0], u[:gamma])[None]
        tokens, accepted = spec.verify(p, q, guesses, u[None, gamma:-1], u[-1:])
        monkeypatch.setattr(torch, "rand_like", lambda x, u=u, n=gamma: u[n:-1].view_as(x))
        monkeypatch.setattr(torch, "multinomial", lambda w, num_samples, u=u: spec.sample(w, u[-1:])[:, None])
        theirs, matches = _speculative_sampling(guesses, cheap, gamma, target)
        monkeypatch.undo()
        assert int(matches) == int(accepted)
        assert theirs[0].tolist() == tokens[0, : int(accepted) + 1].tolist()


# ---- drafts ------------------------------------------------------------------------------------------------


def test_prompt_lookup_takes_the_longest_and_latest_match():
    lookup = drafts.PromptLookup(2)
    assert lookup.propose([1, 2, 3, 1, 2, 4, 1, 2], 3).tokens == [4, 1, 2]
    assert lookup.propose([7, 2, 3, 1, 2, 9, 7, 2], 2).tokens == [3, 1], "two tokens match, not only the last"
    assert lookup.propose([1, 2, 3], 2).tokens == []
    assert lookup.propose([5, 5], 3).tokens == [5]
    assert lookup.propose([5], 3).tokens == []


def test_ngram_counts_and_backs_off():
    ngram = drafts.NGram([1, 2, 3, 1, 2, 3, 1, 2, 4], 3, vocab_size=6)
    torch.testing.assert_close(ngram.distribution([1, 2]), torch.tensor([0, 0, 0, 2 / 3, 1 / 3, 0]))
    torch.testing.assert_close(ngram.distribution([5, 2]), torch.tensor([0, 0, 0, 2 / 3, 1 / 3, 0]))
    torch.testing.assert_close(ngram.distribution([5]), torch.tensor([0, 3, 3, 2, 1, 0]) / 9)
    assert ngram.propose([1, 2], 4).tokens == [3, 1, 2, 3]
    got = ngram.propose([1, 2], 2, 1.0, torch.Generator().manual_seed(0))
    assert got.q.shape == (2, 6)
    assert all(got.q[i, t] > 0 for i, t in enumerate(got.tokens))
    tokens, parents = ngram.tree([1, 2], (2, 2))
    assert tokens.tolist() == [2, 3, 4, 1, 1, 2] or tokens.tolist()[:4] == [2, 3, 4, 1]
    tree.check_parents(parents)


def test_early_exit_keeps_its_cache_in_step(model):
    """After rejections its proposals are those of a fresh draft."""
    draft = drafts.EarlyExit(model, 2)
    for known in (PROMPT, [*PROMPT, 1, 2], [*PROMPT, 1, 4, 6], PROMPT[:3], [9, 9, 9, 9]):
        assert draft.propose(known, 4).tokens == drafts.EarlyExit(model, 2).propose(known, 4).tokens
    sampled = drafts.EarlyExit(model, 2, vocab=torch.tensor([2, 3, 5])).propose(
        PROMPT, 3, 1.0, torch.Generator().manual_seed(0)
    )
    assert set(sampled.tokens) <= {2, 3, 5}
    torch.testing.assert_close(sampled.q.sum(-1), torch.ones(3))


def test_a_fitted_exit_is_nearer_to_the_target(model):
    ids = torch.randint(0, VOCAB, (30, 40), generator=torch.Generator().manual_seed(9))
    exit_map = drafts.fit_exit(model, 2, ids[:25])
    errors = []
    for fitted in (None, exit_map):
        draft, full = drafts.EarlyExit(model, 2, fitted), CachedModel(model)
        want = full.logits(ids[29])[4:].softmax(-1)
        got = torch.stack([draft._logits(h) for h in CachedModel(model, 2).hidden(ids[29])])[4:].softmax(-1)
        errors.append(float(1 - torch.minimum(want, got).sum(-1).mean()))
    assert errors[1] < 0.9 * errors[0]


# ---- counting ----------------------------------------------------------------------------------------------


def test_summary_by_hand():
    rounds = [(2, 2), (2, 0), (2, 1), (0, 0)]
    got = decode.summary(rounds, 2)
    assert got["alpha"] == pytest.approx(3 / 5)  # judged: 2 + 1 + 2
    assert got["coverage"] == 0.75
    assert got["tokens_per_pass"] == pytest.approx(1.75)
    assert got["predicted"] == pytest.approx(1 + 0.75 * (0.6 + 0.36))
    assert experiment.by_depth(rounds, 3) == [round(2 / 3, 4), 0.5, None]


def test_repetition_by_hand():
    """4-grams of the text: 0120, 1201, 2012, 0120 (again), 1203; 0120 stands in the prompt."""
    prompt, text = [0, 1, 2, 0, 9], [0, 1, 2, 0, 1, 2, 0, 3]
    own, before = experiment.repetition(prompt, text)
    assert (own, before) == (pytest.approx(1 / 5), pytest.approx(2 / 5))
    with pytest.raises(ValueError, match="text: expected at least n = 4 tokens, got 3"):
        experiment.repetition(prompt, text[:3])


def test_the_record_is_of_this_experiment():
    rows = experiment.measured()
    keys = {(r["text"], r["draft"], r["temperature"], r["gamma"]) for r in rows}
    assert len(keys) == len(rows) == 3 * 3 * (len(experiment.GAMMAS) + 1)
    for r in rows:
        assert 1 <= r["tokens_per_pass"] <= r["gamma"] + 1
        assert len(r["by_depth"]) == r["gamma"]
    assert {r["text"] for r in rows} == set(experiment.greedy_repetition())


def test_bad_input_is_named(model):
    lookup = drafts.PromptLookup()
    for call, says in (
        (lambda: decode.speculate(model, lookup, [], 4, 2), "prompt: expected at least one token"),
        (lambda: decode.speculate(model, lookup, [1], 0, 2), "max_new_tokens: expected"),
        (
            lambda: decode.speculate(model, lookup, [1], 4, -1),
            "gamma: expected an integer of at least 0, got -1",
        ),
        (lambda: decode.speculate(model, lookup, [1], 4, 2, temperature=-1), "temperature: expected"),
        (lambda: drafts.EarlyExit(model, 3), "layers: expected fewer than the target's 3, got 3"),
        (lambda: drafts.NGram([1], 3, vocab_size=5), "text: expected at least order = 3 tokens, got 1"),
        (lambda: drafts.PromptLookup(0), "max_ngram: expected"),
        (lambda: CachedModel(model).hidden(torch.tensor([[1]])), r"tokens: expected int64 \[n\]"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
