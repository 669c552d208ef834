"""Shapes of known models, and what one step of them costs on a GPU.

The chapter's calculator (``_sims/roofline-calculator.js``) repeats :func:`estimate` in the browser; a test holds
the two together. Only dense decoders with a gated MLP are described here (three ``width x ffn_width`` matrices).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from effattn_lab._validate import check_positive_int
from effattn_lab.foundations import cost_model as cost


@dataclass(frozen=True)
class ModelShape:
    """The numbers that decide what a decoder costs.

    Args:
        name: as its authors write it.
        num_layers, width, num_heads, num_kv_heads, head_dim, ffn_width, vocab_size: the shape.
        tied: True when the output layer reuses the input embedding table.
        source: where the shape is published.
    """

    name: str
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    vocab_size: int
    tied: bool
    source: str

    @property
    def layer_params(self) -> int:
        """Weights of one layer that multiply: Q, K, V, O projections and the three MLP matrices."""
        projections = 2 * self.width * self.head_dim * (self.num_heads + self.num_kv_heads)
        return projections + 3 * self.width * self.ffn_width

    @property
    def head_params(self) -> int:
        """Weights of the output layer, ``vocab_size * width``."""
        return self.vocab_size * self.width

    @property
    def read_params(self) -> int:
        """Weights that a step reads: every layer and the output layer. An untied input table is only looked up."""
        return self.num_layers * self.layer_params + self.head_params

    @property
    def total_params(self) -> int:
        """Weights that must be stored: as above, plus an untied input table, plus the norms."""
        table = 0 if self.tied else self.head_params
        return self.read_params + table + (2 * self.num_layers + 1) * self.width


MODELS: dict[str, ModelShape] = {
    m.name: m
    for m in (
        ModelShape("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256, False, "arXiv:2407.21783"),
        ModelShape("Llama-2-7B", 32, 4096, 32, 32, 128, 11008, 32000, False, "arXiv:2307.09288"),
        ModelShape("Llama-3-70B", 80, 8192, 64, 8, 128, 28672, 128256, False, "arXiv:2407.21783"),
        ModelShape(
            "LLaMA-1B", 24, 2048, 32, 32, 64, 5461, 32000, False, "arXiv:2403.03507, its 1B configuration"
        ),
        ModelShape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, True, "arXiv:2502.02737"),
    )
}


def crossover_length(model: ModelShape, *, per_token: bool = False, output_layer: bool = False) -> float:
    """Sequence length at which causal attention needs as many FLOPs as the dense layers.

    Over a whole prompt a token sees ``N / 2`` keys on average and ``N* = layer_params / (Hq D)``. For the last
    token alone (``per_token=True``) it sees all N, and ``N*`` is half of that. ``output_layer=True`` counts the
    output layer among the dense ones for every token, as in training.
    """
    dense = model.layer_params + (model.head_params / model.num_layers if output_layer else 0)
    return dense / (model.num_heads * model.head_dim) / (2 if per_token else 1)


@dataclass(frozen=True)
class Part:
    """One kind of work in a step: FLOPs, bytes moved, FLOP/byte, least time in seconds, which bound."""

    flops: float
    nbytes: float
    intensity: float
    time_s: float
    bound: str


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` returns; times in seconds, sizes in bytes."""

    dense: Part
    attention: Part
    time_s: float
    tokens_per_s: float
    weights_bytes: float
    kv_cache_bytes: float
    fits: bool


def _part(flops: float, nbytes: float, peak_flops: float, bandwidth: float) -> Part:
    bound = "compute" if flops / peak_flops >= nbytes / bandwidth else "memory"
    time_s = cost.roofline_time(flops, nbytes, peak_flops, bandwidth)
    return Part(flops, nbytes, cost.intensity(flops, nbytes), time_s, bound)


def estimate(
    model: ModelShape,
    *,
    peak_flops: float,
    bandwidth: float,
    memory_bytes: float,
    phase: str,
    seqlen: int,
    batch: int = 1,
    weight_itemsize: float = 2,
    cache_itemsize: float = 2,
    kernel: str = "flash",
) -> Estimate:
    """Least time of one forward step by the roofline, dense layers and attention each against its own bound.

    Args:
        model: the shape.
        peak_flops: FLOP/s of the matrix units. bandwidth: bytes/s of main memory. memory_bytes: its size.
        phase: ``"prefill"`` (``seqlen`` new tokens a sequence) or ``"decode"`` (one, over ``seqlen`` cached ones).
        seqlen: N. batch: sequences.
        weight_itemsize, cache_itemsize: bytes per weight and per cached, query or output element.
        kernel: ``"flash"`` (half the square, nothing of size N x N moved) or ``"naive"`` (the whole square,
            scores and probabilities written and read). In decode they cost the same and flash is counted.

    Returns:
        an :class:`Estimate`. Activations of the dense layers are left out; the output layer runs for one token a
        sequence, as it does when serving. ``fits`` compares weights and cache with ``memory_bytes``.

    Raises:
        ValueError: for an unknown phase or kernel, or a length or batch below 1.
    """
    check_positive_int("seqlen", seqlen)
    check_positive_int("batch", batch)
    if phase not in ("prefill", "decode"):
        raise ValueError(f"phase: expected 'prefill' or 'decode', got {phase!r}")
    if kernel not in ("flash", "naive"):
        raise ValueError(f"kernel: expected 'flash' or 'naive', got {kernel!r}")
    heads, kv_heads, dim = model.num_heads, model.num_kv_heads, model.head_dim
    new_tokens = batch * (seqlen if phase == "prefill" else 1)
    dense = _part(
        cost.linear_flops(new_tokens, model.num_layers * model.layer_params)
        + cost.linear_flops(batch, model.head_params),
        cost.linear_bytes(model.read_params, weight_itemsize),
        peak_flops,
        bandwidth,
    )
    if phase == "decode":
        flops = cost.decode_flops(batch, heads, seqlen, dim)
        nbytes = cost.decode_bytes(batch, heads, kv_heads, seqlen, dim, cache_itemsize)
    else:
        traffic = cost.flash_bytes if kernel == "flash" else cost.naive_bytes
        flops = cost.attention_flops(batch, heads, seqlen, seqlen, dim, causal=kernel == "flash")
        nbytes = traffic(batch, heads, kv_heads, seqlen, seqlen, dim, cache_itemsize)
    attention = _part(model.num_layers * flops, model.num_layers * nbytes, peak_flops, bandwidth)
    time_s = dense.time_s + attention.time_s
    weights = cost.linear_bytes(model.total_params, weight_itemsize)
    cache = cost.kv_cache_bytes(model.num_layers, kv_heads, dim, seqlen, batch, cache_itemsize)
    return Estimate(
        dense, attention, time_s, new_tokens / time_s, weights, cache, weights + cache <= memory_bytes
    )


def calculator_data() -> dict[str, Any]:
    """The tables that the in-page calculator shows: models and GPUs, as plain JSON-ready dictionaries."""
    from effattn_lab.measure.roofline import GPUS

    gpus = [
        {
            "name": gpu.name,
            "peak_tflops": gpu.fp16_tflops,
            "bandwidth_gbs": gpu.bandwidth_gbs,
            "memory_gb": gpu.memory_gb,
        }
        for gpu in GPUS.values()
    ]
    return {"models": [asdict(m) for m in MODELS.values()], "gpus": gpus}
