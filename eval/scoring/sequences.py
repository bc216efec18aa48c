"""Nats of whole documents, in batches: with the state carried from piece to piece, or in independent windows.

A sequence is the token that begins a document, its tokens and, where the document's end is to be predicted too, the
end-of-document token: n + 1 elements of which the last n are targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eval.scoring.models import CausalModel
from xlstm_lm.data import IGNORED_TARGET

PIECE_LENGTH = 2048  # a longer sequence goes through a model that carries its state in pieces of so many tokens


@dataclass
class Scores:
    """A model's predictions of the n targets of a sequence."""

    nats: np.ndarray
    """Negative log-probability of each target (n), float32 (float64 of a model in float64)."""
    greedy: np.ndarray
    """Whether it is the likeliest token (n), bool."""


@dataclass
class _Segment:
    """Inputs [first, last) of a sequence, whose targets count from input `scored` on."""

    sequence: int
    first: int
    last: int
    scored: int


def score_sequences(
    model: CausalModel,
    sequences: Sequence[np.ndarray],
    *,
    batch_size: int,
    window: int | None = None,
    stride: int | None = None,
    piece_length: int = PIECE_LENGTH,
) -> list[Scores]:
    """Score every target of every sequence once.

    Args:
        model: any.
        sequences: see above; int arrays of at least 2 elements.
        batch_size: rows in a batch; changes no score.
        window: None carries the state from the beginning to the end of each sequence, at constant memory (the model
            must carry its state); a number cuts sequences in windows of so many inputs that know nothing of each other.
        stride: how far each window is ahead of the one before (default: `window`). A smaller one gives every target but
            the first ones at least window - stride + 1 inputs to predict it from. The last window of a sequence reaches
            back so as to be full.
        piece_length: inputs that a model which carries its state takes at once, at most.

    Raises:
        ValueError: the window is longer than the model's positions, or it needs one and there is none.
    """
    if window is None and not model.carries_state:
        raise ValueError(
            f"{model.name} keeps no state of constant size that could be carried along; score it in windows."
        )
    if window is not None:
        check_window(model, window, stride or window)
    limit = window or max((len(sequence) for sequence in sequences), default=1)
    segments = [
        segment
        for index, sequence in enumerate(sequences)
        for segment in _segments(index, len(sequence) - 1, limit, stride or limit)
    ]
    dtype = np.float64 if model.dtype == torch.float64 else np.float32
    scores = [Scores(np.zeros(len(each) - 1, dtype), np.zeros(len(each) - 1, bool)) for each in sequences]
    for batch in _batches(segments, batch_size, piece_length):
        longest = batch[0].last - batch[0].first
        tokens_BT = np.full((len(batch), longest), model.begin, dtype=np.int64)
        targets_BT = np.full((len(batch), longest), IGNORED_TARGET, dtype=np.int64)
        for row, segment in enumerate(batch):
            elements = sequences[segment.sequence]
            length, skipped = segment.last - segment.first, segment.scored - segment.first
            tokens_BT[row, :length] = elements[segment.first : segment.last]
            targets_BT[row, skipped:length] = elements[segment.scored + 1 : segment.last + 1]
        piece = model.piece_length(len(batch), piece_length) if model.carries_state else longest
        nats_BT, greedy_BT = _score_batch(model, tokens_BT, targets_BT, piece)
        for row, segment in enumerate(batch):
            inputs = slice(segment.scored - segment.first, segment.last - segment.first)
            scores[segment.sequence].nats[segment.scored : segment.last] = nats_BT[row, inputs]
            scores[segment.sequence].greedy[segment.scored : segment.last] = greedy_BT[row, inputs]
    return scores


def check_window(model: CausalModel, window: int, stride: int) -> None:
    """Refuse a window or stride that cannot be.

    Raises:
        ValueError: it is below 2, longer than the model's positions, or the stride is not from 1 to the window.
    """
    if window < 2:
        raise ValueError(f"A context length of {window} predicts nothing from context; it must be at least 2.")
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must be from 1 to the context length {window}.")
    if model.position_limit and window > model.position_limit:
        raise ValueError(
            f"{model.name} has learned {model.position_limit} positions and cannot take a context of {window} tokens."
        )


def _segments(sequence: int, num_inputs: int, window: int, stride: int) -> Iterator[_Segment]:
    scored = 0
    while scored < num_inputs:
        last = min(scored + (stride if scored else window), num_inputs)
        yield _Segment(sequence, max(0, last - window), last, scored)
        scored = last


def _batches(segments: list[_Segment], batch_size: int, piece_length: int) -> Iterator[list[_Segment]]:
    """Longest first; no row of a long batch is more than half padding."""
    ordered = sorted(segments, key=lambda each: each.first - each.last)
    batch: list[_Segment] = []
    for segment in ordered:
        longest = batch[0].last - batch[0].first if batch else 0
        much_shorter = longest > piece_length and 2 * (segment.last - segment.first) < longest
        if batch and (len(batch) == batch_size or much_shorter):
            yield batch
            batch = []
        batch.append(segment)
    if batch:
        yield batch


def _score_batch(
    model: CausalModel, tokens_BT: np.ndarray, targets_BT: np.ndarray, piece_length: int
) -> tuple[np.ndarray, np.ndarray]:
    nats, greedy = [], []
    state = None
    for first in range(0, tokens_BT.shape[1], piece_length):
        piece = slice(first, first + piece_length)
        tokens, targets = (torch.from_numpy(each[:, piece]).to(model.device) for each in (tokens_BT, targets_BT))
        more = first + piece_length < tokens_BT.shape[1]
        nats_BT, greedy_BT, state = model.score(tokens, targets, state, return_state=more)
        nats.append(nats_BT.cpu().numpy())
        greedy.append(greedy_BT.cpu().numpy())
    return np.concatenate(nats, 1), np.concatenate(greedy, 1)
