"""The book's token mixers by name, built for a width, a size and a number of heads: what the recall study compares.

A mixer whose module is not there is not listed: the table names modules, and looks whether they can be imported.
Each is built as its paper has it: DeltaNet and both Mambas with their short convolution, the others without one.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

from torch import nn

from effattn_lab._validate import check_positive_int


class Entry(NamedTuple):
    """How one mixer is built.

    Args:
        label: as pictures and tables call it.
        module, layer: where its class is.
        options: keywords that never change.
        sizes: what the study tries. The first is the middle one: there the learning rate is chosen, and a study with
            one size takes it.
        positions: the keyword that switches rotary positions, if the layer has them.
        headless: Mamba: every channel is a head with a value of one number, and ``size`` its hidden numbers.
    """

    label: str
    module: str
    layer: str
    options: dict[str, Any]
    sizes: tuple[int, ...]
    positions: str | None = None
    headless: bool = False


_LINEAR = "effattn_lab.linear.linear_attention_layer"
_GATED = "effattn_lab.linear.gated_linear_layer"
_DELTA = "effattn_lab.linear.delta_rule_layer"
_ZEROS = "effattn_lab.linear.zeros_layer"

#: ``size`` is the dimension of one head's keys. With values of ``width / heads`` a plain state has ``size * width``
#: numbers, however many heads there are; ZeroS has three of them, Taylor's map ``1 + d + d^2`` features for size d.
MIXERS: dict[str, Entry] = {
    "softmax": Entry(
        "softmax attention",
        "effattn_lab.models.softmax_layer",
        "SoftmaxAttention",
        {},
        (8, 2, 32),
        positions="positions",
    ),
    "linear_attention": Entry(
        "linear attention, elu + 1", _LINEAR, "LinearAttention", {"feature_map": "elu"}, (8, 2, 32)
    ),
    "linear_taylor": Entry(
        "linear attention, Taylor", _LINEAR, "LinearAttention", {"feature_map": "taylor"}, (4, 2)
    ),
    "gated_linear": Entry(
        "gated linear (GLA)",
        _GATED,
        "GatedLinear",
        {"gate": "gla"},
        (8, 2, 32),
    ),
    "ssd": Entry(
        "gated linear (Mamba-2)",
        _GATED,
        "GatedLinear",
        {"gate": "ssd"},
        (8, 2, 32),
    ),
    "delta_rule": Entry("delta rule (DeltaNet)", _DELTA, "DeltaRule", {}, (8, 2, 32)),
    "delta_no_conv": Entry("delta rule, no convolution", _DELTA, "DeltaRule", {"conv_width": 0}, (8,)),
    # The authors' epsilon of 1e-5 is far above the variance of the outputs at first: the second entry shows it.
    "zeros": Entry("ZeroS", _ZEROS, "ZeroS", {"norm_eps": 1e-12}, (4, 2, 16), positions="rope"),
    "zeros_eps": Entry("ZeroS, the authors' epsilon", _ZEROS, "ZeroS", {}, (4,), positions="rope"),
    "selective_ssm": Entry(
        "selective SSM (Mamba-1)",
        "effattn_lab.linear.selective_ssm_layer",
        "Mamba",
        {"expand": 1},
        (8, 2),
        headless=True,
    ),
}


def available() -> list[str]:
    """Names of the mixers whose module is installed, in the table's order."""
    return [name for name, entry in MIXERS.items() if importlib.util.find_spec(entry.module) is not None]


def build_mixer(name: str, width: int, size: int, heads: int = 1, *, positions: bool = False) -> nn.Module:
    """A new mixer.

    Args:
        name: one of :func:`available`.
        width: M, model width.
        size: dimension of one head's keys, which sets the state's size.
        heads: divides ``width``; values have ``width / heads`` dimensions. Default 1.
        positions: rotary positions where the layer has them. Default False.

    Raises:
        ValueError: for a name that is not in the table, or whose module is not there.
    """
    for what, value in (("width", width), ("size", size), ("heads", heads)):
        check_positive_int(what, value)
    if width % heads:
        raise ValueError(f"heads: expected a divisor of width ({width}), got {heads}")
    if name not in available():
        raise ValueError(f"name: expected one of {', '.join(available())}, got {name!r}")
    entry = MIXERS[name]
    layer = getattr(importlib.import_module(entry.module), entry.layer)
    options = dict(entry.options)
    if entry.positions:
        options[entry.positions] = positions
    if entry.headless:
        made: nn.Module = layer(width, state_size=size, **options)
    else:
        made = layer(width, heads, head_dim=size, value_dim=width // heads, **options)
    return made
