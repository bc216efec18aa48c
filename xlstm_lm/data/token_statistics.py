"""Counts of tokenized documents: how many, how long, and which ids occur."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from xlstm_lm.data.token_files import TokenFile
from xlstm_lm.data.tokenizer import Tokenizer

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass
class Counts:
    """Counts of one file of ids."""

    of_ids: np.ndarray
    """Occurrences of each id, int64 (V,)."""
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """Bytes of text, UTF-8."""
    skipped: int = 0
    """Bad documents."""

    @staticmethod
    def path(path: Path) -> Path:
        """Path of the counts of a file of ids."""
        return path.with_suffix(".npz")

    def add(self, size: int, ids: np.ndarray) -> None:
        """Count a document of `size` bytes."""
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += size
        self.of_ids += np.bincount(ids, minlength=len(self.of_ids))

    def save(self, path: Path) -> None:
        """Write the counts beside a file of ids."""
        numbers = [self.documents, self.tokens, self.bytes, self.skipped]
        np.savez_compressed(self.path(path), of_ids=self.of_ids, numbers=np.array(numbers, dtype=np.int64))

    @classmethod
    def load(cls, path: Path) -> Counts:
        """Read the counts beside a file of ids."""
        with np.load(cls.path(path)) as saved:
            return cls(saved["of_ids"], *saved["numbers"].tolist())


@dataclass(frozen=True)
class Statistics:
    """Statistics of the documents of a source."""

    documents: int
    tokens: int
    """Token ids, without ends of documents."""
    bytes: int
    """Bytes of text, UTF-8."""
    skipped: int
    """Bad documents that were left out."""
    bytes_per_token: float
    vocab_size: int
    used_ids: int
    """Ids that occur."""
    entropy_bits: float
    """Bits a token of a model that knows only how often each id occurs."""
    longest: int
    """Tokens of the longest document."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Tokens of a document at each quantile, such as 0.5 for the median."""

    def lines(self) -> list[str]:
        """Describe them for the console."""
        lengths = ", ".join(f"{float(share):.0%} up to {length:,}" for share, length in self.lengths.items())
        return [
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.bytes:,} bytes "
            f"({self.bytes_per_token:.2f} a token); {self.skipped:,} bad documents skipped",
            f"{self.used_ids:,} of {self.vocab_size:,} ids occur; {self.entropy_bits:.2f} bits a token by their shares",
            f"tokens of a document: {lengths}, the longest {self.longest:,}",
        ]


def summarize(paths: Sequence[Path], tokenizer: Tokenizer) -> Statistics:
    """Sum the counts of files of ids.

    Raises:
        ValueError: no document is in them.
    """
    counts = [Counts.load(path) for path in paths]
    of_ids = sum((each.of_ids for each in counts), np.zeros(tokenizer.vocab_size, dtype=np.int64))
    lengths = np.concatenate([TokenFile(path).lengths for path in paths])
    lengths = lengths[lengths > 0]
    if not len(lengths):
        raise ValueError(f"{paths[0].parent} has no document: every document of its source is empty or bad")
    tokens, size = sum(each.tokens for each in counts), sum(each.bytes for each in counts)
    shares = of_ids[of_ids > 0] / max(tokens, 1)
    return Statistics(
        documents=len(lengths),
        tokens=tokens,
        bytes=size,
        skipped=sum(each.skipped for each in counts),
        bytes_per_token=size / tokens,
        vocab_size=tokenizer.vocab_size,
        used_ids=len(shares),
        entropy_bits=-sum(float(share) * math.log2(share) for share in shares),
        longest=int(lengths.max()),
        lengths={str(each): int(np.quantile(lengths, each, method="lower")) for each in QUANTILES},
    )
