"""The check of Hopper's machine code on short listings, and what an old assembler means for the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from xlstm_lm.ops import assembler
from xlstm_lm.ops.sass import hazards

DEVICE = torch.device("cuda", 0)
PRODUCT = "HGMMA.64x32x16.F32.BF16 R88, R104, gdesc[UR8], R88, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def listing(*instructions: str) -> str:
    lines = enumerate(instructions)
    return "".join(f"        /*{16 * index:04x}*/    {each} ;    /* 0x0060000868587df0 */\n" for index, each in lines)


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("F2FP.BF16.F32.PACK_AB R104, R5, R4", "writes the left operand of the product at 0000"),
        ("@P0 MOV R107, R4", "writes the left operand"),
        ("LDS.128 R84, [R4]", None),
        ("LDS.128 R101, [R4]", "writes the left operand"),
        ("LDSM.16.M88.4 R104, [R4+UR5]", "writes the left operand"),
        ("IMAD.WIDE R106, R4, R5, R6", "writes the left operand"),
        ("FMUL R95, R4, R5", "writes the sums"),
        ("FMUL R4, R103, R5", "reads the sums"),
        ("STG.E.128 [R2.64], R100", "reads the sums"),
        ("SHFL.IDX PT, R105, R4, R5, 0x1f", "writes the left operand"),
        ("HGMMA.64x16x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0", "reads the sums"),
        ("ISETP.GE.AND P0, PT, R104, R5, PT", None),
        ("STS [R104], R5", None),
        ("MOV R4, R104", None),
        ("HGMMA.64x32x16.F32.BF16 R88, R108, gdesc[UR8], R88, gsb0", None),
        ("HGMMA.64x64x16.F32.BF16 R120, R152, gdesc[UR8], R120, gsb0", None),
        ("BRA `(.L_x_1)", None),
        ("UPLOP3.LUT UPT, UPT", None),
        ("VOTE.ANY PT, P0", None),
    ],
)
def test_a_register_of_a_product_in_flight_must_not_be_touched(instruction: str, found: str | None) -> None:
    touched = list(hazards(listing(PRODUCT, instruction, WAIT)))
    assert (found in touched[0]) if found else not touched
    assert not list(hazards(listing(PRODUCT, WAIT, instruction)))


def test_a_wait_may_leave_the_youngest_products_in_flight() -> None:
    other = "HGMMA.64x32x16.F32.BF16 R24, R108, gdesc[UR8], R24, gsb0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert not list(hazards(listing(PRODUCT, other, wait, "MOV R104, R4")))
    assert len(list(hazards(listing(PRODUCT, other, wait, "MOV R108, R4")))) == 1


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A kernel that a Hopper GPU has compiled, by an assembler of version `hopper.ptxas` to code `hopper.listing`."""
    state = SimpleNamespace(ptxas="12.8", listing=listing(PRODUCT, WAIT, "MOV R104, R4"), said=[])
    compiled = SimpleNamespace(metadata=SimpleNamespace(name="walk_kernel"), asm={"cubin": b"code"})
    state.kernel = SimpleNamespace(device_caches={0: ({"key": SimpleNamespaceById(compiled)}, None)})

    def disassembled(cubin: bytes) -> str:
        assert cubin == b"code"
        if state.listing is None:
            raise OSError("no cuobjdump")
        return state.listing

    monkeypatch.setattr(assembler, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(assembler, "ptxas_version", lambda name: state.ptxas)
    monkeypatch.setattr(assembler, "disassembled", disassembled)
    monkeypatch.setattr(assembler, "announce_once", state.said.append)
    assembler._is_doubtful.cache_clear()
    yield state
    assembler._is_doubtful.cache_clear()


class SimpleNamespaceById:
    """A hashable stand-in for a compiled kernel."""

    def __init__(self, like: SimpleNamespace) -> None:
        self.metadata, self.asm = like.metadata, like.asm


def test_clean_code_of_an_old_assembler_is_used_and_the_assembler_named(hopper: SimpleNamespace) -> None:
    assembler.check_machine_code([hopper.kernel], DEVICE)
    (said,) = hopper.said
    assert "ptxas 12.8" in said and "TRITON_PTXAS_PATH" in said


@pytest.mark.parametrize("code", [listing(PRODUCT, "MOV R104, R4", WAIT), None])
def test_code_that_is_wrong_or_unreadable_is_refused_with_the_remedy(hopper: SimpleNamespace, code: str | None) -> None:
    hopper.listing = code
    with pytest.raises(RuntimeError, match=r"walk_kernel.*Triton 3\.9 or later"):
        assembler.check_machine_code([hopper.kernel], DEVICE)
    hopper.ptxas = "13.3"
    assembler._is_doubtful.cache_clear()
    assembler.check_machine_code([hopper.kernel], DEVICE)


@pytest.mark.parametrize(
    ("name", "version", "trusted"),
    [("sm_100", "3.8.1", False), ("sm_103", "3.6.0", False), ("sm_100", "3.9.0", True), ("sm_90", "3.6.0", True)],
)
def test_chained_products_on_blackwell_need_a_new_triton(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str, trusted: bool
) -> None:
    monkeypatch.setattr(assembler, "architecture", lambda device: name)
    monkeypatch.setattr(assembler, "version", lambda package: version)
    problem = assembler.why_not_chained(DEVICE)
    assert (problem is None) == trusted
    assert trusted or ("Triton 3.9" in problem and version in problem)


def test_the_installed_compilers_are_named() -> None:
    pytest.importorskip("triton", reason="Triton is not installed (pip install 'xlstm-lm[gpu]')")
    assert assembler.version_of(assembler.version("triton")) >= (3, 6)
    assert assembler.version_of(assembler.ptxas_version("sm_90")) >= (12, 8)
    assert assembler.ptxas_version("gfx942") is None
