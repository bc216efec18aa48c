"""Leaving documents with the text of an earlier one out of files of token ids, by the hashes of their texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xlstm_lm.data.token_files import TokenFile, write_index
from xlstm_lm.data.token_statistics import Counts


def leave_out_duplicates(paths: Sequence[Path], counts: Sequence[Counts]) -> None:
    """Write indexes in which only the first document of each text has tokens. Doing it again changes nothing.

    The ids of duplicates stay in their files, and documents keep their numbers.

    Args:
        paths: All files of ids of a source, in the order of its documents.
        counts: Counts of each file, out of which duplicates are taken.
    """
    seen: set[bytes] = set()
    for path, count in zip(paths, counts):
        file = TokenFile(path)
        lengths = file.stored_lengths()
        left_out = np.zeros(len(lengths), dtype=bool)
        for position, number in enumerate(np.flatnonzero(lengths).tolist()):
            text = count.hashes[position]
            if text in seen:
                left_out[number] = True
                count.remove(position, file.document(number, int(lengths[number])))
            seen.add(text)
        write_index(path, lengths, file.dtype, left_out)
