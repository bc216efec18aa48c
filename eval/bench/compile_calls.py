"""A kernel as it is launched, and what its compiler makes of it, on a machine without a GPU.

`recorded` runs a function on tensors without content (device "meta") and catches the Triton kernels that it launches,
with the arguments that the compiler has to know. `CudaCall` is a CUDA C++ kernel, compiled by whatever compiles it at
run time. Both say what they compiled to through `compile`, which belongs in a process of its own: a failed assertion in
a compiler takes its process with it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from xlstm_lm.ops.sass import disassembled, hazards

MATRIX_INSTRUCTIONS = ("HGMMA", "UTCHMMA", "HMMA", "FFMA")
TENSOR_MEMORY = 512
"""Columns that a multiprocessor of sm_100 has. Nothing but the launch itself refuses more."""
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.bool: "i1"}


@dataclass(frozen=True, kw_only=True)
class TritonCall:
    """A Triton kernel as it was launched: what the compiler has to know."""

    function: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, int]

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.function.__name__

    @property
    def launch(self) -> str:
        """Tiles, warps and stages, for the report."""
        names = self.function.arg_names
        sizes = {names[path[0]]: value for path, value in self.constants.items() if names[path[0]].isupper()}
        return ", ".join(f"{name} {value}" for name, value in (sizes | self.options).items())

    @property
    def identity(self) -> str:
        """The same for calls that one compiled kernel serves."""
        return repr((self.kernel, self.signature, self.constants, self.attributes, self.options))

    def compile(self, target: str) -> dict[str, Any]:
        """The measured fields of `compile_report.Compiled` for "sm_90" and the like or an AMD processor."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        nvidia = target.startswith("sm_")
        machine = GPUTarget("cuda", int(target.removeprefix("sm_")), 32) if nvidia else GPUTarget("hip", target, 64)
        source = ASTSource(fn=self.function, signature=self.signature, constexprs=self.constants, attrs=self.attributes)
        start = time.perf_counter()
        compiled = triton.compile(source, target=machine, options=self.options)
        result = {"shared_bytes": compiled.metadata.shared, "seconds": time.perf_counter() - start}
        if getattr(compiled.metadata, "tmem_size", 0) > TENSOR_MEMORY:
            result["problem"] = f"{compiled.metadata.tmem_size} columns of tensor memory, {TENSOR_MEMORY} there are"
        if nvidia:
            return _examined(compiled.asm["cubin"]) | result
        assembly = compiled.asm["amdgcn"]
        return result | {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
            "spilled_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1]),
            "instructions": {"MFMA": assembly.count("v_mfma")},
        }


@dataclass(frozen=True, kw_only=True)
class CudaCall:
    """A CUDA C++ kernel, one that its compiler turns into a binary of its own."""

    kernel: str
    """Name of the kernel."""
    launch: str
    """Sizes, for the report; with the name they identify the kernel."""
    binary: Callable[[str], bytes]
    """Compiles it for "sm_90" and the like."""
    dynamic_shared_bytes: int
    """Shared memory asked for at launch."""

    @property
    def identity(self) -> str:
        """The same for calls that one compiled kernel serves."""
        return repr((self.kernel, self.launch))

    def compile(self, target: str) -> dict[str, Any]:
        """The measured fields of `compile_report.Compiled`."""
        start = time.perf_counter()
        cubin = self.binary(target)
        seconds = time.perf_counter() - start
        examined = _examined(cubin)
        examined["shared_bytes"] += self.dynamic_shared_bytes
        return examined | {"seconds": seconds}


def recorded(function: Callable[[], Any]) -> list[TritonCall]:
    """The Triton kernels that `function` launches on tensors of device "meta", none of which runs."""
    from triton.runtime import JITFunction

    found: list[TritonCall] = []

    def record(self: JITFunction, *arguments: Any, **keywords: Any) -> None:
        found.append(_call(self, arguments, keywords))

    with mock.patch.object(JITFunction, "run", record):
        function()
    return found


def _call(function: Any, arguments: tuple, keywords: dict[str, Any]) -> TritonCall:
    """The JIT compiler's view of arguments: divisibility by 16 is a fact that it uses, 1 a constant."""
    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
    keywords.pop("grid"), keywords.pop("warmup")
    values = dict(zip(function.arg_names, arguments)) | keywords
    signature, constants, attributes = {}, {}, {}

    def type_of(value: Any, index: tuple[int, ...], specialized: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(each, (*index, place), specialized) for place, each in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[index] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if specialized and value == 1:
            constants[index] = 1
            return "constexpr"
        if specialized and value % 16 == 0:
            attributes[index] = [["tt.divisibility", 16]]
        return "i32"

    for index, parameter in enumerate(function.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[index,] = "constexpr", value
        else:
            signature[parameter.name] = type_of(value, (index,), not parameter.do_not_specialize)
    return TritonCall(
        function=function, signature=signature, constants=constants, attributes=attributes, options=options
    )


def _examined(cubin: bytes) -> dict[str, Any]:
    """The measured fields that the machine code itself shows; a problem where it touches a product in flight."""
    usage = _resources(cubin)
    registers, stack, shared = (
        max(int(x) for x in re.findall(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK", "SHARED")
    )
    listing = disassembled(cubin)
    found = re.findall(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*)", listing)
    counts = {name: sum(each.startswith(name) for each in found) for name in MATRIX_INSTRUCTIONS}
    result: dict[str, Any] = {
        "registers": registers,
        "spilled_bytes": stack,  # arrays indexed at run time count too: they are as slow
        "shared_bytes": shared,
        "instructions": {name: count for name, count in counts.items() if count},
    }
    hazard = next(hazards(listing), None)
    return result if hazard is None else result | {"problem": hazard}


def _resources(cubin: bytes) -> str:
    """The registers, stack and shared memory of the functions in a binary, as cuobjdump prints them."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
