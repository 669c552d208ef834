"""What a GPU could do at best: peaks, bandwidths and the roofline prediction.

The peaks are *dense* tensor-core rates. Vendors' headline numbers with structured sparsity are twice these.
"""

from __future__ import annotations

from dataclasses import dataclass

from effattn_lab.foundations import cost_model


@dataclass(frozen=True)
class GPU:
    """Peak rates of one GPU.

    Attributes:
        name: the key in :data:`GPUS`.
        sm: compute capability as x-ray names it (``sm_90``), or AMD's architecture (``gfx942``).
        fp16_tflops: dense fp16 tensor-core peak, TFLOP/s.
        fp32_tflops: fp32 peak outside the tensor cores, TFLOP/s.
        bandwidth_gbs: main-memory bandwidth, GB/s (10^9 bytes).
        memory_gb: main memory, GB (10^9 bytes).
        sms: streaming multiprocessors (compute units on AMD).
        shared_kib: shared memory that one thread block may take at most, KiB.
        l2_mib: last-level cache, MiB.
        bf16: does it have bf16 tensor cores?
        source: where the figures come from.
    """

    name: str
    sm: str
    fp16_tflops: float
    fp32_tflops: float
    bandwidth_gbs: float
    memory_gb: float
    sms: int
    shared_kib: int
    l2_mib: int
    bf16: bool
    source: str

    @property
    def peak_flops(self) -> float:
        """Dense fp16 peak in FLOP/s."""
        return self.fp16_tflops * 1e12

    @property
    def bandwidth(self) -> float:
        """Main-memory bandwidth in bytes/s."""
        return self.bandwidth_gbs * 1e9

    @property
    def ridge(self) -> float:
        """Intensity in FLOP/byte above which arithmetic is the limit."""
        return cost_model.ridge(self.peak_flops, self.bandwidth)


_NVIDIA = "vendor data sheet, dense rates"
_LIST = "vendor figures as commonly listed; not confirmed against the data sheet for this book"
GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        #   name, sm, fp16 TFLOP/s, fp32 TFLOP/s, GB/s, GB, SMs, KiB per block, L2 MiB, bf16, source
        GPU("T4", "sm_75", 65, 8.1, 320, 16, 40, 64, 4, False, _NVIDIA),
        GPU("L4", "sm_89", 121, 30.3, 300, 24, 58, 99, 48, True, _LIST),
        GPU("A100", "sm_80", 312, 19.5, 2039, 80, 108, 163, 40, True, _NVIDIA + " (80 GB SXM)"),
        GPU("H100", "sm_90", 989, 67, 3350, 80, 132, 227, 50, True, _NVIDIA + " (SXM)"),
        GPU("H200", "sm_90", 989, 67, 4800, 141, 132, 227, 50, True, _NVIDIA + " (SXM)"),
        GPU("B200", "sm_100", 2250, 75, 8000, 180, 148, 227, 126, True, _LIST + " (some lists: 7700 GB/s)"),
        GPU("RTX PRO 6000", "sm_120", 504, 126, 1792, 96, 188, 99, 128, True, _LIST),
        GPU("MI300X", "gfx942", 1307, 163, 5300, 192, 304, 64, 256, True, _LIST),
    )
}


@dataclass(frozen=True)
class Prediction:
    """Roofline bound for one operation on one GPU: nothing can be faster, most things are slower."""

    gpu: str
    time_s: float
    bound: str  # "compute" or "memory"
    intensity: float  # FLOP/byte


def gpu(name: str) -> GPU:
    """Look a GPU up by name, whatever the case; ``ValueError`` lists the names there are."""
    for key, value in GPUS.items():
        if isinstance(name, str) and key.lower() == name.lower():
            return value
    raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {name!r}")


def predict(flops: float, nbytes: float, gpu_name: str | GPU) -> Prediction:
    """Least time for ``flops`` FLOPs (fp16 tensor cores) and ``nbytes`` bytes of main-memory traffic.

    Args:
        flops: floating-point operations, a multiply-add counted as two.
        nbytes: bytes moved to and from main memory; above 0.
        gpu_name: a key of :data:`GPUS`, or a :class:`GPU` of your own.
    """
    if not nbytes > 0:
        raise ValueError(f"nbytes: expected a positive number of bytes, got {nbytes!r}")
    if not flops >= 0:
        raise ValueError(f"flops: expected a number of at least 0, got {flops!r}")
    chip = gpu_name if isinstance(gpu_name, GPU) else gpu(gpu_name)
    ratio = cost_model.intensity(flops, nbytes)
    return Prediction(
        gpu=chip.name,
        time_s=cost_model.roofline_time(flops, nbytes, chip.peak_flops, chip.bandwidth),
        bound="compute" if ratio > chip.ridge else "memory",
        intensity=ratio,
    )
