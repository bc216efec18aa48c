"""Named tensors in safetensors files, several with an index where one would grow too large, as on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xlstm_lm.base.read_files import read_json

SHARD_BYTES = 4 * 2**30


class TensorWriter:
    """Writes float32 tensors one after another, holding at most one file's worth of them."""

    def __init__(
        self,
        stem: str,
        sizes: dict[str, int],
        write: Callable[[str, bytes], None],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """`sizes` gives the number of elements of every tensor to come, in order; `write(name, content)` stores."""
        self._write = write
        self._pending: dict[str, Tensor] = {}
        self._stem = stem
        self._shards: list[list[str]] = [[]]
        held = 0
        for name, size in sizes.items():
            if self._shards[-1] and held + 4 * size > shard_bytes:
                self._shards.append([])
                held = 0
            self._shards[-1].append(name)
            held += 4 * size
        self._files = {name: self._file_name(index) for index, shard in enumerate(self._shards) for name in shard}
        if len(self._shards) > 1:
            total = sum(4 * size for size in sizes.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._files}
            write(f"{stem}.safetensors.index.json", json.dumps(index, indent=1).encode())
        self._number = 0

    def _file_name(self, index: int) -> str:
        count = len(self._shards)
        return f"{self._stem}.safetensors" if count == 1 else f"{self._stem}-{index + 1:05}-of-{count:05}.safetensors"

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor; the file is written as soon as its last one is there."""
        shard = self._shards[self._number]
        assert name == shard[len(self._pending)], f"{name} comes out of order"
        self._pending[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        if len(self._pending) == len(shard):
            self._write(self._file_name(self._number), safetensors.torch.save(self._pending, {"format": "pt"}))
            self._pending = {}
            self._number += 1


def tensor_files(folder: Path, stem: str = "model") -> dict[str, Path]:
    """The file that holds each tensor, by the tensor's name: `STEM.safetensors`, or the several of its index.

    Raises:
        ValueError: a file is missing or damaged, or does not hold what the index says. Every one of them is named.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return tensor_names([folder / f"{stem}.safetensors"])
    weight_map = read_json(index, {"weight_map": dict}, "Copy it again.")["weight_map"]
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} is damaged: its weight_map does not give the name of a file for each tensor.")
    files = {name: folder / file for name, file in weight_map.items()}
    absent = sorted({str(path) for path in files.values() if not path.is_file()})
    if absent:
        raise ValueError(f"{index} names files that are missing: {', '.join(absent)}. Copy them again.")
    there = tensor_names(files.values())
    astray = sorted(name for name, path in files.items() if there.get(name) != path)
    if astray:
        raise ValueError(f"{index} names tensors that are not in their files: {', '.join(astray)}.")
    return files


def tensor_names(paths: Iterable[Path]) -> dict[str, Path]:
    """The file that holds each tensor of some safetensors files, by the tensor's name.

    Raises:
        ValueError: files are missing, cut short or otherwise damaged; all are named.
    """
    found: dict[str, Path] = {}
    problems = []
    for path in dict.fromkeys(paths):
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except (OSError, SafetensorError) as error:
            problems.append(f"{path} is damaged: it cannot be read as safetensors ({error})")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    return found


def tensor_forms(files: dict[str, Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type, as safetensors calls it (F32), and shape of each tensor, from the heads of its files alone."""
    opened = {path: safe_open(path, framework="pt") for path in dict.fromkeys(files.values())}
    slices = {name: opened[path].get_slice(name) for name, path in files.items()}
    return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def read_tensors(files: dict[str, Path], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors one at a time, in the order of `names`, as saved.

    Each lies in its file's pages until it is written to: holding it takes no memory that the system cannot take back.
    """
    opened = {path: safe_open(path, framework="pt") for path in dict.fromkeys(files[name] for name in names)}
    for name in names:
        yield name, opened[files[name]].get_tensor(name)
