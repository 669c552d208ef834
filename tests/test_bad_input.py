"""Bad input gets a ValueError that names the argument, from every mechanism, before any work."""

import numpy as np
import pytest
import torch

from effattn_lab.foundations.attention import attention, lse, visible
from effattn_lab.full.flash import flash_attention, merge, online_softmax
from effattn_lab.measure.roofline import gpu, predict
from effattn_lab.measure.timing import measure

MECHANISMS = {"attention": attention, "flash_attention": flash_attention}


def good(**change):
    tensors = {
        "q": torch.randn(1, 4, 6, 8),
        "k": torch.randn(1, 2, 6, 8),
        "v": torch.randn(1, 2, 6, 8),
    }
    tensors.update(change)
    return tensors


CASES = {
    "rank": ({"q": torch.randn(4, 6, 8)}, "q: expected 4 dimensions"),
    "not-a-tensor": ({"k": np.zeros((1, 2, 6, 8))}, "k: expected a torch.Tensor, got ndarray"),
    "integers": (
        {"q": torch.ones(1, 4, 6, 8, dtype=torch.int64)},
        "q: expected float16, bfloat16, float32 or float64",
    ),
    "float8": ({"v": torch.randn(1, 2, 6, 8).to(torch.float8_e4m3fn)}, "v: expected float16"),
    "sparse": ({"q": torch.zeros(1, 4, 6, 8).to_sparse()}, "q: expected a dense tensor"),
    "length-0": ({"k": torch.randn(1, 2, 0, 8), "v": torch.randn(1, 2, 0, 8)}, "k: expected every dimension"),
    "batch": (
        {"k": torch.randn(2, 2, 6, 8), "v": torch.randn(2, 2, 6, 8)},
        "k: expected the batch size of q",
    ),
    "head-dim": (
        {"k": torch.randn(1, 2, 6, 16), "v": torch.randn(1, 2, 6, 16)},
        "k: expected the head_dim of q",
    ),
    "v-length": ({"v": torch.randn(1, 2, 5, 8)}, "v: expected the shape of k"),
    "groups": (
        {"k": torch.randn(1, 3, 6, 8), "v": torch.randn(1, 3, 6, 8)},
        "k: expected num_kv_heads to divide",
    ),
    "dtypes": ({"v": torch.randn(1, 2, 6, 8).half()}, "v: expected the dtype of q"),
    "devices": ({"k": torch.randn(1, 2, 6, 8, device="meta")}, "k: expected the device of q"),
    "scale-nan": ({"scale": float("nan")}, "scale: expected a finite number"),
    "scale-text": ({"scale": "1"}, "scale: expected a finite number"),
}


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("case", CASES)
def test_attention_arguments(name, case):
    change, message = CASES[case]
    arguments = good(**change)
    with pytest.raises(ValueError, match=message):
        MECHANISMS[name](arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(**good(), mask=torch.zeros(6, 6)), "mask: expected dtype torch.bool"),
        (lambda: attention(**good(), mask=torch.ones(5, 6, dtype=torch.bool)), "mask: expected a shape"),
        (lambda: attention(**good(), window_size=0), "window_size: expected an integer of at least 1, got 0"),
        (lambda: lse(torch.randn(3), torch.randn(3)), "q: expected 4 dimensions"),
        (lambda: visible(2, 2, window_size=1.5), "window_size"),
        (lambda: flash_attention(**good(), block_q=0), "block_q"),
        (lambda: flash_attention(**good(), block_k=2.0), "block_k"),
        (lambda: online_softmax(torch.ones(3, dtype=torch.int32)), "scores: expected a floating-point"),
        (lambda: online_softmax(torch.ones(3, 0)), "scores"),
        (lambda: online_softmax(torch.ones(3), block=0), "block"),
        (
            lambda: merge(torch.ones(2, 3), torch.ones(3), torch.ones(2, 3), torch.ones(2)),
            "lse_a: expected shape",
        ),
        (lambda: merge(torch.ones(2, 3), torch.ones(2), torch.ones(2, 4), torch.ones(2)), "o_b"),
        (lambda: gpu("V100"), "gpu: expected one of T4, L4"),
        (lambda: predict(1.0, 0.0, "T4"), "nbytes"),
        (lambda: predict(float("nan"), 1.0, "T4"), "flops"),
        (lambda: measure(sum, [1], min_run_time=0), "min_run_time"),
        (lambda: measure(sum, [1], device="tpu"), "device: expected 'cpu'"),
        (lambda: gpu(None), "gpu: expected one of T4"),
    ],
)
def test_other_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
