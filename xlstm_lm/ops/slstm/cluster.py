"""The sLSTM's loops for heads that one multiprocessor cannot hold: a head's gate rows over the blocks of a cluster.

Each block of a thread-block cluster keeps its part of R in registers and shared memory for the whole sequence, and the
blocks send each other y, or parts of dy, through distributed shared memory. So no step waits for the whole device, and
none reads R from device memory. The kernels (cluster_*.cu) are compiled when first used, for
the GPU that is there: clusters exist from compute capability 9.0 (Hopper) on.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xlstm_lm.base.announce import announce_once
from xlstm_lm.ops.nvrtc import Kernel, compile_cuda
from xlstm_lm.ops.slstm.fused import CHECKPOINT_STEPS
from xlstm_lm.ops.slstm.recurrence import SLSTMState

FOLDER = Path(__file__).parent
DIRECTIONS = ("forward", "backward")
ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16", torch.float32: "float"}
MAX_BLOCKS = 8
"""Blocks of a cluster that every GPU with clusters can run."""
MAX_D = 8 * 8 * MAX_BLOCKS
"""Units of a head at eight warps a block; with more, threads would have too few registers."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one of the two kernels spreads a head of D units over a cluster."""

    direction: str
    """"forward" or "backward"."""
    D: int
    dtype: torch.dtype
    tiles: int
    """Groups of eight sequences that a cluster computes."""

    @property
    def warps(self) -> int:
        """Warps of a block, each for eight units: four, one for each part of a multiprocessor, or what D needs."""
        return max(4, _divide_up(self.D, 8 * MAX_BLOCKS))

    @property
    def blocks(self) -> int:
        """Blocks of a cluster."""
        return _divide_up(self.D, 8 * self.warps)

    @property
    def held(self) -> int:
        """Fragments of R, 4 registers each, that a thread holds at most: as many as leave room for all else.

        In float32 the tensor cores take R in two parts; both would be held.
        """
        if self.dtype == torch.float32:
            return 0
        if self.tiles == 1:
            return 32 if self.direction == "backward" or self.D <= 256 else 28
        return 12 if self.direction == "forward" else 8

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block; the kernels check that they count the same."""
        size = self.dtype.itemsize
        if self.direction == "forward":
            row_tiles, steps = 2, 2 * _divide_up(self.D * size, 64)
            exchange = 2 * self.tiles * _rows_bytes(32 * steps)
        else:
            row_tiles, steps = _divide_up(_divide_up(self.D, 16), self.warps), self.warps * size
            received = self.blocks * self.tiles * 8 * self.warps * 8 * 4
            exchange = 2 * (self.tiles * _rows_bytes(32 * steps) + received)
        held = min(self.held // (2 * row_tiles) * 2, steps) * row_tiles
        return exchange + 2 * 8 + max(held, row_tiles * steps - held) * 32 * self.warps * 16

    @property
    def macros(self) -> dict[str, object]:
        """Macros of the program, by name."""
        names: dict[str, object] = {
            "D": self.D,
            "BLOCKS": self.blocks,
            "WARPS": self.warps,
            "TILES": self.tiles,
            "HELD": self.held,
        }
        names |= {"SEGMENT": CHECKPOINT_STEPS, "SHARED_BYTES": self.shared_bytes, "Element": ELEMENTS[self.dtype]}
        return names

    @property
    def files(self) -> tuple[str, str]:
        """The program, except for its use of the GPU's own instructions (cluster_device.h)."""
        return "cluster_head.h", f"cluster_{self.direction}.cu"

    def clusters(self, B: int, H: int) -> int:
        """Clusters for a batch of B sequences in H heads."""
        return H * _divide_up(B, 8 * self.tiles)

    def binary(self, architecture: str) -> bytes:
        """The kernel `slstm_forward` or `slstm_backward` compiled for "sm_90" and the like; see `compile_cuda`."""
        files = ("cluster_device.h", *self.files)
        source = "".join(f'#line 1 "{name}"\n{(FOLDER / name).read_text()}' for name in files)
        return compile_cuda(source, f"slstm_{self.direction}", architecture, self.macros)


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _rows_bytes(row_bytes: int) -> int:
    return 4 * (2 * _divide_up(row_bytes, 128) * 128 + 144)


def why_not(device: torch.device, D: int, dtype: torch.dtype) -> str | None:
    """The reason why heads of `D` units in `dtype` cannot use the cluster kernels on `device`; None if they can.

    The first call compiles them.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the sLSTM's cluster kernels run on NVIDIA GPUs, not on {device.type}"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 9:
        capability = f"{properties.major}.{properties.minor}"
        return f"the sLSTM's cluster kernels need compute capability 9.0 (Hopper); {properties.name} has {capability}"
    if dtype not in ELEMENTS:
        return f"the sLSTM's cluster kernels compute in bfloat16, float16 and float32, not in {dtype}"
    if D > MAX_D:
        return f"the sLSTM's cluster kernels take heads of up to {MAX_D} units, not {D}"
    layouts = [Layout(direction=direction, D=D, dtype=dtype, tiles=1) for direction in DIRECTIONS]
    needed, limit = max(layout.shared_bytes for layout in layouts), _shared_bytes(device)
    if needed > limit:
        return (
            f"a head of {D} units in {dtype} needs {needed} bytes of shared memory in each of {layouts[0].blocks} "
            f"blocks, and {properties.name} has {limit}"
        )
    try:
        for layout in layouts:
            _kernel(layout, _indexed(device))
    except (RuntimeError, OSError) as error:
        return f"the sLSTM's cluster kernels cannot be had: {error}"
    return None


def rows(B: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of the batch that a cluster computes at most, in either direction."""
    return 8 * max(_layout(direction, B, H, D, dtype, device).tiles for direction in DIRECTIONS)


def forward_loop(
    wx_BTGHD: Tensor, r_GHDE: Tensor, bias_GHD: Tensor, resets_BT: Tensor | None, state: SLSTMState
) -> tuple[Tensor, Tensor, SLSTMState]:
    """See `fused.Loops`. Raises RuntimeError where `why_not` has a reason."""
    B, T, _, H, D = wx_BTGHD.shape
    y_BTHD = wx_BTGHD.new_empty(B, T, H, D)
    checkpoints_NSBHD = bias_GHD.new_empty(_divide_up(T, CHECKPOINT_STEPS), 3, B, H, D)
    y_last, c_last, n_last, m_last = (torch.empty_like(part) for part in state)
    last = y_last, c_last, n_last, m_last
    parameters = ForwardParameters(
        _pointer(wx_BTGHD), *wx_BTGHD.stride()[:4], *map(_pointer, (r_GHDE, bias_GHD, resets_BT, *state)),
        *map(_pointer, (y_BTHD, checkpoints_NSBHD, *last)), B, T, H,
    )  # fmt: skip
    _launch("forward", wx_BTGHD, parameters)
    return y_BTHD, checkpoints_NSBHD, last


def backward_loop(
    gates_BTGHD: Tensor,
    r_GHDE: Tensor,
    dy_BTHD: Tensor,
    checkpoints_NSBHD: Tensor,
    resets_BT: Tensor | None,
    dlast: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See `fused.Loops`. Raises RuntimeError where `why_not` has a reason."""
    B, T, _, H, D = gates_BTGHD.shape
    dgates_BTGHD = torch.empty_like(gates_BTGHD, dtype=dy_BTHD.dtype)
    assert dgates_BTGHD.stride() == gates_BTGHD.stride()
    dy_first, dc_first, dn_first = (torch.empty_like(part) for part in dlast)
    dfirst = dy_first, dc_first, dn_first
    replayed = gates_BTGHD.new_empty(CHECKPOINT_STEPS, 3, B, H, D)
    parameters = BackwardParameters(
        _pointer(gates_BTGHD), *gates_BTGHD.stride()[:4], _pointer(r_GHDE), _pointer(dy_BTHD), *dy_BTHD.stride()[:3],
        *map(_pointer, (checkpoints_NSBHD, resets_BT, *dlast, dgates_BTGHD, *dfirst, replayed)), B, T, H,
    )  # fmt: skip
    _launch("backward", dy_BTHD, parameters)
    return dgates_BTGHD, dfirst


def _fields(names: str) -> list[tuple[str, type]]:
    """Fields as the kernels declare them: pointers but for strides (64 bits) and sizes (an upper-case letter)."""
    kinds = {name: ctypes.c_int if name.isupper() else ctypes.c_void_p for name in names.split()}
    return [(name, ctypes.c_longlong if "_stride" in name else kind) for name, kind in kinds.items()]


class ForwardParameters(ctypes.Structure):
    """`Forward` in cluster_forward.cu."""

    _fields_ = _fields(
        "wx sequence_stride step_stride gate_stride head_stride r bias resets y_first c_first n_first m_first "
        "y checkpoints y_last c_last n_last m_last B T H"
    )


class BackwardParameters(ctypes.Structure):
    """`Backward` in cluster_backward.cu."""

    _fields_ = _fields(
        "gates sequence_stride step_stride gate_stride head_stride r dy dy_sequence_stride dy_step_stride "
        "dy_head_stride checkpoints resets dy_last dc_last dn_last dgates dy_first dc_first dn_first replayed B T H"
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _layout(direction: str, B: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Layout:
    """Twice the rows in a cluster where the clusters would else wait for each other, if there is room."""
    layout, wide = (Layout(direction=direction, D=D, dtype=dtype, tiles=tiles) for tiles in (1, 2))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    crowded = layout.clusters(B, H) * layout.blocks > processors
    return wide if crowded and wide.shared_bytes <= _shared_bytes(device) else layout


def _shared_bytes(device: torch.device) -> int:
    """Shared memory of a block at most, in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined] # missing in torch's type stubs


def _launch(direction: str, like_BTHD: Tensor, parameters: ctypes.Structure) -> None:
    B, H, D, device = parameters.B, parameters.H, like_BTHD.shape[-1], like_BTHD.device
    layout = _layout(direction, B, H, D, like_BTHD.dtype, device)
    blocks = layout.clusters(B, H) * layout.blocks
    _kernel(layout, _indexed(device)).launch(blocks, 32 * layout.warps, parameters)


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


@functools.cache
def _kernel(layout: Layout, device: torch.device) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    announce_once(
        f"compiling the sLSTM's cluster kernels for heads of {layout.D} units in {layout.dtype}, a few seconds"
    )
    return Kernel(layout.binary(f"sm_{major}{minor}"), f"slstm_{layout.direction}", layout.shared_bytes, device)
