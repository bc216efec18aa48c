"""The configurations of each operation that we ship, as the kernels that each launches.

An operation is an entry of `CASES`: a function without arguments that returns its cases. A case's `calls(target)` gives
the kernels launched on "sm_80" or another of `gpu.ARCHITECTURES` (none where the operation has no kernel for it):

    Case("slstm D64 bfloat16", lambda target: recorded(lambda: launch_forward(...tensors of device "meta"...)))
    Case("slstm cluster D256", lambda target: [CudaCall(kernel=..., launch=..., binary=..., dynamic_shared_bytes=...)])

Cases with `quick=True` are compiled in the quick tests too: one or two an operation, because each kernel takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch

from eval.bench.compile_calls import CudaCall, TritonCall, recorded
from xlstm_lm.models.mixers.mixer import OperationUse
from xlstm_lm.models.presets import preset, preset_names
from xlstm_lm.ops.gpu import ARCHITECTURES, KIB

Calls = Callable[[str], Sequence[TritonCall | CudaCall]]


@dataclass(frozen=True)
class Case:
    """One configuration of an operation."""

    name: str
    calls: Calls
    quick: bool = False


def mlstm_calls(
    K: int,
    V: int,
    dtype: torch.dtype,
    target: str,
    *,
    resets: bool = True,
    state: bool = True,
    sigmoid: bool = False,
    normalize: bool = True,
    B: int = 2,
    T: int = 8192,
    H: int = 4,
) -> list[TritonCall]:
    """Every kernel of a forward and a backward pass over a sequence; with `state`, from one and to one."""
    from xlstm_lm.ops.mlstm import triton_op
    from xlstm_lm.ops.mlstm.triton_launch import widest

    meta = partial(torch.empty, device="meta")
    q, k, v = (meta(B, T, H, size, dtype=dtype) for size in (K, K, V))
    i, f = (meta(B, T, H) for _ in range(2))
    resets_BT = meta(B, T, dtype=torch.bool) if resets else None
    C, n, m = (meta(B, H, K, V), meta(B, H, K), meta(B, H)) if state else (None,) * 3

    def both() -> None:
        gates = sigmoid, normalize, 1e-6
        h, C_last, n_last, _, c, x, m_BHT, x_divided, d, weights = triton_op.launch_forward(
            q, k, v, i, f, resets_BT, C, n, m, state, *gates
        )  # fmt: skip
        last = (C_last, n_last) if state else (None, None)
        triton_op.launch_backward(
            q, k, v, i, f, resets_BT, C, n, h, c, x, m_BHT, x_divided, d, weights, h, last[0], last[1], *gates
        )  # fmt: skip

    with mock.patch.object(triton_op, "architecture", lambda device: target):
        return recorded(both) if max(K, V) <= widest(target) else []


def _preset_uses(operation: str) -> list[OperationUse]:
    """The uses of an operation in all presets."""
    configurations = map(preset, preset_names())
    return [use for each in configurations for use in each.operations(1) if use.operation.name == operation]


def preset_mlstm_heads() -> set[tuple[int, int]]:
    """K and V of the mLSTM's heads in all presets."""
    return {(use.sizes["K"], use.sizes["V"]) for use in _preset_uses("mlstm")}


def preset_ssd_heads() -> set[tuple[int, int]]:
    """K and V of the heads that Mamba-2's presets compute with the mLSTM's kernels."""
    return {(use.sizes["N"], use.sizes["P"]) for use in _preset_uses("ssd")}


def preset_slstm_heads() -> set[int]:
    """Units of the sLSTM's heads in all presets."""
    return {use.sizes["D"] for use in _preset_uses("slstm")}


def mlstm_cases() -> list[Case]:
    """The heads of all presets in bfloat16; and in every type and with every option those of the published models and
    two whose sizes are no powers of two. Nothing where the kernels refuse them."""
    bf16 = torch.bfloat16
    no_normalizer = {"sigmoid": True, "normalize": False}
    cases = [
        Case("mlstm K256 V512 bfloat16", partial(mlstm_calls, 256, 512, bf16, resets=False)),
        Case("mlstm K256 V512 bfloat16 no state", partial(mlstm_calls, 256, 512, bf16, resets=True, state=False)),
        Case("mlstm K128 V256 bfloat16 sigmoid", partial(mlstm_calls, 128, 256, bf16, **no_normalizer)),
    ]
    for K, V in ((64, 128), (128, 256), (256, 512), (48, 96), (80, 160)):
        for dtype in (bf16, torch.float16, torch.float32):
            name = f"mlstm K{K} V{V} {str(dtype).removeprefix('torch.')} resets"
            cases.append(Case(name, partial(mlstm_calls, K, V, dtype), (K, dtype) == (256, bf16)))
    for K, V in sorted(preset_mlstm_heads()):
        cases.append(Case(f"mlstm K{K} V{V} bfloat16 preset", partial(mlstm_calls, K, V, bf16)))
    for K, V in sorted(preset_ssd_heads()):
        cases.append(Case(f"ssd K{K} V{V} bfloat16 preset", partial(mlstm_calls, K, V, bf16, normalize=False)))
    return cases


def _mlstm_step_calls(K: int, V: int, dtype: torch.dtype, target: str) -> list[TritonCall]:
    """The decode step from a state."""
    from xlstm_lm.ops.mlstm import triton_step

    del target  # it is launched in one way everywhere
    B, H = 2, 4
    meta = partial(torch.empty, device="meta")
    q, k, v = (meta(B, 1, H, size, dtype=dtype) for size in (K, K, V))
    i, f, C, n, m = meta(B, 1, H), meta(B, 1, H), meta(B, H, K, V), meta(B, H, K), meta(B, H)
    return recorded(lambda: triton_step.launch_step(q, k, v, i, f, None, C, n, m, C, False, True, 1e-6))


def mlstm_step_cases() -> list[Case]:
    """Steps with the heads of training, and with the widest of the first paper's block, where rows take turns."""
    cases = []
    for K, V in ((64, 128), (256, 512), (80, 160), (1024, 1024)):
        cases.append(Case(f"mlstm step K{K} V{V} bfloat16", partial(_mlstm_step_calls, K, V, torch.bfloat16), K == 256))
    return [*cases, Case("mlstm step K256 V512 float32", partial(_mlstm_step_calls, 256, 512, torch.float32))]


def _slstm_cluster_calls(D: int, dtype: torch.dtype, target: str) -> list[CudaCall]:
    """Both passes, with one and with two groups of eight sequences a cluster where there is room for them."""
    from xlstm_lm.ops.slstm.cluster import DIRECTIONS, Layout

    if ARCHITECTURES[target].launches not in ("sm_90", "sm_100"):
        return []
    layouts = [Layout(direction=each, D=D, dtype=dtype, tiles=tiles) for each in DIRECTIONS for tiles in (1, 2)]
    return [
        CudaCall(
            kernel=f"slstm_{layout.direction}",
            launch=f"{layout.blocks} blocks, {layout.warps} warps, {layout.tiles * 8} sequences, D {D}, {dtype}",
            binary=layout.binary,
            dynamic_shared_bytes=layout.shared_bytes,
        )
        for layout in layouts
        if layout.tiles == 1 or layout.shared_bytes + KIB <= ARCHITECTURES[target].shared_bytes
    ]


def slstm_cluster_cases() -> list[Case]:
    """Heads beyond what one multiprocessor holds, and two that it would."""
    cases = []
    for dtype, widths in {
        torch.bfloat16: sorted({64, 128, 160, 192, 256, 320, 384, 512} | preset_slstm_heads()),
        torch.float16: (256, 512),
        torch.float32: (128, 192, 256),
    }.items():
        for D in widths:
            name = f"slstm cluster D{D} {str(dtype).removeprefix('torch.')}"
            quick = (D, dtype) == (256, torch.bfloat16)
            cases.append(Case(name, partial(_slstm_cluster_calls, D, dtype), quick))
    return cases


def _slstm_calls(D: int, dtype: torch.dtype, B: int, target: str) -> list[TritonCall]:
    """Both loops, with resets; nothing where heads are too large for the target."""
    from xlstm_lm.ops.slstm import triton_loops

    T, H = 1024, max(1, 768 // D)
    meta = partial(torch.empty, device="meta")
    wx, r, bias = meta(B, T, 4, H, D, dtype=dtype), meta(4, H, D, D, dtype=dtype), meta(4, H, D)
    resets_BT = meta(B, T, dtype=torch.bool)
    state = tuple(meta(B, H, D) for _ in range(4))
    gates = meta(H, B, T, 4, D).permute(1, 2, 3, 0, 4)

    def both() -> None:
        y, checkpoints, _ = triton_loops.forward_loop(wx, r, bias, resets_BT, state)
        triton_loops.backward_loop(gates, r, y, checkpoints, resets_BT, state[:3])

    with mock.patch.object(triton_loops, "architecture", lambda device: target):
        return recorded(both) if triton_loops.largest(dtype, torch.device("meta")) >= D else []


def _slstm_pointwise_calls(dtype: torch.dtype, target: str) -> list[TritonCall]:
    """The step of either loop of `batched`, for heads of any size."""
    from xlstm_lm.ops.slstm import triton_pointwise

    del target  # they are launched in one way everywhere
    B, H, D = 16, 2, 384
    meta = partial(torch.empty, device="meta")
    gates, product, state = meta(B, 4, H, D, dtype=dtype), meta(H, B, 4, D), meta(B, H, D)
    y, y_HBD, resets_B = meta(B, H, D, dtype=dtype), meta(H, B, D, dtype=dtype), meta(B, dtype=torch.bool)

    def both() -> None:
        triton_pointwise.forward_step(
            product.permute(1, 2, 0, 3), gates, meta(4, H, D), resets_B, y, y_HBD, (state,) * 3
        )  # fmt: skip
        triton_pointwise.backward_step(meta(B, 6, H, D), gates, product.to(dtype), (product[:, :, 0], *(state,) * 4))

    return recorded(both)


def slstm_cases() -> list[Case]:
    """The largest heads of each type and smaller ones, with tiles of 8 rows and of 16; and the kernels of `batched`."""
    cases = [
        Case(f"slstm pointwise {str(dtype).removeprefix('torch.')}", partial(_slstm_pointwise_calls, dtype))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    for dtype, widths in {
        torch.bfloat16: sorted({24, 64, 80, 128} | preset_slstm_heads()),
        torch.float16: (64, 128),
        torch.float32: (24, 32),
    }.items():
        for D in widths:
            for B in (16, 256):
                name = f"slstm D{D} {str(dtype).removeprefix('torch.')} B{B}"
                cases.append(Case(name, partial(_slstm_calls, D, dtype, B), (D, dtype, B) == (128, torch.bfloat16, 16)))
    return cases


CASES: dict[str, Callable[[], list[Case]]] = {
    "mlstm": mlstm_cases,
    "mlstm_step": mlstm_step_cases,
    "slstm": slstm_cases,
    "slstm_cluster": slstm_cluster_cases,
}
"""The cases of each operation."""
