"""Checkpoints of format 1: rank 0 wrote whole tensors, model.safetensors and optimizer.safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.run_layout import RANDOM_STATE, STATE
from xlstm_lm.base.tensor_files import read_tensors, tensor_files, tensor_forms
from xlstm_lm.runs.folder import RunFolder

TAKE_AWAY = "Restore {folder} from a copy, or move it away to continue from the checkpoint before it."


class Checkpoint:
    """An intact checkpoint on disk, in format 1, as `read_checkpoint` opens it.

    Readers of other formats derive from this class and return today's names, tensors and state.
    """

    def __init__(self, folder: Path) -> None:
        """Read state.json.

        Raises:
            ValueError: state.json is damaged.
        """
        self.folder = folder
        self.state = read_json(folder / STATE, {"step": int}, TAKE_AWAY.format(folder=folder))
        self.bytes_read = 0
        """Bytes of tensors that `part` has read."""
        self._files_of: dict[str, dict[str, Path]] = {}

    @property
    def is_imported(self) -> bool:
        """Whether the checkpoint holds the weights of an imported model and nothing of a run."""
        return "imported_from" in self.state

    @property
    def optimizer(self) -> str:
        """Kind of the optimizer whose state the checkpoint holds: AdamW in older checkpoints, which do not name it."""
        return self.state.get("optimizer", "adamw")

    def config(self) -> dict[str, Any]:
        """Read the sections of config.yaml: all of a run's, or only `model` of an imported model."""
        return RunFolder(self.folder).config()

    def random_state(self, rank: int) -> bytes | None:
        """Read the random states of a rank; None if the run had fewer ranks."""
        path = self.folder / RANDOM_STATE.format(rank)
        return path.read_bytes() if path.is_file() else None

    def all_weights(self) -> dict[str, Tensor]:
        """Map every float32 weight by name. Weights are read from their files when they are used, where they can be."""
        return dict(self.weights(list(self.forms("model"))))

    def weights(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and float32 weight of each named parameter, in order.

        Raises:
            ValueError: the checkpoint holds other parameters.
        """
        return self._whole("model", names)

    def moments(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of each named tensor of optimizer state, in order; raises as `weights` does."""
        return self._whole("optimizer", names)

    def check_names(self, stem: str, names: list[str]) -> None:
        """Check that the checkpoint holds these tensors and no others.

        Raises:
            ValueError: it does not; names one that differs.
        """
        different = sorted(set(names) ^ set(self.forms(stem)))
        if different:
            raise ValueError(
                f"{self.folder} belongs to another model: {len(different)} tensors are in one of the two only, such as "
                f"{different[0]}."
            )

    def forms(self, stem: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type, as safetensors calls it (F32), and shape of each tensor, by name, without reading tensors.

        Args:
            stem: model for weights, optimizer for optimizer state.
        """
        return tensor_forms(self._files(stem))

    def part(self, stem: str, name: str, start: int, stop: int) -> Tensor:
        """Read elements start to stop of a flattened tensor: (stop - start,), float32."""
        path = self._files(stem)[name]
        with safe_open(path, framework="pt") as file:
            values_N = file.get_tensor(name).reshape(-1)[start:stop].clone()  # the file is mapped, not read whole
        self.bytes_read += values_N.nbytes
        return values_N

    def _whole(self, stem: str, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        self.check_names(stem, names)
        return read_tensors(self._files(stem), names)

    def _files(self, stem: str) -> dict[str, Path]:
        if stem not in self._files_of:
            self._files_of[stem] = tensor_files(self.folder, stem)
        return self._files_of[stem]
