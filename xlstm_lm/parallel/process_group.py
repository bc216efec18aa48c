"""The processes of a run: their axes, how they exchange objects, join and leave."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.errors import LOST_CONNECTION
from xlstm_lm.base.program import told_once

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)  # torch's own; DeepSpeed's, 10 minutes, is short for kernels that are compiled


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Processes that divide one dimension of the work among them, such as the rows of a batch."""

    rank: int
    """Position of this process among them."""
    size: int
    """Number of processes."""
    group: torch.distributed.ProcessGroup | None = None
    """Their process group; None for that of all processes."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor`, on this process's device, by its sum over the axis, and return it."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def from_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """The last process's `tensor`, which has the same shape and type on all processes of the axis."""
        tensor = tensor.contiguous().clone()
        torch.distributed.broadcast(tensor, group=self.group, group_src=self.size - 1)
        return tensor


WHOLE = Axis(rank=0, size=1)
"""Axis of a process that divides its work with no other."""


@dataclass(frozen=True, kw_only=True)
class World(Axis):
    """All processes of a run: the axis over which losses, targets and gradients are summed and ZeRO shards."""

    local_rank: int
    """Rank of this process on its node."""
    device: torch.device
    """Device of this process."""
    data: Axis = None  # type: ignore[assignment]  # set below
    """Processes that divide the rows of a batch; by default all."""
    sequence: Axis = WHOLE
    """Processes that divide the tokens of each row; by default this one alone."""

    def __post_init__(self) -> None:
        if self.data is None:
            object.__setattr__(self, "data", Axis(rank=self.rank, size=self.size, group=self.group))

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def check_sequence(self, size: int) -> None:
        """Check that neighbors can divide the tokens of their rows among `size` processes.

        Raises:
            ValueError: the processes are no multiple of `size`.
        """
        if self.size % size:
            raise ValueError(
                f"training.sequence_parallel is {size}, which does not divide the {self.size} processes of the run: "
                f"start a multiple of {size} processes, or choose a divisor of {self.size}."
            )

    def with_sequence(self, size: int) -> World:
        """The same processes, of which each `size` neighbors divide the tokens of their rows. Collective.

        Raises:
            ValueError: the processes are no multiple of `size`.
        """
        if size == 1:
            return self
        self.check_sequence(size)
        shape = (self.size // size, size)
        mesh = torch.distributed.init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "sequence"))
        data, sequence = (
            Axis(rank=mesh.get_local_rank(name), size=mesh[name].size(), group=mesh.get_group(name))
            for name in ("data", "sequence")
        )
        return dataclasses.replace(self, data=data, sequence=sequence)

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_first else None
        torch.distributed.gather_object(value, values, dst=0)
        return values or []

    def all_gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def gather_distinct(self, values: Sequence[Any]) -> list[Any]:
        """The picklable `values` of all ranks, each once and in rank order, on rank 0; an empty list on the others."""
        return list(dict.fromkeys(value for of_rank in self.gather(values) for value in of_rank))

    def from_first(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """The result of `action` on rank 0, on every rank; an error there is raised on every rank."""
        value, error = None, None
        if self.is_first:
            try:
                value = action()
            except Exception as caught:
                error = caught
        value, error = self.from_first((value, error))
        if error is not None:
            raise told_once(error)
        return value


def join_world() -> World:
    """Join the processes that a launcher (torchrun, deepspeed) started, or be a world of one.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Safe to call again.

    Raises:
        ValueError: only some of the variables are set.
        RunError: the other processes cannot be reached.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    launched = not missing
    if missing and len(missing) < len(LAUNCHER_VARIABLES) and size > 1:
        raise ValueError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} is not set: start the processes with torchrun or "
            "deepspeed, which set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE."
        )
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if launched:
            try:
                torch.distributed.init_process_group(backend, timeout=TIMEOUT)
            except torch.distributed.DistError as error:
                raise RunError(
                    f"rank {rank} cannot meet the other {size - 1} processes at MASTER_ADDR "
                    f"{os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}: "
                    f"{_first_sentence(error)}"
                ) from error
        else:
            # No port and no network: a store inside this process.
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
        atexit.register(_leave_world)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


class LostProcessError(RunError):
    """Another process of the run has gone: the reason is with that process."""


@contextlib.contextmanager
def lost_processes_explained(world: World) -> Iterator[None]:
    """Turn the error of a collective whose other end has gone into a LostProcessError.

    A process that has failed by itself raises its own error; the others get this one, as soon as gloo or NCCL notices.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or isinstance(error, RunError) or not _is_of_a_collective(error):
            raise
        raise LostProcessError(
            f"{LOST_CONNECTION} of the {world.size} processes: it has ended, was killed (of memory, "
            "say), or its machine cannot be reached. If it had a message, that stands above. Checkpoints finished "
            "before are intact: give the same command again to continue from the newest.\n"
            f"(rank {world.rank}: {_first_sentence(error)})"
        ) from error


def _first_sentence(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0].split(". ")[0]


def _is_of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def _leave_world() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # DeepSpeed keeps groups of its own, so their threads live on. One that still holds a tensor of the last collective
    # needs the interpreter's lock to free it; if it asks once the interpreter has gone, the process aborts.
    until = time.monotonic() + 5
    while time.monotonic() < until:
        time.sleep(0.02)  # the lock is free meanwhile: a thread that sleeps through this wants nothing
        if not _gloo_runs():
            break


def _gloo_runs() -> bool:
    """Whether a thread of Gloo is running or ready to; False where the system does not tell (it is not Linux)."""
    for thread in Path("/proc/self/task").glob("*"):
        try:
            name, state = re.search(r"\((.*)\) (\w)", (thread / "stat").read_text()).groups()  # type: ignore[union-attr]
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if "gloo" in name and state != "S":
            return True
    return False
