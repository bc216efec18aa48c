"""Windows: every target is scored once, from the context that window and stride promise."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.scoring.sequences import score_sequences


class ContextCounter:
    """A model whose nats for a target are the number of inputs that it was predicted from."""

    name, begin, dtype, device = "counter", 0, torch.float32, torch.device("cpu")
    position_limit = None

    def __init__(self, carries_state: bool) -> None:
        self.carries_state = carries_state
        self.scored: list[int] = []

    def piece_length(self, rows: int, longest: int) -> int:
        return longest

    def score(self, tokens_BT, targets_BT, state, return_state):
        self.scored += targets_BT[targets_BT >= 0].tolist()
        before = state or 0
        context_BT = (before + torch.arange(1, tokens_BT.shape[1] + 1)).expand(targets_BT.shape)
        nats_BT = torch.where(targets_BT >= 0, context_BT, 0).float()
        return nats_BT, tokens_BT + 1 == targets_BT, before + tokens_BT.shape[1] if return_state else None


def sequences_of(lengths: list[int]) -> list[np.ndarray]:
    """Sequences of consecutive numbers, of which no two sequences share one."""
    starts = np.cumsum([0, *(length + 1 for length in lengths)])
    return [np.arange(start, start + length) for start, length in zip(starts[:-1], lengths, strict=True)]


lengths_of_sequences = st.lists(st.integers(2, 60), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), lengths=lengths_of_sequences, window=st.integers(2, 40), batch_size=st.integers(1, 5))
def test_windows_score_each_target_once_from_the_promised_context(data, lengths, window, batch_size):
    stride = data.draw(st.none() | st.integers(1, window))
    model, sequences = ContextCounter(carries_state=False), sequences_of(lengths)
    scores = score_sequences(model, sequences, batch_size=batch_size, window=window, stride=stride)
    assert sorted(model.scored) == sorted(int(each) for sequence in sequences for each in sequence[1:])
    for sequence, score in zip(sequences, scores, strict=True):
        assert score.greedy.all() and len(score.nats) == len(sequence) - 1
        position = np.arange(1, len(sequence))
        assert (score.nats <= np.minimum(position, window)).all()
        assert (score.nats >= np.minimum(position, window - (stride or window) + 1)).all()
        assert (score.nats[: min(window, len(position))] == position[:window]).all()


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_of_sequences, piece=st.integers(1, 40), batch_size=st.integers(1, 5))
def test_a_carried_state_gives_each_target_its_whole_context(lengths, piece, batch_size):
    model, sequences = ContextCounter(carries_state=True), sequences_of(lengths)
    scores = score_sequences(model, sequences, batch_size=batch_size, piece_length=piece)
    assert sorted(model.scored) == sorted(int(each) for sequence in sequences for each in sequence[1:])
    for sequence, score in zip(sequences, scores, strict=True):
        assert score.nats.tolist() == list(range(1, len(sequence))) and score.greedy.all()
