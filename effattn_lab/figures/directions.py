"""What a decode step holds and reads at 128K tokens, for one model of each kind on the map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from effattn_lab.figures import style
from effattn_lab.foundations.cost_model import kv_cache_bytes, mla_cache_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Tokens in the context of the comparison.
SEQLEN = 131_072
GIB = 2**30


@dataclass(frozen=True)
class Step:
    """One decode step of one sequence, attention and state alone (no weights).

    Attributes:
        model: what is computed.
        leaf: its place on the map.
        plain: the same for a reader who does not know the map yet: what it keeps of the past.
        held: bytes that stay in memory between steps.
        moved: bytes read, and for a recurrent state also written, by one step.
    """

    model: str
    leaf: str
    plain: str
    held: float
    moved: float


def delta_state_bytes(
    num_layers: int, num_heads: int = 32, key_dim: int = 128, value_dim: int = 128, itemsize: int = 4
) -> int:
    """Bytes of the matrix states of Gated DeltaNet layers, in fp32 as the released Qwen3-Next code keeps them."""
    return num_layers * num_heads * key_dim * value_dim * itemsize


def steps(seqlen: int = SEQLEN) -> list[Step]:
    """The comparison at ``seqlen`` tokens, batch 1, 2-byte cache.

    Shapes: Llama-2-7B 32 layers, 32 key-value heads of 128 (made for 4,096 tokens); Llama-3-8B 8 such heads;
    DeepSeek-V3 61 layers, latent 512 + 64; Jamba 4 attention layers of 32, 28 Mamba states of 8192 x 16;
    Qwen3-Next 12 full layers of 48 with 2 key-value heads of 256. Quest: pages of 16 tokens, a budget of 4096
    tokens in every layer; its minima and maxima take 1/16 of the cache. StreamingLLM: 4 first tokens and 2044
    recent ones.
    """
    llama = kv_cache_bytes(32, 8, 128, seqlen)
    mla = mla_cache_bytes(61, 512, 64, seqlen)
    jamba, jamba_state = kv_cache_bytes(4, 8, 128, seqlen), 28 * 8192 * 16 * 4
    qwen, qwen_state = kv_cache_bytes(12, 2, 256, seqlen), delta_state_bytes(36)
    window = kv_cache_bytes(32, 8, 128, min(seqlen, 2048))
    linear = delta_state_bytes(48)
    return [
        Step(
            "Llama-2-7B shape, a KV head per query head",
            "no leaf",
            "Llama-2-7B: every token, once for each head",
            4 * llama,
            4 * llama,
        ),
        Step(
            "Llama-3-8B, 8 KV heads (GQA)",
            "leaf 4.2",
            "Llama-3-8B: every token, once for four heads",
            llama,
            llama,
        ),
        Step("DeepSeek-V3 (MLA)", "leaf 4.2", "DeepSeek-V3: every token, compressed", mla, mla),
        Step(
            "Qwen3-Next, 12 of 48 attend",
            "leaf 6.1",
            "Qwen3-Next: a summary in 3 of 4 layers",
            qwen + qwen_state,
            qwen + 2 * qwen_state,
        ),
        Step(
            "Jamba, 4 of 32 layers attend",
            "leaf 6.1",
            "Jamba: a summary in 7 of 8 layers",
            jamba + jamba_state,
            jamba + 2 * jamba_state,
        ),
        Step(
            "Llama-3-8B with Quest",
            "leaf 3.3",
            "Quest: every token, but reads the best 3 %",
            llama * 17 / 16,
            llama * (1 / 16 + min(1.0, 4096 / seqlen)),
        ),
        Step(
            "Llama-3-8B with StreamingLLM",
            "leaf 3.3",
            "StreamingLLM: 2,048 tokens, forgets the rest",
            window,
            window,
        ),
        Step(
            "48 Gated DeltaNet layers", "leaf 2.1", "Gated DeltaNet: a summary, no token", linear, 2 * linear
        ),
    ]


def readable(nbytes: float) -> str:
    """``nbytes`` in MiB below half a GiB, else in GiB, with two digits."""
    if nbytes < GIB / 2:
        return f"{nbytes / 2**20:.0f} MiB"
    return f"{nbytes / GIB:.2g} GiB"


def decode_bytes_figure(seqlen: int = SEQLEN, *, plain: bool = False) -> Figure:
    """Bars of the bytes that one more token costs: held in memory, and moved by the step (logarithmic axis).

    Args:
        seqlen: tokens in the context.
        plain: label each pair with what it keeps of the past; otherwise with its shape and its leaf on the map.
    """
    import matplotlib.pyplot as plt

    style.use()
    rows = steps(seqlen)
    fig, ax = plt.subplots(figsize=(5.6, 5.8))
    left = 0.05
    for i, row in enumerate(rows):
        name = row.plain if plain else f"{row.model} · {row.leaf}"
        ax.text(left * 1.06, i - 0.33, name, va="center", fontsize=10.5)
        for y, nbytes, held in ((i - 0.04, row.held, True), (i + 0.22, row.moved, False)):
            look = (
                {"color": "white", "edgecolor": style.COLORS["memory"], "hatch": "////"}
                if held
                else {"color": style.COLORS["compute"]}
            )
            label = None if i else "held in memory" if held else "moved for one token"
            ax.barh(y, nbytes / GIB - left, left=left, height=0.23, label=label, **look)
            ax.text(nbytes / GIB * 1.1, y, readable(nbytes), va="center", fontsize=10)
    ax.set_yticks([])
    ax.set_ylim(len(rows) - 0.5, -0.6)
    ax.set_xscale("log")
    ax.set_xlim(left, 250)
    ax.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    ax.set_xlabel(f"GiB for one sequence of {seqlen:,} tokens")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncol=2)
    fig.tight_layout()
    return fig
