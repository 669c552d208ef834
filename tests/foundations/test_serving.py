"""Serving formulas: against the step estimate, hand arithmetic, and their own limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from effattn_lab.foundations import serving as sv
from effattn_lab.foundations.presets import MODELS, estimate
from effattn_lab.measure.roofline import GPUS

LLAMA, H100, A100 = MODELS["Llama-3-8B"], GPUS["H100"], GPUS["A100"]


def on(gpu):
    return {"peak_flops": gpu.peak_flops, "bandwidth": gpu.bandwidth, "memory_bytes": gpu.memory_gb * 1e9}


@pytest.mark.parametrize("batch", [1, 64, 512])
def test_decode_step_is_the_estimate(batch):
    want = estimate(LLAMA, phase="decode", seqlen=3000, batch=batch, **on(H100)).time_s
    assert sv.step_time(LLAMA, H100, decodes=batch, context=3000) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("prompt", [1, 100, 5000])
def test_prefill_is_the_estimate(prompt):
    want = estimate(LLAMA, phase="prefill", seqlen=prompt, **on(H100)).time_s
    assert sv.step_time(LLAMA, H100, chunk=prompt) == pytest.approx(want, rel=1e-12)
    assert sv.prefill_time(LLAMA, H100, prompt) == pytest.approx(want, rel=1e-12)


def test_sizes_of_elements_reach_the_estimate():
    sizes = {"weight_itemsize": 0.5, "cache_itemsize": 1}
    want = estimate(LLAMA, phase="decode", seqlen=3000, batch=4, **sizes, **on(A100)).time_s
    assert sv.step_time(LLAMA, A100, decodes=4, context=3000, **sizes) == pytest.approx(want, rel=1e-12)


def test_a_small_chunk_rides_along_for_nothing():
    """A decode step of 32 waits for the weights; 100 prompt tokens more use the arithmetic that stood idle."""
    alone = sv.step_time(LLAMA, H100, decodes=32, context=2048)
    with_chunk = sv.step_time(LLAMA, H100, decodes=32, context=2048, chunk=100)
    assert alone < with_chunk < 1.01 * alone
    assert sv.step_time(LLAMA, H100, decodes=32, context=2048, chunk=1000) > 2 * alone


def test_chunks_do_the_work_of_the_whole_and_read_the_weights_again():
    whole = sv.prefill_time(LLAMA, H100, 8192)
    times = [sv.prefill_time(LLAMA, H100, 8192, chunk=c) for c in (8192, 2048, 1000, 64)]
    assert times == sorted(times)
    assert times[0] == whole
    assert times[1] < 1.001 * whole  # large chunks are as limited by arithmetic as the whole prompt
    assert times[3] >= 8192 / 64 * 2 * LLAMA.read_params / H100.bandwidth


def test_request_time_by_hand():
    prefill = sv.step_time(LLAMA, H100, chunk=1000)
    decode = sv.step_time(LLAMA, H100, decodes=8, context=1050)
    assert sv.request_time(LLAMA, H100, 1000, 100, 8) == pytest.approx(prefill + 100 * decode / 8)
    rest = sv.step_time(LLAMA, H100, chunk=200, cached=800)
    assert sv.request_time(LLAMA, H100, 1000, 100, 8, prefix=800) == pytest.approx(rest + 100 * decode / 8)


def test_token_gap_is_a_step_and_the_prefills_between_two_steps():
    step = sv.step_time(LLAMA, A100, decodes=64, context=1125)
    prefill = sv.step_time(LLAMA, A100, chunk=1000)
    assert sv.token_gap(LLAMA, A100, 1000, 250, 64) == pytest.approx(step + 64 / 250 * prefill)
    # Little's law: requests in flight = rate * time in flight
    rate = 1 / sv.request_time(LLAMA, A100, 1000, 250, 64)
    assert rate * 250 * sv.token_gap(LLAMA, A100, 1000, 250, 64) == pytest.approx(64)


def test_late_share_by_simulation():
    """Lindley's recursion: a newcomer waits as long as the one before, plus its service, less the time between."""
    rate, service = 2.0, 0.3
    gaps = np.random.default_rng(0).exponential(1 / rate, 400_000)
    wait, waits = 0.0, []
    for gap in gaps:
        wait = max(0.0, wait + service - gap)
        waits.append(wait)
    done = service + np.array(waits)
    for limit in (0.3, 0.4, 0.7, 1.0, 2.0):
        assert sv.late_share(rate, service, limit) == pytest.approx(
            float((done > limit + 1e-9).mean()), abs=0.005
        )


def test_late_share_by_hand():
    assert sv.late_share(2, 0.3, 0.3) == pytest.approx(0.6)  # who finds the server busy waits
    assert sv.late_share(2, 0.3, 0.29) == 1
    assert sv.late_share(2, 0.3, 0.5) == pytest.approx(1 - 0.4 * math.exp(0.4))
    shares = [sv.late_share(3, 0.3, 0.3 * n) for n in range(1, 21)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 0.05


def test_derate():
    slow = sv.derate(H100, 0.5, 0.25)
    assert (slow.peak_flops, slow.bandwidth, slow.memory_gb) == (0.5 * 989e12, 0.25 * 3350e9, 80)
    assert slow.ridge == pytest.approx(2 * H100.ridge)
    assert sv.derate(H100, 1, 1) == H100


def test_with_kv_heads():
    """One KV head a query head: the projections grow by 2 M D (32 - 8) a layer, the cache fourfold."""
    wide = sv.with_kv_heads(LLAMA, 32)
    assert wide.layer_params - LLAMA.layer_params == 2 * 4096 * 128 * 24
    assert sv.with_kv_heads(wide, 8).total_params == LLAMA.total_params
    assert sv.cache_capacity(LLAMA, A100) > 4 * sv.cache_capacity(wide, A100)


def test_rate_gpus():
    assert sv.arrival_rate(86_400) == 1
    assert sv.arrival_rate(86_400, 3) == 3
    assert sv.gpus_needed(10, 5) == 2
    assert sv.gpus_needed(10.01, 5) == 3
    assert sv.gpus_needed(10, 5, utilisation=0.7) == 3
    assert sv.gpus_needed(0.1, 5, spare=1) == 2


def test_capacity():
    # 72 GB usable, 16.06 GB of weights, 131,072 bytes a token
    assert sv.cache_capacity(LLAMA, A100) == (72_000_000_000 - 2 * 8_030_261_248) // 131_072
    assert sv.cache_capacity(LLAMA, A100, cache_itemsize=1) in (2 * 426_784, 2 * 426_784 + 1)
    assert sv.cache_capacity(LLAMA, GPUS["T4"]) == 0
    assert sv.cache_capacity(LLAMA, GPUS["T4"], weight_itemsize=0.5) > 0


@pytest.mark.parametrize("shared", [0, 15, 16, 40, 95])
@pytest.mark.parametrize("capacity", [0, 100, 1000, 1601])
def test_sequences_that_fit_by_allocating(capacity, shared):
    """Against an allocator that gives out blocks one by one."""
    tokens, free, count = 100, capacity // 16, 0
    common = shared // 16  # whole blocks only are shared
    free -= common
    while True:
        need = len(range(common * 16, tokens, 16))
        if need > free:
            break
        free, count = free - need, count + 1
    assert sv.sequences_that_fit(capacity, tokens, shared) == count


def test_speculative_tokens_by_enumeration():
    a, k = 0.7, 4
    # i accepted and then one refused, or all accepted; the target adds one token either way
    want = sum((i + 1) * a**i * (1 - a) for i in range(k)) + (k + 1) * a**k
    assert sv.speculative_tokens(a, k) == pytest.approx(want)
    assert sv.speculative_tokens(0, k) == 1
    assert sv.speculative_tokens(1, k) == k + 1


def test_speculation_pays_at_batch_one_and_not_in_a_large_batch():
    big, gpu = MODELS["Llama-3-70B"], GPUS["B200"]
    gain = [
        sv.speculative_speedup(big, LLAMA, gpu, acceptance=0.8, drafts=4, batch=b, context=2048)
        for b in (1, 16, 256)
    ]
    assert gain[0] > gain[1] > 2 > 1 > gain[2]
    useless = sv.speculative_speedup(big, LLAMA, gpu, acceptance=0, drafts=4, batch=1, context=2048)
    assert useless < 1


def test_training_memory():
    assert sv.training_state_bytes(8e9) == 128e9
    assert sv.training_state_bytes(8e9, 8) == 16e9
    # Llama-3-8B, per token: 2 (4 * 4096 + 2 * 40 * 128 + 3 * 14336) + 4 * 32
    assert sv.layer_activation_bytes(LLAMA, 10) == 10 * (2 * (16_384 + 10_240 + 43_008) + 128)


def test_training_flops_are_six_a_weight_for_short_sequences():
    assert sv.training_flops(LLAMA, 8) / 8 / LLAMA.read_params == pytest.approx(6, rel=0.001)
    assert sv.training_flops(LLAMA, 8, recompute=True) / 8 / LLAMA.read_params == pytest.approx(8, rel=0.001)
    long = sv.training_flops(LLAMA, 262_144) - 6 * 262_144 * LLAMA.read_params
    assert sv.training_flops(LLAMA, 524_288) - 6 * 524_288 * LLAMA.read_params == pytest.approx(
        4 * long, rel=1e-4
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sv.derate(H100, compute=50), r"compute: expected a share above 0 and up to 1, got 50"),
        (lambda: sv.derate(H100, bandwidth=0), "bandwidth: expected a share"),
        (lambda: sv.with_kv_heads(LLAMA, 5), r"num_kv_heads: expected a divisor of the query heads \(32\), got 5"),
        (lambda: sv.with_kv_heads(LLAMA, 0), "num_kv_heads: expected"),
        (lambda: sv.step_time(LLAMA, H100), "decodes, chunk: expected at least one"),
        (lambda: sv.step_time(LLAMA, H100, decodes=-1), "decodes: expected an integer of at least 0, got -1"),
        (lambda: sv.step_time(LLAMA, H100, decodes=1, context=0), "context: expected an integer of at least 1"),
        (lambda: sv.step_time(LLAMA, H100, decodes=1, queries=0), "queries: expected"),
        (lambda: sv.step_time(LLAMA, H100, chunk=1.5), "chunk: expected an integer"),
        (lambda: sv.step_time(LLAMA, H100, chunk=1, cached=-2), "cached: expected"),
        (lambda: sv.step_time(LLAMA, H100, chunk=1, weight_itemsize=0), "weight_itemsize: expected a number above 0"),
        (lambda: sv.prefill_time(LLAMA, H100, 0), "prompt: expected"),
        (lambda: sv.prefill_time(LLAMA, H100, 10, chunk=0), "chunk: expected"),
        (lambda: sv.request_time(LLAMA, H100, 10, 0, 1), "output: expected"),
        (lambda: sv.request_time(LLAMA, H100, 10, 1, 1, prefix=10), r"prefix: .* below the prompt \(10\), got 10"),
        (lambda: sv.token_gap(LLAMA, H100, 10, 0, 1), "output: expected"),
        (lambda: sv.late_share(4, 0.3, 1), "rate: expected below 1 / service"),
        (lambda: sv.late_share(1, 0.3, 7), r"limit: expected at most 20 services \(6\), got 7"),
        (lambda: sv.late_share(1, -1, 7), "service: expected a number above 0"),
        (lambda: sv.arrival_rate(0), "requests_a_day: expected a number above 0, got 0"),
        (lambda: sv.arrival_rate(1, peak_factor=float("inf")), "peak_factor: expected"),
        (lambda: sv.gpus_needed(1, 1, utilisation=1.2), "utilisation: expected a share"),
        (lambda: sv.gpus_needed(1, 1, spare=-1), "spare: expected"),
        (lambda: sv.cache_capacity(LLAMA, H100, usable=90), "usable: expected a share"),
        (lambda: sv.sequences_that_fit(100, 10, shared=10), r"shared: expected fewer than tokens \(10\), got 10"),
        (lambda: sv.sequences_that_fit(-1, 10), "capacity: expected"),
        (lambda: sv.speculative_tokens(1.1, 4), "acceptance: expected a number from 0 to 1, got 1.1"),
        (lambda: sv.speculative_tokens(0.5, 0), "drafts: expected"),
        (lambda: sv.training_state_bytes(-1), "params: expected"),
        (lambda: sv.training_state_bytes(1, shards=0), "shards: expected"),
        (lambda: sv.layer_activation_bytes(LLAMA, 0), "tokens: expected"),
        (lambda: sv.training_flops(LLAMA, True), "seqlen: expected"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
