"""Packing against the stream written out by hand: e D1 e D2 e D3 ..., cut every T elements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_lm.data.batch import stack_rows
from xlstm_lm.data.packing import Document, pack

END = 99

documents_of_tokens = st.lists(st.lists(st.integers(0, 50), min_size=0, max_size=40), min_size=1, max_size=12)


def in_pieces(tokens: list[int]) -> list[np.ndarray]:
    """The tokens cut in uneven pieces, an empty one included."""
    array = np.array(tokens, dtype=np.int32)
    return np.split(array, [len(tokens) // 3, len(tokens) // 3, len(tokens) // 2])


def documents(tokens: list[list[int]]) -> list[Document]:
    return [Document(in_pieces(one), str(index), {"document": index}) for index, one in enumerate(tokens)]


@settings(max_examples=200, deadline=None)
@given(tokens=documents_of_tokens, context_length=st.integers(1, 30))
def test_every_token_is_predicted_once_from_its_own_document(tokens, context_length):
    batch = stack_rows(list(pack(documents(tokens), context_length, END)))
    counted = batch.targets_BT != -100
    stream = [element for one in tokens for element in [END, *one]]
    assert batch.tokens_BT[counted].tolist() == stream
    assert batch.targets_BT[counted].tolist() == [*stream[1:], END]
    starts = [position == 0 for one in tokens for position in range(len(one) + 1)]
    assert batch.resets_BT[counted].tolist() == starts
    # What is filled up stands at the end, holds nothing to predict and starts no document.
    assert not batch.resets_BT[~counted].any() and (batch.tokens_BT[~counted] == END).all()
    assert counted.flatten().tolist() == sorted(counted.flatten().tolist(), reverse=True)
    assert len(batch.tokens_BT) == -(-len(stream) // context_length)


@settings(max_examples=50, deadline=None)
@given(tokens=documents_of_tokens, context_length=st.integers(1, 30))
def test_rows_name_their_documents(tokens, context_length):
    owners = [str(index) for index, one in enumerate(tokens) for _ in range(len(one) + 1)]
    for number, row in enumerate(pack(documents(tokens), context_length, END)):
        expected = owners[number * context_length : (number + 1) * context_length]
        assert row.document_ids == list(dict.fromkeys(expected))


@settings(max_examples=100, deadline=None)
@given(tokens=documents_of_tokens, context_length=st.integers(1, 30), after=st.integers(0, 5))
def test_the_state_after_a_row_goes_on_exactly(tokens, context_length, after):
    def endless(first: int = 0):
        for index in itertools.count(first):
            yield Document(in_pieces(tokens[index % len(tokens)]), str(index), {"document": index})

    rows = list(itertools.islice(pack(endless(), context_length, END), after + 4))
    state = rows[after].state
    again = list(itertools.islice(pack(endless(state["document"]), context_length, END, state["offset"]), 3))
    for expected, row in zip(rows[after + 1 :], again):
        assert row.elements.tolist() == expected.elements.tolist()
        assert row.resets.tolist() == expected.resets.tolist()
        assert row.document_ids == expected.document_ids
        assert row.state == expected.state


@pytest.mark.parametrize("length", [8, 16])
def test_an_exact_fit_makes_no_empty_row(length):
    rows = list(pack(documents([[1] * (length - 1)]), 8, END))
    assert [row.num_targets for row in rows] == [8] * (length // 8)
    assert rows[-1].elements[-1] == END


def test_no_document_no_row():
    assert list(pack([], 8, END)) == []
