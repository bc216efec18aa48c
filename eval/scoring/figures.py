"""The figures of a text under a model, and the elements they are summed over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.scoring.documents import Text
from eval.scoring.models import CausalModel


@dataclass
class Totals:
    """Sums over some targets."""

    tokens: int = 0
    nats: float = 0.0
    bytes: int = 0

    def add(self, nats: np.ndarray, num_bytes: int) -> None:
        self.tokens += len(nats)
        self.nats += float(nats.sum(dtype=np.float64))
        self.bytes += int(num_bytes)

    def figures(self) -> dict[str, Any]:
        """Counts, nats a token, perplexity and bits a byte (null where there is no byte)."""
        loss = self.nats / self.tokens
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": loss,
            "perplexity": exp(loss),
            "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else None,
        }


def as_sequence(model: CausalModel, text: Text, count_end: bool) -> np.ndarray:
    """The elements of a document: its beginning token, its tokens and, on request, its end."""
    tokenizer = model.tokenizer
    end = [tokenizer.end_of_document] * count_end
    return np.concatenate(([model.begin], tokenizer.encode_array(text.text), end)).astype(np.int64)


def exp(nats: float) -> float | None:
    """exp, or None where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else None
