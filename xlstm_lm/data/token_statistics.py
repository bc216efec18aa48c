"""Counts of tokenized documents: how many, how long, and which ids occur."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from xlstm_lm.data.token_files import TokenFile
from xlstm_lm.data.tokenizer import Tokenizer

HASH_BYTES = 16
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass
class Counts:
    """Counts of one file of ids."""

    of_ids: np.ndarray
    """Occurrences of each id, int64 (V,)."""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """Bytes of text, UTF-8."""
    skipped: int = 0
    """Bad documents."""
    hashes: list[bytes] = field(default_factory=list)
    """Hash of each document's text, 16 bytes, in order."""
    sizes: list[int] = field(default_factory=list)
    """Bytes of each document's text."""

    @staticmethod
    def path(path: Path) -> Path:
        """Path of the counts of a file of ids."""
        return path.with_suffix(".npz")

    def add(self, text: bytes, ids: np.ndarray) -> None:
        """Count a document."""
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += len(text)
        self.hashes.append(hashlib.blake2b(text, digest_size=HASH_BYTES).digest())
        self.sizes.append(len(text))
        self.of_ids += np.bincount(ids, minlength=len(self.of_ids))

    def save(self, path: Path) -> None:
        """Write the counts beside a file of ids."""
        numbers = [self.documents, self.tokens, self.text_bytes, self.skipped]
        hashes = np.frombuffer(b"".join(self.hashes), dtype=np.uint8).reshape(-1, HASH_BYTES)
        sizes = np.array(self.sizes, dtype=np.int64)
        totals = np.array(numbers, dtype=np.int64)
        np.savez_compressed(self.path(path), of_ids=self.of_ids, numbers=totals, hashes=hashes, sizes=sizes)

    @classmethod
    def load(cls, path: Path) -> Counts:
        """Read the counts beside a file of ids."""
        with np.load(cls.path(path)) as saved:
            hashes = [each.tobytes() for each in saved["hashes"]]
            documents, tokens, text_bytes, skipped = saved["numbers"].tolist()
            sizes = saved["sizes"].tolist()
            return cls(saved["of_ids"], documents, tokens, text_bytes, skipped, hashes, sizes)

    def remove(self, number: int, ids: np.ndarray) -> None:
        """Take out of the counts the document of this number among those that were added."""
        self.documents -= 1
        self.tokens -= len(ids)
        self.text_bytes -= self.sizes[number]
        self.of_ids -= np.bincount(ids, minlength=len(self.of_ids))


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
    duplicates: int
    """Documents that were left out because an earlier one has the same text."""
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
            f"({self.bytes_per_token:.2f} a token); {self.skipped:,} bad documents and "
            f"{self.duplicates:,} duplicates left out",
            f"{self.used_ids:,} of {self.vocab_size:,} ids occur; {self.entropy_bits:.2f} bits a token by their shares",
            f"tokens of a document: {lengths}, the longest {self.longest:,}",
        ]


def summarize(paths: Sequence[Path], tokenizer: Tokenizer, counts: Sequence[Counts]) -> Statistics:
    """Sum the counts of files of ids; duplicates have been taken out of them.

    Raises:
        ValueError: no document is in them.
    """
    of_ids = sum((each.of_ids for each in counts), np.zeros(tokenizer.vocab_size, dtype=np.int64))
    lengths = np.concatenate([TokenFile(path).lengths for path in paths])
    lengths = lengths[lengths > 0]
    if not len(lengths):
        raise ValueError(f"{paths[0].parent} has no document: every document of its source is empty or bad")
    tokens, size = sum(each.tokens for each in counts), sum(each.text_bytes for each in counts)
    shares = of_ids[of_ids > 0] / max(tokens, 1)
    return Statistics(
        documents=len(lengths),
        tokens=tokens,
        bytes=size,
        skipped=sum(each.skipped for each in counts),
        duplicates=sum(len(each.hashes) - each.documents for each in counts),
        bytes_per_token=size / tokens,
        vocab_size=tokenizer.vocab_size,
        used_ids=len(shares),
        entropy_bits=-sum(float(share) * math.log2(share) for share in shares),
        longest=int(lengths.max()),
        lengths={str(each): int(np.quantile(lengths, each, method="lower")) for each in QUANTILES},
    )
