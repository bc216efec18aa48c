"""What the names of a model's tensors tell: how many blocks it has, whether its head is tied, what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number that `pattern` finds at the beginning of a name; 0 where it finds none."""
    return 1 + max((int(match[1]) for match in map(re.compile(pattern).match, names) if match), default=-1)


def is_tied(flag: bool, tensors: dict[str, Tensor], embedding: str, head: str) -> bool:
    """Whether a model whose configuration says that its head is tied has no head but the embedding."""
    return flag and (head not in tensors or torch.equal(tensors[head], tensors.get(embedding, tensors[head])))


def check_names(found: Iterable[str], wanted: Iterable[str], what: str) -> None:
    """Compare the names of tensors with those that a model of this kind has.

    Raises:
        ValueError: names are missing or left over; all are named.
    """
    missing, left_over = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or left_over:
        raise ValueError(
            f"The tensors are not those of {what}: missing {', '.join(missing) or 'none'}; "
            f"left over {', '.join(left_over) or 'none'}."
        )
