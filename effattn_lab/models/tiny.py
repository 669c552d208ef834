"""A decoder of nanoGPT's size whose token mixer can be swapped: softmax attention, or any layer of the book.

    x = embed(ids)
    for each block:  x = x + mixer(norm(x));  x = x + mlp(norm(x))
    logits = norm(x) embed^T

A mixer is any module ``[B, N, M] -> [B, N, M]`` with ``forward(x, state=None, *, return_state=False)`` and
``step(state, x) -> (out, state)``. Whatever it wants to remember is its state; the model only carries it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab._validate import check_positive_int
from effattn_lab.models.conv_mixer import ShortConvolution

MLPS = ("swiglu", "gelu")


class SwiGLU(nn.Module):
    """``(silu(x W_g) * (x W_u)) W_d``, three matrices, no biases (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class BlockState(NamedTuple):
    """What one block keeps between calls: the short convolution's tail (None without one) and the mixer's state."""

    tail: torch.Tensor | None
    mixer: Any


class Block(nn.Module):
    """Pre-norm residual block around any mixer; with ``conv`` a short convolution feeds it."""

    mixer: Any  # an nn.Module with a ``step``

    def __init__(self, width: int, mixer: nn.Module, mlp: str, mlp_width: int, conv: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.conv = ShortConvolution(width, conv) if conv else None
        self.mixer = mixer
        self.mlp: nn.Module | None = None
        if mlp_width:
            self.mlp_norm = nn.RMSNorm(width)
            self.mlp = SwiGLU(width, mlp_width)
            if mlp == "gelu":
                self.mlp = nn.Sequential(
                    nn.Linear(width, mlp_width, bias=False),
                    nn.GELU(),
                    nn.Linear(mlp_width, width, bias=False),
                )

    def mix(
        self, x: torch.Tensor, state: BlockState | None = None, *, step: bool = False, keep: bool = False
    ) -> tuple[torch.Tensor, BlockState | None]:
        """The first half: tokens see each other. ``x [B, N, M]``; ``step``: one token, ``keep``: return a state."""
        h, tail = self.norm(x), None
        if self.conv is not None:
            h, tail = self.conv.step(None if state is None else state.tail, h)
        past = None if state is None else state.mixer
        kept = None
        if step:
            h, kept = self.mixer.step(past, h)
        elif keep:
            h, kept = self.mixer(h, past, return_state=True)
        else:
            h = self.mixer(h, past)
        return x + h, BlockState(tail, kept) if step or keep else None

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        """The second half, each token by itself: ``x [..., M]``."""
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))


class TinyDecoder(nn.Module):
    """A language model, ``ids [B, N] -> logits [B, N, V]``, one block for each mixer given.

    Args:
        vocab_size: V.
        width: M.
        mixers: one module a block, see the head of this module.
        mlp: "swiglu" or "gelu".
        mlp_width: hidden units of each MLP; 0 leaves the MLPs out, as Zoology's recall models do. Default ``4 * M``
            for GELU, and two thirds of that for SwiGLU, which has three matrices. A sequence: one for each.
        conv: taps of a short convolution in front of every mixer, 0 for none. Default 0.
        tie_embeddings: the output matrix is the embedding. Default True.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        mixers: Sequence[nn.Module],
        *,
        mlp: str = "swiglu",
        mlp_width: int | Sequence[int] | None = None,
        conv: int = 0,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        check_positive_int("vocab_size", vocab_size)
        check_positive_int("width", width)
        if mlp not in MLPS:
            raise ValueError(f"mlp: expected one of {', '.join(MLPS)}, got {mlp!r}")
        if mlp_width is None:
            mlp_width = 4 * width if mlp == "gelu" else round(8 * width / 3)
        if not mixers or not all(isinstance(m, nn.Module) for m in mixers):
            raise ValueError(f"mixers: expected at least one nn.Module, got {mixers!r}")
        widths = list(mlp_width) if isinstance(mlp_width, Sequence) else [mlp_width] * len(mixers)
        if len(widths) != len(mixers):
            raise ValueError(f"mlp_width: expected one for each of {len(mixers)} blocks, got {len(widths)}")
        for name, value in (*(("mlp_width", w) for w in widths), ("conv", conv)):
            if value != 0:
                check_positive_int(name, value)
        if len({id(m) for m in mixers}) < len(mixers):
            raise ValueError("mixers: expected a module of its own for each block, got one twice")
        self.vocab_size, self.width = vocab_size, width
        self.embed = nn.Embedding(vocab_size, width)
        # Tied: with 1 / sqrt(M), the first logits have standard deviation 1 after the norm.
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(Block(width, m, mlp, w, conv) for m, w in zip(mixers, widths))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embed.weight

    @property
    def mixers(self) -> list[nn.Module]:
        """The mixer of each block."""
        return [cast(Block, block).mixer for block in self.blocks]

    def forward(
        self, ids: torch.Tensor, state: list[BlockState] | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, list[BlockState]]:
        """Logits of the token after each position; with ``return_state`` also what to go on from.

        Args:
            ids: int64 ``[B, N]``, each 0..V - 1.
            state: from an earlier call, for a sequence that goes on. Default: none.
        """
        x, kept = self._hidden(ids, state, keep=return_state)
        return (self.head(x), kept) if return_state else self.head(x)

    def step(
        self, state: list[BlockState] | None, ids: torch.Tensor
    ) -> tuple[torch.Tensor, list[BlockState]]:
        """One token, ``ids [B, 1]`` to ``(logits [B, 1, V], state)``: the numbers of :meth:`forward`."""
        if ids.dim() != 2 or ids.shape[1] != 1:
            raise ValueError(f"ids: expected one token a sequence [B, 1], got shape {tuple(ids.shape)}")
        x, kept = self._hidden(ids, state, step=True)
        return self.head(x), kept

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats over the positions whose target is not -100; only they get logits.

        Args:
            ids: int64 ``[B, N]``.
            targets: int64 ``[B, N]``: the token wanted at each position, -100 where nothing is asked.
        """
        x, asked = self._asked(ids, targets)
        return F.cross_entropy(self.head(x), targets[asked])

    @torch.no_grad()
    def accuracy(self, ids: torch.Tensor, targets: torch.Tensor) -> float:
        """Share of the asked positions where the likeliest token is the target."""
        x, asked = self._asked(ids, targets)
        return (self.head(x).argmax(-1) == targets[asked]).double().mean().item()

    @torch.no_grad()
    def generate(
        self,
        ids: torch.Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continue ``ids [B, N]`` by ``max_new_tokens`` and return those, ``[B, max_new_tokens]``.

        The prompt is read once in parallel; each new token costs one :meth:`step` on the states.

        Args:
            temperature: 0 takes the likeliest token (default), else tokens are drawn from ``softmax(logits / T)``.
            generator: of the draws, for a repeatable text.
        """
        check_positive_int("max_new_tokens", max_new_tokens)
        if not temperature >= 0:
            raise ValueError(f"temperature: expected a number of at least 0, got {temperature!r}")
        x, state = self._hidden(ids, None, keep=True)
        logits = self.head(x[:, -1:])
        out = []
        for i in range(max_new_tokens):
            if temperature == 0:
                token = logits[:, -1].argmax(-1, keepdim=True)
            else:
                probs = torch.softmax(logits[:, -1].float() / temperature, dim=-1)
                token = torch.multinomial(probs, 1, generator=generator)
            out.append(token)
            if i + 1 < max_new_tokens:
                logits, state = self.step(state, token)
        return torch.cat(out, dim=1)

    def _asked(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if targets.shape != ids.shape:
            raise ValueError(
                f"targets: expected the shape of ids {tuple(ids.shape)}, got {tuple(targets.shape)}"
            )
        asked = targets != -100
        if not asked.any():
            raise ValueError("targets: expected at least one position that is not -100, got none")
        return self._hidden(ids, None, asked=asked)[0], asked

    def _hidden(
        self,
        ids: torch.Tensor,
        state: list[BlockState] | None,
        *,
        step: bool = False,
        keep: bool = False,
        asked: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[BlockState]]:
        """After the last norm: ``[B, N, M]``, or ``[asked, M]``; the last MLP works on no more than that."""
        if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 2 or 0 in ids.shape:
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(f"ids: expected int64 token numbers [B, N], got {got}")
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(
                f"state: expected one entry for each of {len(self.blocks)} blocks, got {len(state)}"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise ValueError(
                f"ids: expected numbers from 0 to {self.vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        x, kept = self.embed(ids), cast(list[BlockState], [])
        for i, module in enumerate(self.blocks):
            block = cast(Block, module)
            x, left = block.mix(x, None if state is None else state[i], step=step, keep=keep)
            if asked is not None and i + 1 == len(self.blocks):
                x = x[asked]
            x = block.feed(x)
            kept.append(cast(BlockState, left))
        return self.norm(x), kept


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers of a module; a shared matrix counts once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def match_parameters(
    build: Callable[[int], nn.Module], target: int, *, rtol: float = 0.01, min_width: int = 1
) -> int:
    """The MLP width that gives a model ``target`` parameters: the MLP absorbs what the mixers differ by.

    The count is affine in the width, so two trial models give slope and intercept, and the nearest integer follows.

    Args:
        build: ``build(mlp_width)`` makes the model.
        target: parameters wanted.
        rtol: how far off it may be. Default 1 %.
        min_width: the smallest width that is still an MLP. Default 1.

    Raises:
        ValueError: if no width of at least ``min_width`` comes within ``rtol``: the mixers alone are too large, or
            one hidden unit is more than 2 % of the model.
    """
    check_positive_int("target", target)
    first, second = count_parameters(build(1)), count_parameters(build(2))
    slope = second - first
    if slope < 1:
        raise ValueError(f"build: expected more parameters with a wider MLP, got {first} and {second}")
    width = max(min_width, round(1 + (target - first) / slope))
    got = first + slope * (width - 1)
    if abs(got - target) > rtol * target:
        raise ValueError(
            f"target: expected a number that an MLP of at least {min_width} units meets within {rtol:.1%}, "
            f"got {target}; the nearest is {got} with {width} units"
        )
    return width


def state_elements(mixer: nn.Module, width: int, length: int = 64) -> int:
    """Numbers that a mixer keeps for one sequence after ``length`` tokens, counted in its state, not in a formula.

    Every tensor in the state counts but those of integers (a position is no memory of content). For softmax attention
    the count grows with ``length``; for the others it must not.

    Args:
        mixer: a token mixer of ``width``.
        width: M.
        length: tokens read. Default 64.
    """
    check_positive_int("length", length)
    with torch.no_grad():
        first = next(mixer.parameters())
        x = torch.zeros(1, length, width, dtype=first.dtype, device=first.device)
        _, state = mixer(x, None, return_state=True)
    return _elements(state)


def _elements(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() if state.is_floating_point() else 0
    if isinstance(state, dict):
        return sum(_elements(s) for s in state.values())
    if isinstance(state, tuple | list):
        return sum(_elements(s) for s in state)
    if hasattr(state, "__dataclass_fields__"):
        return sum(_elements(getattr(state, name)) for name in state.__dataclass_fields__)
    return 0
