"""Checkpoints of format 2: each rank wrote its pieces of the tensors, which the manifest lists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.run_layout import MANIFEST
from xlstm_lm.runs.checkpoint_format1 import TAKE_AWAY, Checkpoint
from xlstm_lm.runs.checkpoint_layout import STEMS, StoredTensor


def read_tensor_entries(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Read the tensors that a manifest lists, by stem and name.

    Raises:
        ValueError: the manifest is damaged; names it and the tensor.
    """
    path = folder / MANIFEST
    manifest = read_json(path, {"tensors": dict, "files": dict}, TAKE_AWAY.format(folder=folder))
    stored: dict[str, dict[str, StoredTensor]] = {}
    for stem in STEMS:
        stored[stem] = {}
        for name, entry in manifest["tensors"].get(stem, {}).items():
            try:
                stored[stem][name] = tensor = StoredTensor.from_json(entry)
            except ValueError as error:
                raise ValueError(f"{path} is damaged at {name}: {error}.") from error
            unlisted = [piece.file for piece in tensor.pieces if piece.file not in manifest["files"]]
            if unlisted:
                raise ValueError(f"{path} is damaged at {name}: it gives no size and checksum of {unlisted[0]}.")
    return stored


class ShardedCheckpoint(Checkpoint):
    """An intact checkpoint of format 2."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._stored = read_tensor_entries(folder)

    def forms(self, stem: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: ("F32", tensor.shape) for name, tensor in self._stored[stem].items()}

    def part(self, stem: str, name: str, start: int, stop: int) -> Tensor:
        read = []
        for piece, first, last in self._stored[stem][name].parts(start, stop):
            with safe_open(self.folder / piece.file, framework="pt") as file:
                read.append(file.get_slice(name)[first:last])
        self.bytes_read += sum(values_N.nbytes for values_N in read)
        return read[0] if len(read) == 1 else torch.cat([torch.empty(0), *read])

    def _whole(self, stem: str, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        self.check_names(stem, names)
        stored = self._stored[stem]
        shapes = {name: stored[name].shape for name in names}
        return ((name, self.part(stem, name, 0, math.prod(shape)).view(shape)) for name, shape in shapes.items())
