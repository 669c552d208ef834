"""Model shapes and the step estimate: against published parameter counts and hand arithmetic."""

from __future__ import annotations

import pytest

from effattn_lab.foundations import cost_model as cost
from effattn_lab.foundations.presets import MODELS, calculator_data, crossover_length, estimate
from effattn_lab.measure.roofline import GPUS

H100 = {
    "peak_flops": GPUS["H100"].peak_flops,
    "bandwidth": GPUS["H100"].bandwidth,
    "memory_bytes": GPUS["H100"].memory_gb * 1e9,
}
LLAMA = MODELS["Llama-3-8B"]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-2-7B", 6_738_415_616),
        ("Llama-3-70B", 70_553_706_496),
        ("LLaMA-1B", 1_339_082_752),
        ("SmolLM2-135M", 134_515_008),
    ],
)
def test_total_params_are_those_of_the_checkpoint(name, params):
    assert MODELS[name].total_params == params


def test_crossover_is_where_the_flops_are_equal():
    for model in MODELS.values():
        n = crossover_length(model)
        attention = cost.attention_flops(1, model.num_heads, n, n, model.head_dim) / 2  # the causal half
        assert attention == pytest.approx(cost.linear_flops(n, model.layer_params))
        assert crossover_length(model, per_token=True) == n / 2
    assert crossover_length(LLAMA) == 53_248
    assert crossover_length(MODELS["SmolLM2-135M"]) == 6_144
    assert crossover_length(LLAMA, output_layer=True) == 53_248 + 128_256 / 32


def test_decode_by_hand():
    e = estimate(LLAMA, phase="decode", seqlen=8192, **H100)
    assert e.kv_cache_bytes == 2**30
    assert e.weights_bytes == pytest.approx(16.06e9, rel=1e-3)
    assert e.dense.bound == e.attention.bound == "memory"
    assert e.dense.intensity == pytest.approx(1, rel=1e-9)
    assert e.attention.intensity == pytest.approx(4, rel=1e-3)  # the group size
    assert e.attention.time_s == pytest.approx(2**30 / 3.35e12, rel=1e-3)
    assert e.time_s == e.dense.time_s + e.attention.time_s
    assert e.tokens_per_s == pytest.approx(1 / e.time_s)
    assert e.fits
    assert not estimate(LLAMA, phase="decode", seqlen=131_072, batch=8, **H100).fits


def test_batch_raises_the_intensity_of_the_weights_and_not_of_attention():
    one, many = (estimate(LLAMA, phase="decode", seqlen=4096, batch=b, **H100) for b in (1, 64))
    assert many.dense.intensity == pytest.approx(64 * one.dense.intensity)
    assert many.attention.intensity == pytest.approx(one.attention.intensity)


def test_prefill_naive_moves_the_square_and_flash_does_not():
    flash, naive = (
        estimate(LLAMA, phase="prefill", seqlen=8192, kernel=k, **H100) for k in ("flash", "naive")
    )
    assert naive.attention.flops == pytest.approx(2 * flash.attention.flops, rel=1e-3)
    assert naive.attention.bound == "memory"
    assert flash.attention.bound == "compute"
    assert naive.attention.intensity == pytest.approx(64, rel=0.02)  # D / 2


@pytest.mark.parametrize("bad", [{"phase": "train"}, {"kernel": "fast"}, {"seqlen": 0}, {"batch": 0}])
def test_bad_input_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        estimate(LLAMA, **{"phase": "prefill", "seqlen": 8, **H100, **bad})


def test_calculator_data_is_the_package_tables():
    data = calculator_data()
    assert [m["name"] for m in data["models"]] == list(MODELS)
    assert [g["name"] for g in data["gpus"]] == list(GPUS)
    assert all(g["memory_gb"] > 0 for g in data["gpus"])
