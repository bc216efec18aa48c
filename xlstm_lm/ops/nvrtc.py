"""CUDA C++ compiled at run time and launched, through the C interfaces of NVRTC and of the driver.

PyTorch brings NVRTC along; compiling needs no GPU, no CUDA headers and no nvcc.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

from xlstm_lm.ops.build_cache import cached_binary

_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def compile_cuda(source: str, name: str, architecture: str, macros: dict[str, object]) -> bytes:
    """The binary of a program for "sm_90" and the like; PTX of compute_90 for a newer GPU than NVRTC can compile for.

    Kept on this node, for later processes.

    Args:
        source: the program, which includes nothing.
        name: what messages call it.
        architecture: as in NVRTC's option --gpu-architecture.
        macros: defined before the program is read.

    Raises:
        RuntimeError: there is no NVRTC, the GPU is older than any that it can compile for, or the program has an error;
            says which.
    """
    major, minor, supported = _version_and_capabilities()
    if int(architecture.removeprefix("sm_")) > max(90, *supported):
        architecture = "compute_90"  # the driver compiles it on
    options = ["--std=c++17", f"--gpu-architecture={architecture}"]
    options += [f"--define-macro={macro}={value}" for macro, value in macros.items()]
    key = (source, name, *options, f"NVRTC {major}.{minor}")
    return cached_binary(key, lambda: _compile(source, name, architecture, options))


def _compile(source: str, name: str, architecture: str, options: list[str]) -> bytes:
    library = _nvrtc()
    program = ctypes.c_void_p()
    _check_nvrtc(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), encoded) != 0:
            log = _read(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode().strip("\0\n ")
            raise RuntimeError(f"NVRTC cannot compile {name} for {architecture}: {log}")
        form = "PTX" if architecture.startswith("compute_") else "CUBIN"
        return _read(program, f"nvrtcGet{form}Size", f"nvrtcGet{form}")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """A compiled kernel, loaded into the memory of one GPU."""

    def __init__(self, binary: bytes, name: str, dynamic_shared_bytes: int, device: torch.device) -> None:
        """Load it.

        Args:
            binary: as `compile_cuda` returns it.
            name: the kernel's, declared `extern "C"`.
            dynamic_shared_bytes: the shared memory that every launch asks for.
            device: the GPU.

        Raises:
            RuntimeError: the driver refuses, for example because the binary is made for another GPU.
        """
        self.device, self.dynamic_shared_bytes = device, dynamic_shared_bytes
        self._function, module = ctypes.c_void_p(), ctypes.c_void_p()
        with _current(device):
            _check_driver("cuModuleLoadData", ctypes.byref(module), binary)
            _check_driver("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())
            _check_driver("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED_SIZE, dynamic_shared_bytes)

    def launch(self, blocks: int, threads: int, parameters: ctypes.Structure) -> None:
        """Run it on PyTorch's current stream of its GPU with `parameters` as its one argument."""
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        sizes = (blocks, 1, 1, threads, 1, 1, self.dynamic_shared_bytes)
        with _current(self.device):
            _check_driver("cuLaunchKernel", self._function, *sizes, stream, arguments, None)


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    packages, paths = importlib.util.find_spec("nvidia"), []
    for folder in packages.submodule_search_locations or () if packages else ():
        # nvidia/cu13/lib, and nvidia/cuda_nvrtc/lib before CUDA 13
        paths += [str(path) for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*"))]
    names = []
    for major in dict.fromkeys([(torch.version.cuda or "13").partition(".")[0], "13", "12"]):  # PyTorch's own first
        names += [f"libnvrtc.so.{major}", *(path for path in paths if path.endswith(f".so.{major}"))]
    names.append("libnvrtc.so")
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError("CUDA's run-time compiler, libnvrtc.so, is not installed (pip install nvidia-cuda-nvrtc)")


@functools.cache
def _version_and_capabilities() -> tuple[int, int, tuple[int, ...]]:
    """Major and minor version of NVRTC, and the compute capabilities that it compiles for, as 90 for 9.0."""
    library, (major, minor, count) = _nvrtc(), (ctypes.c_int() for _ in range(3))
    _check_nvrtc(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    _check_nvrtc(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    capabilities = (ctypes.c_int * count.value)()
    _check_nvrtc(library.nvrtcGetSupportedArchs(capabilities))
    return major.value, minor.value, tuple(capabilities)


def _read(program: ctypes.c_void_p, size_function: str, function: str) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(getattr(_nvrtc(), size_function)(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check_nvrtc(getattr(_nvrtc(), function)(program, content))
    return content.raw


def _check_nvrtc(result: int) -> None:
    if result != 0:
        describe = _nvrtc().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC failed: {describe(result).decode()}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check_driver(function: str, *arguments: object) -> None:
    result = getattr(_driver(), function)(*arguments)
    if result != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"the CUDA driver's {function} failed: {(text.value or b'unknown error').decode()}")


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p:
    torch.cuda.init()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check_driver("cuDeviceGet", ctypes.byref(device), index)
    _check_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Have the driver speak to the GPU in PyTorch's context, also in a thread that has none yet (a backward pass's)."""
    with torch.cuda.device(device):
        _check_driver("cuCtxSetCurrent", _primary_context(torch.cuda.current_device()))
        yield
