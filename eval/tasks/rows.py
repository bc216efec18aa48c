"""A task as training data: sequences end to end in rows of fixed length, each with a reset at its start.

Sequence number n of lane l with seed s is always the same, so a lane's position is a count.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.tasks.registry import build_task
from eval.tasks.task import Example, Task
from xlstm_lm.data import IGNORED_TARGET, Batch, DataConfig
from xlstm_lm.data.fingerprint import fingerprint_differences
from xlstm_lm.data.opened import Commit
from xlstm_lm.data.training_data import OnFirst

TRAINING, VALIDATION, TEST = range(3)  # parts that never share a random stream
BLOCK = 64  # sequences from one random stream: making one takes longer than drawing a sequence


class Symbols:
    """A task in place of a tokenizer: it gives each token a meaning."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.vocab_size = len(task.symbols)
        self.bytes_per_token = torch.zeros(self.vocab_size, dtype=torch.int64)  # no text

    def fingerprint(self) -> str:
        """The identity of the vocabulary (see `xlstm_lm.data.training_data.Vocabulary`)."""
        return json.dumps(asdict(self._task), sort_keys=True)

    def save(self, folder: Path) -> None:
        """Write symbols.json: the task, and the meaning of every token."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"task": asdict(self._task), "symbols": self._task.symbols}
        (folder / "symbols.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


class TaskStream:
    """Endless batches of a task, as `xlstm_lm.data.training_data.Stream`."""

    def __init__(self, task: Task, config: DataConfig, *, lanes: range, seed: int, part: int = TRAINING) -> None:
        self._task, self._config, self._seed, self._part = task, config, seed, part
        self._given = dict.fromkeys(lanes, 0)
        self._passed_over: dict[int, set[int]] = {lane: set() for lane in lanes}
        """Numbers of sequences that each lane leaves out."""
        self._left_over: dict[int, Example] = {}
        self._sequences = {lane: self._draw(lane, 0) for lane in lanes}

    def start(self) -> None:
        """Nothing runs ahead."""

    def next_batch(self) -> Batch:
        """One row for each owned lane, in lane order."""
        shape = len(self._given), self._config.context_length
        tokens_BT, targets_BT = np.full(shape, self._task.padding), np.full(shape, IGNORED_TARGET)
        resets_BT = np.zeros(shape, dtype=bool)
        names, places = [], []
        for row, lane in enumerate(self._given):
            numbers = self._fill(lane, tokens_BT[row], targets_BT[row], resets_BT[row])
            names.append([f"{self._task.name} {lane}/{number}" for number in numbers])
            places.append(numbers)
        tensors = (torch.from_numpy(array) for array in (tokens_BT, targets_BT, resets_BT))
        return Batch(*tensors, document_ids=names, document_places=places)

    def _fill(self, lane: int, tokens_T: np.ndarray, targets_T: np.ndarray, resets_T: np.ndarray) -> list[int]:
        """Fill a row with as many of the lane's next sequences as fit; the rest is padding. Returns their numbers."""
        begin, numbers = 0, []
        while begin < len(tokens_T):
            resets_T[begin] = True
            while self._given[lane] in self._passed_over[lane]:
                next(self._sequences[lane])
                self._given[lane] += 1
            tokens, targets = self._left_over.pop(lane, None) or next(self._sequences[lane])
            end = begin + len(tokens)
            if end > len(tokens_T):
                self._left_over[lane] = tokens, targets  # begins the next row
                return numbers
            tokens_T[begin:end], targets_T[begin:end] = tokens, targets
            begin = end
            numbers.append(self._given[lane])
            self._given[lane] += 1
        return numbers

    def _draw(self, lane: int, first: int) -> Iterator[Example]:
        """A lane's sequences from number `first` on."""
        for block in itertools.count(first // BLOCK):
            generator = np.random.default_rng((self._seed, self._part, lane, block))
            for number in range(block * BLOCK, (block + 1) * BLOCK):
                example = self._task.draw(generator)
                if number >= first:
                    yield example

    def state_dict(self) -> dict[str, Any]:
        """How many sequences each owned lane has given and, where there are any, those to leave out."""
        to_pass = {
            lane: sorted(number for number in self._passed_over[lane] if number >= count)
            for lane, count in self._given.items()
        }
        return {str(lane): [count, *to_pass[lane]] if to_pass[lane] else count for lane, count in self._given.items()}

    def load_state_dict(self, states: Mapping[str, Any], fingerprint: Mapping[str, Any] | None = None) -> None:
        """Go on where `states`, of any number of ranks, left off."""
        for lane in self._given:
            state = states[str(lane)]
            self._given[lane], *to_pass = state if isinstance(state, list) else [state]
            self._passed_over[lane] = set(to_pass)
        self._go_to_positions()

    def pass_over(self, places: Mapping[str, list[int]]) -> None:
        """Leave out sequences that come later, by the number of the lane (see `TrainingStream.pass_over`)."""
        for lane in self._given:
            self._passed_over[lane].update(places.get(str(lane), []))
        self._go_to_positions()

    def _go_to_positions(self) -> None:
        self._left_over = {}
        self._sequences = {lane: self._draw(lane, first) for lane, first in self._given.items()}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the stream."""
        return {
            "task": asdict(self._task),
            "context_length": self._config.context_length,
            "global_batch_size": self._config.global_batch_size,
            "seed": self._seed,
        }

    def differences(self, fingerprint: Mapping[str, Any], states: Mapping[str, Any]) -> list[str]:
        """Why it cannot go on from a checkpoint, one line for each setting."""
        return fingerprint_differences(fingerprint, json.loads(json.dumps(self.fingerprint())))

    def close(self) -> None:
        """Nothing is open."""


class TaskData:
    """The task in `data.task` of a run, as `xlstm_lm.data.TrainingData`."""

    def __init__(self, config: DataConfig) -> None:
        """Build the task.

        Raises:
            ValueError: there is none, it is not known, or its sequences are longer than a row.
        """
        if config.task is None:
            raise ValueError("data.task is not set; give a recipe that python -m eval.tasks wrote.")
        self.task = build_task(config.task)
        if self.task.longest > config.context_length:
            raise ValueError(
                f"data.context_length is {config.context_length}, but sequences of the task have up to "
                f"{self.task.longest} tokens; give rows of at least {self.task.longest}."
            )
        self.config = config
        self.tokenizer = Symbols(self.task)

    def share(
        self, on_first: OnFirst, fingerprint: Mapping[str, Any] | None, commits: Sequence[Commit]
    ) -> list[Commit]:
        """Nothing is to be opened."""
        del on_first, fingerprint, commits
        return []

    def stream(self, lanes: range, seed: int) -> TaskStream:
        """The training stream of these lanes (see `xlstm_lm.data.TrainingData`)."""
        return TaskStream(self.task, self.config, lanes=lanes, seed=seed)

    def validation_batches(self, *, rows: int, rank: int, world_size: int) -> Iterator[Batch]:
        """Rows of about `data.validation_tokens` tokens that come as in training, the same for every seed of a run."""
        wanted = max(1, self.config.validation_tokens // self.config.context_length)
        for first in range(0, wanted, rows * world_size):
            lanes = range(first + rank * rows, first + (rank + 1) * rows)
            batch = TaskStream(self.task, self.config, lanes=lanes, seed=0, part=VALIDATION).next_batch()
            batch.targets_BT[max(0, wanted - lanes.start) :] = IGNORED_TARGET
            yield batch
