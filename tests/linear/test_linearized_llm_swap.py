"""SmolLM2 with linearized layers: the swap is faithful and leaves no trace, training brings perplexity down."""

import pytest
import torch

from effattn_lab.foundations.attention import attention
from effattn_lab.linear import linearized_llm_experiment as experiment
from effattn_lab.linear.linearized_llm_swap import SwappedAttention, from_attention, linearized, rope_base
from effattn_lab.models import hf, smollm2
from effattn_lab.tasks.text import topics

TEXT = topics(3000)


@pytest.fixture(scope="module")
def lm():
    return smollm2.load()


def test_projections_and_positions_are_the_models_own(lm):
    """The swapped layer has the very q, k, v that softmax had: with softmax inside it gives the same output."""
    block = lm.model.model.layers[12].self_attn
    layer = from_attention(block, lm.model.config)
    seen = experiment.capture(lm, lm.ids(TEXT, 60), [12])[12]
    assert rope_base(lm.model.config) == 100000
    with torch.no_grad():
        q, k, v = layer._heads(seen[0], torch.arange(60))
        want_q, want_k, want_v = lm.capture(TEXT, 12, 60)
        torch.testing.assert_close(q, want_q, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(k, want_k, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(v, want_v, rtol=1e-4, atol=1e-4)
        got = layer._merge(attention(q, k, v, causal=True))
        torch.testing.assert_close(got, seen[1], rtol=1e-3, atol=1e-3)


def test_swap_leaves_no_trace(lm):
    want = lm.logits(TEXT, 40)
    names = set(lm.model.state_dict())
    with linearized(lm.model, [3, 7]) as layers:
        assert isinstance(lm.model.model.layers[7].self_attn, SwappedAttention)
        assert len(layers) == 2
        assert (lm.logits(TEXT, 40) - want).abs().max() > 0.1
    with pytest.raises(IndexError), linearized(lm.model, [3, 7]) as layers:
        layers[2]
    assert set(lm.model.state_dict()) == names
    assert torch.equal(lm.logits(TEXT, 40), want)


def test_generation_with_a_cache_is_generation_without(lm):
    """Greedy tokens step by step from state and cache; 64 and 128 are the borders of the groups."""
    prompt = lm.ids(TEXT, 60)
    with linearized(lm.model, [5, 20]) as layers, torch.no_grad():
        for layer in layers:
            torch.nn.init.normal_(layer.conv_weight, std=0.05)
            layer.alpha.fill_(0.02)
        out = lm.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
            pad_token_id=lm.tokenizer.eos_token_id,
        )  # fmt: skip
        logits = lm.model(out, use_cache=False).logits[0]
        assert out[0, 60:].tolist() == logits[59:-1].argmax(-1).tolist()
        mask = torch.ones_like(prompt)
        mask[0, :3] = 0
        with pytest.raises(ValueError, match="attention_mask: expected none or the plain causal one"):
            lm.model(prompt, attention_mask=mask)


def test_it_runs_through_the_attention_interface_too(lm):
    """Local attention without parameters, as an `attn_implementation` for all layers at once."""
    from effattn_lab.linear.linearized_llm import linearized_attention_chunked

    def local(q, k, v, *, causal, scale):
        return linearized_attention_chunked(q, k, v, alpha=0.0, group_size=64)

    with hf.use(lm.model, local):
        assert lm.logits(TEXT, 70).isfinite().all()


def test_experiment_in_small(lm):
    """The smallest run: the swap hurts, transfer repairs much of it; the model itself is as it was."""
    want = lm.logits(TEXT, 30)
    rows = experiment.run(
        lm, layers=[6, 22], settings=["local + global + conv"], steps=12, sequences=2, length=128,
        test_sequences=1, lm_steps=1, lm_lr=1e-5,
    )  # fmt: skip
    base, row = rows
    assert base["setting"] == "softmax"
    assert row["ppl_reference_before"] > 1.02 * base["ppl_reference"]
    assert row["ppl_reference"] < row["ppl_reference_before"]
    assert row["ppl_reference_tuned"] != row["ppl_reference"]
    assert len(row["alpha"]) == 2
    assert 0 < row["transfer_loss"] < 1
    assert torch.equal(lm.logits(TEXT, 30), want)
    assert all(p.requires_grad for p in lm.model.parameters())


def test_recorded_run_is_what_the_chapter_says():
    """Held-out text: the swap hurts, transfer repairs, the convolution helps on both texts, whatever the seed."""
    base, *rows = experiment.measured()
    assert base["setting"] == "softmax"
    assert {row["setting"] for row in rows} == set(experiment.SETTINGS)
    for text in ("reference", "code"):
        by = {(row["setting"], row["seed"]): row[f"ppl_{text}"] for row in rows}
        for (setting, seed), found in by.items():
            assert base[f"ppl_{text}"] < found < 0.3 * rows[0][f"ppl_{text}_before"]
            if "conv" not in setting and (f"{setting} + conv", seed) in by:
                assert by[f"{setting} + conv", seed] < found - 0.3


def test_bad_input_is_named(lm):
    for message, call in {
        "layers: expected integers from 1 to 29, got 0": lambda: linearized(lm.model, [0]).__enter__(),
        "layers: expected each once": lambda: linearized(lm.model, [3, 3]).__enter__(),
        "inner: expected 1 layers": lambda: linearized(lm.model, [3], []).__enter__(),
        "settings: expected some of local": lambda: experiment.run(lm, settings=["softmax"]),
        # Before any work, and not an IndexError of torch half way through:
        "layers: expected integers from 1 to 29, got 99": lambda: experiment.run(lm, layers=[3, 99]),
        "text: expected at least": lambda: experiment.pieces(lm, "a b c", 4, 512),
        "steps: expected an integer": lambda: experiment.transfer(None, None, None, steps=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
