"""What serving and training a decoder costs: seconds of a step, requests a second, GPUs, money, memory.

The times are roofline bounds (:mod:`cost_model`) of the shapes in :mod:`presets`, each kind of work against its own
limit. Nothing is faster; real engines are slower by launch gaps, sampling, and kernels short of the peak.
:func:`derate` puts a share of the peaks in the place of the peaks, so that the assumption stands where it is read.
Times are seconds, sizes bytes, lengths tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from numbers import Real

from effattn_lab._validate import check_positive_int
from effattn_lab.foundations import cost_model as cost
from effattn_lab.foundations.presets import ModelShape
from effattn_lab.measure.roofline import GPU

SECONDS_A_DAY = 86_400
BLOCK = 16  # tokens in a block of a paged cache (vLLM's default)


def derate(gpu: GPU, compute: float = 0.5, bandwidth: float = 0.7) -> GPU:
    """`gpu` with only a share of its peaks: what an engine reaches, assumed or measured.

    Args:
        gpu: a GPU of the table.
        compute: share of the tensor-core peak, in (0, 1].
        bandwidth: share of the memory bandwidth, in (0, 1].

    Raises:
        ValueError: a share outside (0, 1].
    """
    _check_share("compute", compute)
    _check_share("bandwidth", bandwidth)
    return replace(gpu, fp16_tflops=gpu.fp16_tflops * compute, bandwidth_gbs=gpu.bandwidth_gbs * bandwidth)


def with_kv_heads(model: ModelShape, num_kv_heads: int) -> ModelShape:
    """`model` with another number of key-value heads, as after a conversion to grouped heads; all else unchanged.

    Raises:
        ValueError: a number below 1, or one that does not divide the query heads.
    """
    check_positive_int("num_kv_heads", num_kv_heads)
    if model.num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a divisor of the query heads ({model.num_heads}), got {num_kv_heads}"
        )
    return replace(model, name=f"{model.name}, {num_kv_heads} KV heads", num_kv_heads=num_kv_heads)


def step_time(
    model: ModelShape,
    gpu: GPU,
    *,
    decodes: int = 0,
    context: int = 1,
    queries: int = 1,
    chunk: int = 0,
    cached: int = 0,
    weight_itemsize: float = 2,
    cache_itemsize: float = 2,
) -> float:
    """Least seconds of one iteration that mixes decoding sequences with a piece of a prompt.

    Args:
        decodes: sequences that decode; each has `context` tokens in its cache.
        queries: tokens that each of them puts through at once (1, or drafts + 1 when drafts are verified).
        chunk: prompt tokens prefilled in the same iteration, behind `cached` earlier tokens of that prompt.
        weight_itemsize, cache_itemsize: bytes per weight and per cached element.

    Returns:
        the dense layers for all tokens together (weights read once, the output layer for the decoded tokens and one
        of the chunk), plus decode attention, plus the chunk's attention, each at the slower of its two limits.

    Raises:
        ValueError: a negative count, a length below 1, or nothing to do.
    """
    for name, value in (("decodes", decodes), ("chunk", chunk), ("cached", cached)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected an integer of at least 0, got {value!r}")
    check_positive_int("context", context)
    check_positive_int("queries", queries)
    if decodes == chunk == 0:
        raise ValueError("decodes, chunk: expected at least one of them above 0, got 0 and 0")
    _check_positive("weight_itemsize", weight_itemsize)
    _check_positive("cache_itemsize", cache_itemsize)
    heads, kv_heads, dim = model.num_heads, model.num_kv_heads, model.head_dim

    def bound(flops: float, nbytes: float) -> float:
        return cost.roofline_time(flops, nbytes, gpu.peak_flops, gpu.bandwidth)

    outputs = decodes * queries + (chunk > 0)
    flops = cost.linear_flops(decodes * queries + chunk, model.num_layers * model.layer_params)
    flops += cost.linear_flops(outputs, model.head_params)
    seconds = bound(flops, cost.linear_bytes(model.read_params, weight_itemsize))
    if decodes:
        flops = queries * cost.decode_flops(decodes, heads, context, dim)
        nbytes = cost.decode_bytes(decodes, heads, kv_heads, context, dim, cache_itemsize)
        seconds += bound(model.num_layers * flops, model.num_layers * nbytes)
    if chunk:
        flops = cost.attention_flops(1, heads, chunk, cached + chunk, dim, causal=True)
        nbytes = cost.flash_bytes(1, heads, kv_heads, chunk, cached + chunk, dim, cache_itemsize)
        seconds += bound(model.num_layers * flops, model.num_layers * nbytes)
    return seconds


def prefill_time(model: ModelShape, gpu: GPU, prompt: int, *, chunk: int | None = None, decodes: int = 0,
                 context: int = 1, weight_itemsize: float = 2, cache_itemsize: float = 2) -> float:  # fmt: skip
    """Least seconds until a prompt's first token, alone or in chunks of `chunk` that ride along with `decodes`.

    Raises:
        ValueError: as :func:`step_time`, or a chunk below 1.
    """
    check_positive_int("prompt", prompt)
    size = prompt if chunk is None else chunk
    check_positive_int("chunk", size)
    return sum(
        step_time(model, gpu, decodes=decodes, context=context, chunk=min(size, prompt - done), cached=done,
                  weight_itemsize=weight_itemsize, cache_itemsize=cache_itemsize)
        for done in range(0, prompt, size)
    )  # fmt: skip


def request_time(model: ModelShape, gpu: GPU, prompt: int, output: int, batch: int, *, prefix: int = 0,
                 weight_itemsize: float = 2, cache_itemsize: float = 2) -> float:  # fmt: skip
    """GPU seconds that one request uses up: its prefill, and its share of `output` decode steps at `batch`.

    The context of a decode step is the mean over the answer, ``prompt + output / 2``. The first `prefix` tokens of
    the prompt are found in the cache and not prefilled.

    Raises:
        ValueError: a length or batch below 1, or a prefix that leaves no token to prefill.
    """
    check_positive_int("prompt", prompt)
    check_positive_int("output", output)
    check_positive_int("batch", batch)
    if isinstance(prefix, bool) or not isinstance(prefix, int) or not 0 <= prefix < prompt:
        raise ValueError(f"prefix: expected an integer from 0 to below the prompt ({prompt}), got {prefix!r}")
    step = partial(step_time, model, gpu, weight_itemsize=weight_itemsize, cache_itemsize=cache_itemsize)
    prefill = step(chunk=prompt - prefix, cached=prefix)
    return prefill + output * step(decodes=batch, context=prompt + output // 2) / batch


def token_gap(model: ModelShape, gpu: GPU, prompt: int, output: int, batch: int, *, prefix: int = 0,
              weight_itemsize: float = 2, cache_itemsize: float = 2) -> float:  # fmt: skip
    """Mean seconds between two tokens of a user, when `batch` users decode and new prompts are prefilled in between.

    ``batch * request_time / output``: one decode step, and the prefills of the ``batch / output`` requests that take
    the place of those which end at this step. Little's law, with `batch` requests in flight for ``output`` gaps each.

    Raises:
        ValueError: as :func:`request_time`.
    """
    seconds = request_time(model, gpu, prompt, output, batch, prefix=prefix,
                           weight_itemsize=weight_itemsize, cache_itemsize=cache_itemsize)  # fmt: skip
    return batch * seconds / output


def late_share(rate: float, service: float, limit: float) -> float:
    """Share of jobs that aren't done `limit` seconds after their arrival: one at a time, `service` each, Poisson.

    The queue M/D/1: with ``t = limit - service``, the wait is at most t with probability
    ``(1 - rate * service) * sum over k <= t / service of (-x)^k e^x / k!``, where ``x = rate * (t - k * service)``
    (Erlang 1909). The terms alternate and grow, so `limit` may be 20 services at most.

    Args:
        rate: arrivals a second; ``rate * service`` below 1.

    Raises:
        ValueError: a number not above 0, no steady state, or a limit beyond 20 services.
    """
    for name, value in (("rate", rate), ("service", service), ("limit", limit)):
        _check_positive(name, value)
    if rate * service >= 1:
        raise ValueError(
            f"rate: expected below 1 / service ({1 / service:g}), got {rate!r}: the queue never ends"
        )
    if limit > 20 * service:
        raise ValueError(f"limit: expected at most 20 services ({20 * service:g}), got {limit!r}")
    if limit < service:
        return 1.0
    waits = [rate * (limit - (k + 1) * service) for k in range(int(limit // service))]
    return 1 - (1 - rate * service) * math.fsum(
        (-x) ** k * math.exp(x) / math.factorial(k) for k, x in enumerate(waits)
    )


def arrival_rate(requests_a_day: float, peak_factor: float = 1.0) -> float:
    """Requests a second: the mean over the day times `peak_factor` (the busiest hour over the mean)."""
    _check_positive("requests_a_day", requests_a_day)
    _check_positive("peak_factor", peak_factor)
    return requests_a_day * peak_factor / SECONDS_A_DAY


def gpus_needed(rate: float, per_gpu: float, utilisation: float = 1.0, spare: int = 0) -> int:
    """Whole GPUs for `rate` requests a second, each serving `per_gpu` at most and loaded to `utilisation` of that.

    Args:
        rate: requests a second. per_gpu: requests a second of one GPU, flat out.
        utilisation: planned load in (0, 1]; queues grow without bound near 1.
        spare: GPUs beyond the load, so that one may fail.
    """
    _check_positive("rate", rate)
    _check_positive("per_gpu", per_gpu)
    _check_share("utilisation", utilisation)
    if isinstance(spare, bool) or not isinstance(spare, int) or spare < 0:
        raise ValueError(f"spare: expected an integer of at least 0, got {spare!r}")
    return max(1, math.ceil(rate / (per_gpu * utilisation))) + spare


def cache_capacity(model: ModelShape, gpu: GPU, *, usable: float = 0.9, weight_itemsize: float = 2,
                   cache_itemsize: float = 2) -> int:  # fmt: skip
    """Tokens that fit beside the weights: ``(memory * usable - weights) / bytes of a cached token``; 0 if none.

    Args:
        usable: share of the memory that weights and cache may take, in (0, 1]; the rest is activations, CUDA graphs
            and the allocator's loss.
    """
    _check_share("usable", usable)
    _check_positive("weight_itemsize", weight_itemsize)
    _check_positive("cache_itemsize", cache_itemsize)
    token = cost.kv_cache_bytes(model.num_layers, model.num_kv_heads, model.head_dim, 1, 1, cache_itemsize)
    left = gpu.memory_gb * 1e9 * usable - cost.linear_bytes(model.total_params, weight_itemsize)
    return max(0, int(left // token))


def sequences_that_fit(capacity: int, tokens: int, shared: int = 0, block: int = BLOCK) -> int:
    """Sequences of `tokens` tokens in a paged cache of `capacity` tokens; the first `shared` of each are stored once.

    Blocks are whole: a sequence's own tokens take ``ceil(own / block)`` blocks, the shared ones
    ``floor(shared / block)`` in all (a block that is shared in part is each sequence's own).
    """
    check_positive_int("tokens", tokens)
    check_positive_int("block", block)
    for name, value in (("capacity", capacity), ("shared", shared)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected an integer of at least 0, got {value!r}")
    if shared >= tokens:
        raise ValueError(f"shared: expected fewer than tokens ({tokens}), got {shared!r}")
    common = shared // block
    own = -(-(tokens - common * block) // block)
    return max(0, (capacity // block - common) // own)


def speculative_tokens(acceptance: float, drafts: int) -> float:
    """Expected tokens of a round with `drafts` drafted tokens, each accepted with probability `acceptance`.

    ``(1 - a^(k+1)) / (1 - a)``: the accepted run and one token of the target (Leviathan et al. 2023, equation 1).
    Between 1 (nothing accepted) and ``k + 1``.
    """
    check_positive_int("drafts", drafts)
    if isinstance(acceptance, bool) or not isinstance(acceptance, Real) or not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance: expected a number from 0 to 1, got {acceptance!r}")
    return float(sum(acceptance**i for i in range(drafts + 1)))


def speculative_speedup(
    model: ModelShape,
    draft: ModelShape,
    gpu: GPU,
    *,
    acceptance: float,
    drafts: int,
    batch: int,
    context: int,
) -> float:
    """Tokens a second with drafts over tokens a second without, by the roofline.

    A round costs `drafts` decode steps of the draft model and one step of the model with ``drafts + 1`` queries a
    sequence; it yields :func:`speculative_tokens`.
    """
    tokens = speculative_tokens(acceptance, drafts)
    plain = step_time(model, gpu, decodes=batch, context=context)
    drafting = drafts * step_time(draft, gpu, decodes=batch, context=context)
    verify = step_time(model, gpu, decodes=batch, context=context, queries=drafts + 1)
    return tokens * plain / (drafting + verify)


def training_state_bytes(params: float, shards: int = 1) -> float:
    """Bytes of weights, gradients and Adam's state on each of `shards` GPUs, 16 a parameter in all.

    Mixed precision: 2 for the weight, 2 for the gradient, 12 for the fp32 weight and two moments (Rajbhandari et al.
    2020, section 3.1); all three sharded.
    """
    _check_positive("params", params)
    check_positive_int("shards", shards)
    return 16 * params / shards


def layer_activation_bytes(model: ModelShape, tokens: int, itemsize: float = 2) -> float:
    """Bytes that one layer keeps for its backward pass when attention is fused and nothing is recomputed.

    Per token: the inputs and outputs of two norms (``4 M``), Q and the attention output (``2 Hq D``), K and V
    (``2 Hkv D``), gate, up and their product (``3 F``), and one fp32 log-sum-exp a head. No ``N x N`` matrix.
    """
    check_positive_int("tokens", tokens)
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    return tokens * (itemsize * (4 * model.width + attention + 3 * model.ffn_width) + 4 * model.num_heads)


def training_flops(model: ModelShape, seqlen: int, recompute: bool = False) -> float:
    """FLOPs of one training step over one sequence: forward, backward, and a second forward if recomputed.

    Dense layers and output layer: 2 a weight and token forward, 4 backward. Attention: causal forward and 2.5 times
    that backward.
    """
    check_positive_int("seqlen", seqlen)
    forwards = 2 if recompute else 1
    dense = (forwards + 2) * cost.linear_flops(seqlen, model.read_params)
    one = cost.attention_flops(1, model.num_heads, seqlen, seqlen, model.head_dim, causal=True)
    return dense + (forwards + 2.5) * model.num_layers * one


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise ValueError(f"{name}: expected a share above 0 and up to 1, got {value!r}")
