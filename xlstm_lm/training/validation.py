"""Batches in parts and in numbers, and the loss on held-out documents."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xlstm_lm.data import Batch
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.engine import MicroBatch, TrainingEngine


def split_rows(batch: Batch, rows: int, device: torch.device) -> list[MicroBatch]:
    """Split a batch into parts of `rows` rows, on the device. Resets stay on the host, where attention needs them."""
    tensors = (tensor.to(device, non_blocking=True) for tensor in (batch.tokens_BT, batch.targets_BT))
    return list(zip(*(tensor.split(rows) for tensor in (*tensors, batch.resets_BT)), strict=True))


def document_ids(batch: Batch, world: World) -> list[str]:
    """Ids of the documents in the rows of all ranks, on rank 0. Collective."""
    return world.gather_distinct([each for row in batch.document_ids for each in row])


def count_targets(batch: Batch, bytes_per_token: Tensor) -> Tensor:
    """Count the target tokens of a batch and the bytes that they stand for: int64 (2,), on the host."""
    targets = batch.targets_BT[batch.targets_BT >= 0]
    return torch.stack((torch.tensor(targets.numel()), bytes_per_token[targets].sum()))


def evaluate(
    engine: TrainingEngine, batches: Iterator[Batch], *, world: World, bytes_per_token: Tensor
) -> tuple[float, int, int]:
    """Sum nats, target tokens and their bytes over every rank's `batches`. Collective: all ranks have equally many."""
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in batches:
        for micro_batch in split_rows(batch, len(batch.tokens_BT), world.device):
            totals[0] += engine.evaluate(micro_batch).double()
        totals[1:] += count_targets(batch, bytes_per_token).to(world.device)
    nats, tokens, size = world.sum_(totals).tolist()
    return nats, int(tokens), int(size)
