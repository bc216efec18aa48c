"""The sLSTM cell as a compiled CPU loop: builds the C++ once, loads it, and gives it to autograd.

The library is built in a folder of its own and moved to its final name in torch's extension directory when it is whole,
so a build that is killed leaves nothing that a later process could load or wait for.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from xlstm_lm.ops.announce import announce_once
from xlstm_lm.ops.slstm.recurrence import SLSTMState, compute_dtype

_SOURCES = [Path(__file__).with_name(name) for name in ("slstm_cpu.cpp", "cell.h", "simd.h")]
# Nothing that would let the compiler assume away infinities and NaNs: m = -inf is the empty state.
_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
_NATIVE_FLAG = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_OPENMP_FLAGS = ["-fopenmp"] if platform.system() == "Linux" else []  # Apple's clang has none; one thread there


def slstm_compiled(
    wx_BTGHD: torch.Tensor,
    r_GHDE: torch.Tensor,
    bias_GHD: torch.Tensor,
    *,
    resets_BT: torch.Tensor | None = None,
    initial_state: SLSTMState | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SLSTMState]:
    """The cell of `slstm_recurrence`, same arguments and results, for CPU tensors. Half precisions run in float32.

    Between the passes it keeps wx, y and a checkpoint of c, n and m every 32 steps. Differentiable once.

    Raises:
        RuntimeError: there is no compiled kernel and none could be built here.
    """
    load_kernel()
    dtype = compute_dtype(wx_BTGHD.dtype)
    gates_BTGHD = wx_BTGHD.to(dtype)
    if gates_BTGHD.stride(-1) != 1:
        gates_BTGHD = gates_BTGHD.contiguous()
    r_GHDE, bias_GHD = r_GHDE.to(dtype).contiguous(), bias_GHD.to(dtype).contiguous()
    resets_BT = None if resets_BT is None else resets_BT.contiguous()
    state = () if initial_state is None else tuple(part.to(dtype).contiguous() for part in initial_state)

    differentiable = (gates_BTGHD, r_GHDE, bias_GHD, *state[:3])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        y_BTHD, c_BHD, n_BHD, m_BHD = _CompiledSLSTM.apply(gates_BTGHD, r_GHDE, bias_GHD, resets_BT, *state)
    else:
        y_BTHD, c_BHD, n_BHD, m_BHD, _ = torch.ops.xlstm_lm.slstm_forward(
            gates_BTGHD, r_GHDE, bias_GHD, resets_BT, state, False
        )
    final_state = (y_BTHD[:, -1], c_BHD, n_BHD, m_BHD)
    y_BTHD = y_BTHD.to(wx_BTGHD.dtype)
    return (y_BTHD, final_state) if return_state else y_BTHD


class _CompiledSLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wx_BTGHD, r_GHDE, bias_GHD, resets_BT, *state):
        ctx.set_materialize_grads(False)
        y_BTHD, c_BHD, n_BHD, m_BHD, checkpoints = torch.ops.xlstm_lm.slstm_forward(
            wx_BTGHD, r_GHDE, bias_GHD, resets_BT, state, True
        )
        y_initial_BHD = state[0] if state else None
        ctx.save_for_backward(wx_BTGHD, r_GHDE, bias_GHD, resets_BT, y_initial_BHD, y_BTHD, checkpoints)
        ctx.mark_non_differentiable(m_BHD)
        return y_BTHD, c_BHD, n_BHD, m_BHD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHD, dc_BHD, dn_BHD, _):
        *inputs, y_BTHD, checkpoints = ctx.saved_tensors
        dy_BTHD = torch.zeros_like(y_BTHD) if dy_BTHD is None else dy_BTHD.contiguous()
        if dc_BHD is not None or dn_BHD is not None:
            zeros_BHD = torch.zeros_like(y_BTHD[:, 0])
            dc_BHD = zeros_BHD if dc_BHD is None else dc_BHD.contiguous()
            dn_BHD = zeros_BHD if dn_BHD is None else dn_BHD.contiguous()
        dwx, dr, dbias, *dstate = torch.ops.xlstm_lm.slstm_backward(
            *inputs, y_BTHD, checkpoints, dy_BTHD, dc_BHD, dn_BHD
        )
        with_state = len(ctx.needs_input_grad) > 4
        return dwx, dr.sum(0), dbias.sum(0), None, *((*dstate, None) if with_state else ())


def kernel_available() -> bool:
    """Whether the compiled kernel can be used here; builds it if need be. Where it cannot, says why, once."""
    try:
        load_kernel()
    except RuntimeError as error:
        announce_once(
            f"no compiled sLSTM CPU kernel, so the cell runs step by step in Python, which is far slower: {error}"
        )
        return False
    return True


def load_kernel() -> None:
    """Load the kernel's library into this process, after building it where nobody has yet.

    Raises:
        RuntimeError: it can be neither built nor loaded; says why and what to install.
    """
    problem = _load_once()
    if problem is not None:
        raise RuntimeError(problem)


@functools.cache
def _load_once() -> str | None:
    """None when the library is loaded, else what went wrong; cached, so that a failing build is not tried each call."""
    try:
        path = _library_path()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _only_one_process(path.parent / "building"):
                if not path.exists():
                    for left_by_a_killed_process in path.parent.glob("build_*"):
                        shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
                    _build(path)
                    return None
        torch.ops.load_library(path)
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line or "not found" in line), lines[-1])
        return (
            f"{reason} (the kernel needs a C++20 compiler such as g++ 11 or newer, ninja, and a folder to write to, "
            "which TORCH_EXTENSIONS_DIR can name)"
        )
    return None


def _library_path() -> Path:
    """Where the library for this source, these flags, this torch and this processor belongs."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    parts = [torch.__version__, platform.machine(), _processor_features(), _NATIVE_FLAG, *_FLAGS, *_OPENMP_FLAGS]
    parts += [source.read_text() for source in _SOURCES]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return Path(root) / "xlstm_lm" / f"slstm_cpu_{digest}.so"


def _processor_features() -> str:
    """What `-march=native` depends on: a home directory may be shared by machines with different processors."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


@contextlib.contextmanager
def _only_one_process(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path`; the system drops it with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(path: Path) -> None:
    """Compile the library, load it, and move it to `path`."""
    from torch.utils import cpp_extension  # slow to import, and only needed here

    announce_once(f"building the sLSTM CPU kernel, once, about 30 s, into {path}")
    # ninja from the registry lies beside the interpreter, which is not on PATH when that is called by its full name.
    search_path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([search_path, str(Path(sys.executable).parent)])
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build_") as folder:
            cpp_extension.load(
                name=path.stem,
                sources=[str(_SOURCES[0])],
                extra_cflags=[*_FLAGS, _NATIVE_FLAG, *_OPENMP_FLAGS],
                extra_ldflags=_OPENMP_FLAGS,
                build_directory=folder,
                is_python_module=False,
                with_cuda=False,
            )
            (Path(folder) / path.name).replace(path)
    finally:
        os.environ["PATH"] = search_path
