"""The sLSTM's cluster kernels, from their own source, with `cluster_emulator.h` in place of a GPU."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from xlstm_lm.ops.slstm import cluster

EMULATOR = Path(__file__).with_name("cluster_emulator.h")
BARRIERS = {"warp": 1, "block": 2, "cluster": 4, "mail": 8}
"""Barriers that a test can leave out, by their bits."""


class EmulationError(Exception):
    """A kernel does what no kernel may, whatever comes of it."""


@functools.cache
def _library(layout: cluster.Layout) -> ctypes.CDLL:
    name = f"slstm_{layout.direction}"
    structure = layout.direction.capitalize()
    lines = [f"#define {macro} {value}" for macro, value in layout.macros.items()]
    lines += [f'#include "{path}"' for path in (EMULATOR, *(cluster.FOLDER / file for file in layout.files))]
    lines += [
        f'extern "C" const char* emulate(const {structure}* p, int index, unsigned seed, int ignored) {{',
        "  static std::string problem;",
        "  const auto kernel = [p] { " + name + "(*p); };",
        "  problem = emulator::run(kernel, index, BLOCKS, 32 * WARPS, SHARED_BYTES, seed, ignored);",
        "  return problem.c_str();",
        "}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_text("\n".join(lines))
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
        subprocess.run(["g++", *flags, source, "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.emulate.restype = ctypes.c_char_p
    return loaded


def emulated_launch(
    tiles: int, seed: int = 0, ignored: dict[str, int] | None = None
) -> Callable[[str, torch.Tensor, ctypes.Structure], None]:
    """A stand-in for `cluster._launch` for tensors on the CPU.

    Args:
        tiles: groups of eight sequences that a cluster computes.
        seed: seed of the order in which threads run.
        ignored: by direction, barriers at which nobody waits, as a sum of `BARRIERS`.
    """

    def launch(direction: str, like_BTHD: torch.Tensor, parameters: ctypes.Structure) -> None:
        layout = cluster.Layout(direction=direction, D=like_BTHD.shape[-1], dtype=like_BTHD.dtype, tiles=tiles)
        for index in range(layout.clusters(parameters.B, parameters.H)):
            skipped = (ignored or {}).get(direction, 0)
            problem = _library(layout).emulate(ctypes.byref(parameters), index, seed + index, skipped)
            if problem:
                raise EmulationError(f"{direction}: {problem.decode()}")

    return launch
