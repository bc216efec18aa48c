"""A check of Hopper's machine code: no register that a matrix product in flight uses may be touched before its wait.

A warp-group product (HGMMA) runs on while later instructions issue. Until WARPGROUP.DEPBAR waits for it, its left
operand in registers must not be written, and its sums must be neither written nor read. ptxas 12.8 and 12.9 break this
rule in some kernels (triton-lang/triton issues 9433 and 11781), which gives wrong numbers and no message.

The check follows the listing from top to bottom and enters no loop twice, so it misses a hazard that spans the end of
a loop. The comparison of the kernels with their definition remains the judge of the numbers.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_WIDTHS = ((".128", 4), (".64", 2), (".WIDE", 2))
_OPERAND_REGISTERS = 4
"""Registers of a thread for the left operand of a product: 64 rows of 32 bytes, over 128 threads."""


class _Product(NamedTuple):
    """A product in flight."""

    address: str
    group: int
    operand: frozenset[int]
    sums: frozenset[int]


def disassembled(cubin: bytes) -> str:
    """The machine code of a binary as text, by the cuobjdump that Triton brings.

    Raises:
        OSError, RuntimeError, subprocess.SubprocessError: there is no such tool, or it fails.
    """
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hazards(listing: str) -> Iterator[str]:
    """Each instruction of a listing that touches a register of a product in flight, with the product's address."""
    in_flight: list[_Product] = []
    group = 0  # groups of products committed so far
    for address, operation, rest in _INSTRUCTION.findall(listing):
        operands = rest.split(", ")
        if operation.startswith("WARPGROUP.DEPBAR"):
            left = int(operands[-1], 16)  # groups that may stay in flight
            in_flight = [product for product in in_flight if product.group >= group - left]
            continue
        product = operation.startswith("HGMMA")
        if product:
            sums = _range(_register(operands[0]), int(operation.split("x")[1]) // 2)
            operand = _range(_register(operands[1]), _OPERAND_REGISTERS)
            written, read = frozenset[int](), operand
        else:
            written, read = _touched(operation, operands)
        for each in in_flight:
            if written & each.operand:
                yield f"{address} {operation} writes the left operand of the product at {each.address}"
            if written & each.sums:
                yield f"{address} {operation} writes the sums of the product at {each.address}"
            if read & each.sums:
                yield f"{address} {operation} reads the sums of the product at {each.address}"
        if product:
            in_flight.append(_Product(address, group, operand, sums))
            group += any(each.startswith("gsb") for each in operands)


def _register(operand: str) -> int | None:
    """The number of a register such as R12 or -R12.reuse; None for anything else."""
    found = re.fullmatch(r"[-~|!]*R(\d+)(?:\.\w+)*\|?", operand)
    return int(found[1]) if found else None


def _range(first: int | None, count: int) -> frozenset[int]:
    return frozenset() if first is None else frozenset(range(first, first + count))


def _touched(operation: str, operands: list[str]) -> tuple[frozenset[int], frozenset[int]]:
    """The registers that an instruction other than a product writes and reads."""
    width = next((count for part, count in _WIDTHS if part in operation), 1)
    if operation.startswith("LDSM"):
        width = int((re.search(r"\.([24])(?:\.|$)", operation) or "11")[1])
    elif operation.startswith("HMMA"):
        width = 4
    if "SETP" not in operation and not operation.startswith("PLOP3"):
        while operands and re.fullmatch(r"!?U?P[T\d]", operands[0]):
            operands = operands[1:]  # a predicate that it writes beside its register, or reads
    if not operands:
        return frozenset(), frozenset()
    is_store = operands[0].startswith(("[", "desc["))
    first = _register(operands[0])
    written = _range(first, width)
    sources = operands if first is None else operands[1:]
    read = {int(number) for text in sources for number in re.findall(r"\bR(\d+)\b", text)}
    if is_store and len(operands) > 1:
        read |= _range(_register(operands[-1]), width)
    return written, frozenset(read)
