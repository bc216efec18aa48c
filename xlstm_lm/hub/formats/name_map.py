"""Renaming between our parameters and a foreign format's: one table a format, both directions derived from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Table = Mapping[str, tuple[str, ...]]
"""Our name -> theirs, which lie side by side in our tensor."""
EMBEDDING, HEAD = "embedding.weight", "head.weight"
OUR_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class NameMap:
    """A bijection between names of a model's parameters and those of a format, for models of any number of blocks."""

    outer: Table
    """Parameters outside the blocks."""
    prefix: str
    """Text before a block's number in their names."""
    kinds: Mapping[str, Table]
    """Parameters of a block of each kind."""

    def to(self, name: str, kind: str = "") -> tuple[str, ...]:
        """The format's names for one of our parameters, in a block of a kind or outside the blocks.

        Raises:
            KeyError: the format has no such parameter.
        """
        if not (block := OUR_BLOCK.fullmatch(name)):
            return self.outer[name]
        return tuple(f"{self.prefix}{block[1]}.{part}" for part in self.kinds[kind][block[2]])

    def from_(self, name: str, kind: str = "") -> tuple[str, int]:
        """Our name for a tensor of theirs, and its position among those that lie side by side in ours.

        Raises:
            KeyError: it is none of the format's.
        """
        table, place, inner = self.outer, "", name
        if block := re.fullmatch(re.escape(self.prefix) + r"(\d+)\.(.+)", name):
            table, place, inner = self.kinds[kind], f"blocks.{block[1]}.", block[2]
        for ours, parts in table.items():
            if inner in parts:
                return place + ours, parts.index(inner)
        raise KeyError(name)

    def count_blocks(self, names: Iterable[str]) -> int:
        """One more than the highest number of a block among their names; 0 where there is none."""
        return count_blocks(names, re.escape(self.prefix) + r"(\d+)\.")

    def names(self, kinds: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The format's names, by ours, for every parameter of a model whose blocks are of these kinds."""
        all_kinds = dict.fromkeys(self.outer, "")
        all_kinds |= {f"blocks.{i}.{ours}": kind for i, kind in enumerate(kinds) for ours in self.kinds[kind]}
        return {ours: self.to(ours, kind) for ours, kind in all_kinds.items()}

    def split(
        self, weights: Iterable[tuple[str, Tensor]], sizes: Callable[[str], list[int] | None], kind: str = ""
    ) -> Iterator[tuple[str, Tensor]]:
        """The format's names and tensors for ours, in our order.

        Args:
            weights: our names and tensors.
            sizes: rows of each of their tensors for our name within a block; None where all have the same.
            kind: the kind of all blocks.
        """
        for name, tensor in weights:
            parts = self.to(name, kind)
            rows = sizes(name.split(".", 2)[-1]) or [tensor.shape[0] // len(parts)] * len(parts)
            yield from zip(parts, tensor.split(rows) if len(parts) > 1 else (tensor,), strict=True)

    def select(
        self, tensors: Mapping[str, Tensor], kinds: Sequence[str], tied: bool, what: str
    ) -> dict[str, list[Tensor]]:
        """The format's tensors for each of our parameters.

        Args:
            tensors: all of theirs, by name.
            kinds: the kind of each block; a model without blocks is one whose first block is missing.
            tied: whether the flag of the format says that the head is the embedding. It is where no other head is
                there: none at all, or one equal to the embedding.
            what: the kind of model, for messages.

        Raises:
            ValueError: tensors are missing or left over; all are named.
        """
        wanted = self.names(kinds)
        if self.is_tied(tied, tensors):
            (head,) = wanted[HEAD]
            tensors = {name: tensor for name, tensor in tensors.items() if name != head}
            wanted[HEAD] = wanted[EMBEDDING]
        check_names(tensors, {name for parts in wanted.values() for name in parts}, what)
        return {ours: [tensors[name] for name in parts] for ours, parts in wanted.items()}

    def is_tied(self, flag: bool, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a model whose configuration says that its head is tied has no head but the embedding."""
        (embedding,), (head,) = self.outer[EMBEDDING], self.outer[HEAD]
        return flag and (head not in tensors or torch.equal(tensors[head], tensors.get(embedding, tensors[head])))


@dataclass(frozen=True)
class PrefixMap:
    """A bijection to a format that keeps our names behind a prefix, except for some."""

    prefix: str
    renamed: Mapping[str, str]
    """Our name -> theirs, of the exceptions."""

    def to(self, name: str) -> str:
        """The format's name for one of our parameters."""
        return self.renamed.get(name, f"{self.prefix}{name}")

    def from_(self, name: str) -> str:
        """Our name for a tensor of theirs; a name that the format does not have stays."""
        ours = {theirs: each for each, theirs in self.renamed.items()}
        return ours.get(name, name.removeprefix(self.prefix))


def joined(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Our tensors, with theirs side by side; a single one of theirs is not copied."""
    return {ours: torch.cat(each) if len(each) > 1 else each[0] for ours, each in parts.items()}


def count_blocks(names: Iterable[str], pattern: str = r"blocks\.(\d+)\.") -> int:
    """One more than the highest number that `pattern` finds at the beginning of a name; 0 where it finds none."""
    return 1 + max((int(match[1]) for match in map(re.compile(pattern).match, names) if match), default=-1)


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
