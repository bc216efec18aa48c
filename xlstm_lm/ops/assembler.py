"""The compilers behind the Triton kernels: their versions, and the guards against versions that are known to go wrong.

On compute capability 9.0, ptxas 12.8 and 12.9 miscompile some warp-group products. Triton 3.9 assembles with ptxas
13.4, but PyTorch 2.11 pins Triton 3.6 with ptxas 12.8, and many users of Hopper have that. None of these kernels is
known to be affected. So an old assembler alone is no reason to refuse them: the machine code that it wrote here is
checked (`sass.hazards`) before its results are used, and a kernel that fails is refused. The comparison with the
definition at the model's own head sizes comes on top.

On compute capability 10, Triton before 3.9 gets several products with one accumulator wrong (triton-lang/triton issue
10821, fixed by 10988). No check of the machine code finds that, so the kernels that have such products are refused.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable
from typing import Any

import torch

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.machine import assembler, version
from xlstm_lm.ops.gpu import architecture
from xlstm_lm.ops.sass import disassembled, hazards

PTXAS = (13, 3)
"""The first assembler trusted with Hopper's products unchecked."""
TRITON_ON_BLACKWELL = (3, 9)
REMEDY = "install Triton 3.9 or later, or set TRITON_PTXAS_PATH to a ptxas of CUDA 13.3 or later"


def version_of(text: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(part) for part in text.split(".")[:2])


def ptxas_version(name: str) -> str | None:
    """The version of the assembler that Triton uses for an architecture such as "sm_90"; None where there is none."""
    return assembler(int(name.removeprefix("sm_"))) if name.startswith("sm_") else None


def why_not_chained(device: torch.device) -> str | None:
    """The reason why kernels with several products in one accumulator are refused on a device; None if they are not."""
    name, installed = architecture(device), version("triton")
    if not name.startswith("sm_10") or installed is None or version_of(installed) >= TRITON_ON_BLACKWELL:
        return None
    return f"needs Triton 3.9 or later on {name}, where {installed} computes wrong products: install that"


def check_machine_code(kernels: Iterable[Any], device: torch.device) -> None:
    """Check what an old assembler made of Triton kernels that have run on a device, each binary once.

    Args:
        kernels: functions with `triton.jit`.
        device: the GPU they were launched on.

    Raises:
        RuntimeError: a binary uses a register of a product in flight, or cannot be read; says which and the remedy.
    """
    if device.type != "cuda" or not _is_doubtful(device):
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    for kernel in kernels:
        for compiled in kernel.device_caches[index][0].values():
            _check(compiled)


@functools.cache
def _is_doubtful(device: torch.device) -> bool:
    ptxas = ptxas_version(architecture(device))
    doubtful = architecture(device) == "sm_90" and (ptxas is None or version_of(ptxas) < PTXAS)
    if doubtful:
        announce_once(
            f"Triton assembles for {device} with ptxas {ptxas}, which miscompiles some of Hopper's matrix products: "
            f"the machine code of every kernel is checked before it is used. To do without the check, {REMEDY}."
        )
    return doubtful


@functools.cache
def _check(compiled: Any) -> None:
    name = compiled.metadata.name
    try:
        found = next(hazards(disassembled(compiled.asm["cubin"])), None)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"the machine code of {name} cannot be checked ({error}): {REMEDY}") from error
    if found is not None:
        raise RuntimeError(f"the assembler has miscompiled {name}: {found}. Remedy: {REMEDY}")
