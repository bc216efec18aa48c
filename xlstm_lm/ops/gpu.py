"""Facts about GPUs: one row for each architecture that the kernels are launched on, one for each product.

A new product is a row of `GPUS`. A new architecture is a row of `ARCHITECTURES` too; `python -m eval.compile_report
--targets NAME` then compiles every kernel for it and shows whether each fits.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch

KIB = 1024


class Architecture(NamedTuple):
    """Limits of one processor (a multiprocessor of NVIDIA, a compute unit of AMD)."""

    launches: str
    """The architecture whose launch parameters the Triton kernels use here: sm_80, sm_90, sm_100 or gfx942."""
    shared_bytes: int
    """Shared memory of a block at most, in bytes, where a kernel opts in."""
    registers: int = 65536
    """32-bit registers of a processor."""


ARCHITECTURES = {
    "sm_80": Architecture("sm_80", 163 * KIB),
    "sm_86": Architecture("sm_80", 99 * KIB),
    "sm_87": Architecture("sm_80", 163 * KIB),
    "sm_89": Architecture("sm_80", 99 * KIB),
    "sm_90": Architecture("sm_90", 227 * KIB),
    "sm_100": Architecture("sm_100", 227 * KIB),
    "sm_103": Architecture("sm_100", 227 * KIB),
    "sm_110": Architecture("sm_100", 227 * KIB),
    # Blackwell without tensor memory: the shared memory and tensor cores of sm_89.
    "sm_120": Architecture("sm_80", 99 * KIB),
    "sm_121": Architecture("sm_80", 99 * KIB),
    "gfx90a": Architecture("gfx942", 64 * KIB, 131072),
    "gfx942": Architecture("gfx942", 64 * KIB, 131072),
    "gfx950": Architecture("gfx942", 160 * KIB, 131072),
}
"""By the compilers' names: sm_XY is NVIDIA's compute capability X.Y, gfx... are AMD's. From the vendors' programming
guides."""


class GPU(NamedTuple):
    """One product, from its data sheet. Rates are dense (without sparsity) and in operations a second."""

    name: str
    """Words that the driver's name for it contains, in any order."""
    architecture: str
    processors: int
    bf16_flops: float
    """Products of bfloat16 or float16 with float32 sums."""
    tf32_flops: float | None
    """Products of TF32; None where the hardware has none."""
    fp32_flops: float
    """Arithmetic in float32, without tensor cores."""
    fp8_flops: float | None
    """Products of 8-bit floating point with float32 sums; None where the hardware has none."""
    memory_bytes: float
    bytes_per_second: float
    """Bandwidth of the device memory."""


GPUS = (
    GPU("H100 PCIe", "sm_90", 114, 756e12, 378e12, 51e12, 1513e12, 80e9, 2.0e12),
    GPU("H100 NVL", "sm_90", 132, 835e12, 418e12, 60e12, 1671e12, 94e9, 3.9e12),
    GPU("H100", "sm_90", 132, 989e12, 495e12, 67e12, 1979e12, 80e9, 3.35e12),
    GPU("GH200", "sm_90", 132, 989e12, 495e12, 67e12, 1979e12, 96e9, 4.0e12),
    GPU("H200 NVL", "sm_90", 132, 835e12, 418e12, 60e12, 1671e12, 141e9, 4.8e12),
    GPU("H200", "sm_90", 132, 989e12, 495e12, 67e12, 1979e12, 141e9, 4.8e12),
    GPU("B200", "sm_100", 148, 2250e12, 1125e12, 75e12, 4500e12, 180e9, 7.7e12),
    GPU("GB200", "sm_100", 152, 2500e12, 1250e12, 80e12, 5000e12, 186e9, 8.0e12),
    GPU("B300", "sm_103", 148, 2250e12, 1125e12, 75e12, 4500e12, 270e9, 8.0e12),
    GPU("A100 80GB PCIe", "sm_80", 108, 312e12, 156e12, 19.5e12, None, 80e9, 1.935e12),
    GPU("A100 80GB", "sm_80", 108, 312e12, 156e12, 19.5e12, None, 80e9, 2.039e12),
    GPU("A100", "sm_80", 108, 312e12, 156e12, 19.5e12, None, 40e9, 1.555e12),
    GPU("A10G", "sm_86", 80, 70e12, 35e12, 35e12, None, 24e9, 0.6e12),
    GPU("A10", "sm_86", 72, 125e12, 62.5e12, 31.2e12, None, 24e9, 0.6e12),
    GPU("L4", "sm_89", 58, 121e12, 60e12, 30.3e12, 242e12, 24e9, 0.3e12),
    GPU("L40S", "sm_89", 142, 362e12, 183e12, 91.6e12, 733e12, 48e9, 0.864e12),
    GPU("RTX 6000 Ada", "sm_89", 142, 364e12, 182e12, 91.1e12, 728e12, 48e9, 0.96e12),
    GPU("RTX 3090", "sm_86", 82, 71e12, 35.6e12, 35.6e12, None, 24e9, 0.936e12),
    GPU("RTX 4090", "sm_89", 128, 165e12, 82.6e12, 82.6e12, 330e12, 24e9, 1.008e12),
    GPU("RTX 5090", "sm_120", 170, 209.5e12, 104.8e12, 104.8e12, 419e12, 32e9, 1.792e12),
    # PyTorch shows each of the two dies of an MI250 as a device.
    GPU("MI250X", "gfx90a", 110, 191.5e12, None, 23.9e12, None, 64e9, 1.6e12),
    GPU("MI250", "gfx90a", 104, 181e12, None, 22.6e12, None, 64e9, 1.6e12),
    GPU("MI210", "gfx90a", 104, 181e12, None, 22.6e12, None, 64e9, 1.6e12),
    GPU("MI300X", "gfx942", 304, 1307e12, 653.7e12, 163.4e12, 2615e12, 192e9, 5.3e12),
    GPU("MI325X", "gfx942", 304, 1307e12, 653.7e12, 163.4e12, 2615e12, 256e9, 6.0e12),
    GPU("MI355X", "gfx950", 256, 2516e12, None, 157.3e12, 5033e12, 288e9, 8.0e12),
)
"""The first row that fits a device counts, so the narrower name stands first."""

WITHOUT_A_GPU = "sm_80"
"""The architecture whose launch parameters Triton's interpreter uses on a CPU."""


def gpu_named(device_name: str) -> GPU | None:
    """The row of `GPUS` for a driver's name such as "NVIDIA A100-SXM4-80GB"; None for a product without a row."""
    words = set(re.split(r"[\s/-]+", device_name.upper()))
    return next((gpu for gpu in GPUS if words.issuperset(gpu.name.upper().split())), None)


def gpu_of(device: torch.device) -> GPU | None:
    """The row of `GPUS` for a device; None for a CPU and for a product without a row."""
    return gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of a device's architecture in `ARCHITECTURES`, or the compiler's name for one that has no row.

    An unlisted NVIDIA architecture counts as the nearest older one of its generation, for which binaries run there too.
    """
    if device.type != "cuda":
        return WITHOUT_A_GPU
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    older = (f"sm_{major}{each}" for each in range(minor, -1, -1))
    return next((name for name in older if name in ARCHITECTURES), f"sm_{major}{minor}")


def why_no_launches(device: torch.device) -> str | None:
    """The reason why the Triton kernels have no launch parameters for a device; None if they have."""
    name = architecture(device)
    return (
        None if name in ARCHITECTURES else f"has no launch parameters for {name}, only for {', '.join(ARCHITECTURES)}"
    )


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; without a GPU those of an H100."""
    if device.type != "cuda":
        usual = gpu_named("H100")
        assert usual is not None
        return usual.processors
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded(width: int) -> int:
    """The power of two, 16 at least, that a tile has for `width`."""
    return max(16, 1 << (width - 1).bit_length())
