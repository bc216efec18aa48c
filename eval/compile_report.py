"""What the Triton kernels compile to, without a GPU: registers, shared memory, spills and matrix instructions.

`python -m eval.kernels --compile-report` compiles representative configurations for every target; `compile_all` is
what the tests call. The operators are run on tensors without content (device "meta") to learn with what arguments they
launch each kernel, so each is compiled as it would be at run time. Each kernel is compiled in a process of its own,
because a failed assertion in the compiler takes its process with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes that one program may have, by target. Nothing but the launch itself refuses more."""
SPILL_LIMIT = {"bfloat16": 0, "float16": 0, "float32": 64}
"""Bytes a thread may spill on sm_90 and sm_100: without tensor cores, float32 products keep operands in registers."""
TIME_LIMIT = 120.0
"""Seconds for one kernel."""
MATRIX_INSTRUCTIONS = ("HGMMA", "UTCHMMA", "HMMA", "FFMA")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of the mLSTM."""

    K: int
    V: int
    dtype: str = "bfloat16"
    resets: bool = False

    @property
    def name(self) -> str:
        return f"K{self.K} V{self.V} {self.dtype}{' resets' if self.resets else ''}"


QUICK = (Case(K=256, V=512),)
SHIPPED = (
    *QUICK,
    *(Case(K=K, V=V, resets=True) for K, V in ((64, 128), (128, 256), (256, 512), (80, 160))),
    Case(K=256, V=512, dtype="float16", resets=True),
    *(Case(K=K, V=V, dtype="float32", resets=True) for K, V in ((64, 128), (256, 512))),
)


@dataclass(kw_only=True)
class Compiled:
    """What became of one kernel on one target."""

    case: str
    dtype: str
    kernel: str
    target: str
    launch: str
    problem: str = ""
    seconds: float = 0.0
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        spills = self.target in ("sm_90", "sm_100") and (self.spilled_bytes or 0) > SPILL_LIMIT[self.dtype]
        return not self.problem and not spills and self.shared_bytes <= SHARED_MEMORY_LIMIT[self.target]


@dataclass(frozen=True)
class Call:
    """A kernel as it was launched: what the compiler has to know."""

    function: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, int]

    @property
    def launch(self) -> str:
        blocks = [
            f"{name} {self.constants[index,]}"
            for index, name in enumerate(self.function.arg_names)
            if name in ("L", "BLOCK_K", "BLOCK_S", "BLOCK_V", "BLOCK_W", "REVERSE")
        ]
        return ", ".join([*blocks, *(f"{name} {value}" for name, value in self.options.items())])


def _call(function: Any, arguments: tuple, keywords: dict[str, Any]) -> Call:
    """What the JIT compiler makes of arguments: divisibility by 16 is a fact it uses, 1 a constant."""
    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
    keywords.pop("grid"), keywords.pop("warmup")
    values = dict(zip(function.arg_names, arguments)) | keywords
    signature, constants, attributes = {}, {}, {}

    def type_of(value: Any, index: tuple[int, ...], specialized: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(each, (*index, place), specialized) for place, each in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[index] = [["tt.divisibility", 16]]
            names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}
            return "*" + names[str(value.dtype).removeprefix("torch.")]
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
    return Call(function, signature, constants, attributes, options)


def calls_of(case: Case, target: str) -> list[Call]:
    """Every kernel that a forward and a backward pass launches, in a long sequence with all states asked for."""
    from triton.runtime import JITFunction

    from xlstm_lm.ops.mlstm import triton_op

    B, T, H = 2, 8192, 4
    dtype = getattr(torch, case.dtype)
    q, k = (torch.empty(B, T, H, case.K, dtype=dtype, device="meta") for _ in range(2))
    v = torch.empty(B, T, H, case.V, dtype=dtype, device="meta")
    i, f = (torch.empty(B, T, H, device="meta") for _ in range(2))
    resets = torch.empty(B, T, dtype=torch.bool, device="meta") if case.resets else None
    state = [torch.empty(shape, device="meta") for shape in ((B, H, case.K, case.V), (B, H, case.K), (B, H))]
    found: list[Call] = []

    def record(self: JITFunction, *arguments: Any, **keywords: Any) -> None:
        found.append(_call(self, arguments, keywords))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(triton_op, "architecture", lambda device: target),
    ):
        out, *last, c, x, m, d = triton_op.launch_forward(q, k, v, i, f, resets, *state, True, False, True, 1e-6)
        triton_op.launch_backward(
            q, k, v, i, f, resets, *state[:2], out, c, x, m, d, out, *last[:2], False, True, 1e-6
        )  # fmt: skip
    unique: dict[str, Call] = {}
    for call in found:
        unique.setdefault(repr((call.function.__name__, call.signature, call.constants, call.options)), call)
    return list(unique.values())


def _assembler_report(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and bytes spilled, from the assembler that Triton itself would take."""
    from triton.backends.nvidia.compiler import get_ptxas

    name = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", source, "-o", source.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)[1]
    return int(registers), int(re.search(r"(\d+) bytes spill stores", report)[1])


def _instructions(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True).stdout
    found = re.findall(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*)", listing)
    return {name: count for name in MATRIX_INSTRUCTIONS if (count := sum(each.startswith(name) for each in found))}


def _compile(call: Call, target: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target.startswith("sm_"):
        capability = int(target.removeprefix("sm_"))
        machine = GPUTarget("cuda", capability, 32)
    else:
        machine = GPUTarget("hip", target, 64)
    source = ASTSource(fn=call.function, signature=call.signature, constexprs=call.constants, attrs=call.attributes)
    start = time.perf_counter()
    kernel = triton.compile(source, target=machine, options=call.options)
    result = {"shared_bytes": kernel.metadata.shared, "seconds": time.perf_counter() - start}
    if target.startswith("sm_"):
        result["registers"], result["spilled_bytes"] = _assembler_report(kernel.asm["ptx"], capability)
        result["instructions"] = _instructions(kernel.asm["cubin"])
    else:
        assembly = kernel.asm["amdgcn"]
        result["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        result["spilled_bytes"] = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])
        result["instructions"] = {"MFMA": assembly.count("v_mfma")}
    return result


def _child(pipe: Any, call: Call, target: str) -> None:
    os.nice(10)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            pipe.send(_compile(call, target))
        except Exception as caught:
            pipe.send({"problem": f"{type(caught).__name__}: {str(caught).strip()[-300:]}"})


def compile_all(cases: tuple[Case, ...], targets: tuple[str, ...], only: str = "") -> Iterator[Compiled]:
    """Compile every kernel (whose name contains `only`) of the cases for the targets, each in its own process."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    done: set[str] = set()
    for case in cases:
        for target in targets:
            for call in calls_of(case, target):
                name = call.function.__name__
                identity = repr((target, name, call.signature, call.constants, call.attributes, call.options))
                if only not in name or identity in done:
                    continue
                done.add(identity)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(sender, call, target))
                process.start()
                sender.close()
                result = {"problem": "the compiler ended its process, or took too long"}
                if receiver.poll(TIME_LIMIT):
                    with contextlib.suppress(EOFError):
                        result = receiver.recv()
                else:
                    process.kill()
                process.join()
                yield Compiled(
                    case=case.name, dtype=case.dtype, kernel=name, target=target, launch=call.launch, **result
                )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a kernel does not compile, has too much shared memory or spills where it must not."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="a few representative configurations")
    parser.add_argument("--targets", nargs="*", default=list(SHARED_MEMORY_LIMIT))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args(arguments)
    failed = 0
    heading = ("registers", "spilled", "shared", "seconds")
    if not options.json:
        print(f"{'configuration':26}{'kernel':24}{'target':8}" + "".join(f"{each:>10}" for each in heading) + "  ...")
    for row in compile_all(QUICK if options.quick else SHIPPED, tuple(options.targets), options.only):
        failed += not row.passed
        if options.json:
            print(json.dumps(asdict(row) | {"passed": row.passed}), flush=True)
            continue
        mark = "" if row.passed else "  <-- " + (row.problem or "too much")
        print(
            f"{row.case:26}{row.kernel:24}{row.target:8}{row.registers!s:>10}{row.spilled_bytes!s:>10}"
            f"{row.shared_bytes:>10}{row.seconds:>10.1f}  {row.instructions} {row.launch}{mark}",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
