"""Batches for the training loop: rows of tokens, their targets, and the starts of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from xlstm_lm.data.packing import Row

IGNORED_TARGET = -100


@dataclass
class Batch:
    """Packed rows, one a lane (training) or consecutive ones (validation)."""

    tokens_BT: torch.Tensor
    """Inputs, int64."""
    targets_BT: torch.Tensor
    """The token that follows each input, int64; -100 where nothing is to be predicted."""
    resets_BT: torch.Tensor
    """True where a document starts and the model's state is therefore emptied, bool."""
    document_ids: list[list[str]]
    """The documents with a token in each row."""
    document_places: list[list[Any]] = field(default_factory=list)
    """Their places in the lanes, for `pass_over` of a stream; None for each in a batch for validation."""


def stack_rows(rows: Sequence[Row]) -> Batch:
    """Lay packed rows one under the other."""
    elements = torch.from_numpy(np.stack([row.elements for row in rows]).astype(np.int64))
    targets_BT = elements[:, 1:].clone()
    for index, row in enumerate(rows):
        targets_BT[index, row.num_targets :] = IGNORED_TARGET
    return Batch(
        tokens_BT=elements[:, :-1].contiguous(),
        targets_BT=targets_BT,
        resets_BT=torch.from_numpy(np.stack([row.resets for row in rows])),
        document_ids=[row.document_ids for row in rows],
        document_places=[row.places for row in rows],
    )
