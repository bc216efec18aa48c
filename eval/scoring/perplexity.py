"""Perplexity of documents: nats a token, perplexity a token and a word, bits a byte; by position and by length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from eval.scoring.documents import Text
from eval.scoring.figures import Totals, as_sequence, exp
from eval.scoring.models import CausalModel
from eval.scoring.sequences import score_sequences
from xlstm_lm.base import console
from xlstm_lm.base.fields import Count, Size, check_fields

GROUP = 16  # batches of documents that are read and sorted by length together


@dataclass(kw_only=True)
class PerplexityConfig:
    """How documents are scored."""

    context_length: Count | None = None
    """Score in independent windows of so many tokens; null carries the state through documents."""
    stride: Count | None = None
    """How far each window is ahead of the one before; null for whole windows."""
    count_end: bool = False
    """Whether the end of a document is a target too, as in training."""
    count_line_ends: bool = False
    """Whether an end of line is a word, as in word-level corpora such as WikiText."""
    batch_size: Size = 8
    """Rows in a batch; changes no figure."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.stride is not None and self.context_length is None:
            raise ValueError(f"stride {self.stride} is the step of windows; give a context length with it.")


def measure(model: CausalModel, texts: Iterator[Text], config: PerplexityConfig) -> dict[str, Any]:
    """Score documents: totals, and the same by position and by document length.

    Raises:
        ValueError: there is no document, the model cannot be scored this way, or the window cannot be.
    """
    by_position: dict[int, Totals] = {}
    by_length: dict[int, Totals] = {}
    documents: dict[int, int] = {}
    total, words = Totals(), 0
    for group in _groups(texts, GROUP * config.batch_size):
        console.progress(f"scoring {model.name}: {sum(documents.values()):,} documents, {total.tokens:,} tokens done")
        sequences = [as_sequence(model, text, config.count_end) for text in group]
        scores = score_sequences(
            model, sequences, batch_size=config.batch_size, window=config.context_length, stride=config.stride
        )
        for text, sequence, score in zip(group, sequences, scores, strict=True):
            bytes_T = model.tokenizer.bytes_per_token.numpy()[sequence[1:]]
            for first, last in _doublings(len(score.nats)):
                by_position.setdefault(first, Totals()).add(score.nats[first:last], bytes_T[first:last].sum())
            shortest = 1 << (max(len(score.nats), 1).bit_length() - 1)
            by_length.setdefault(shortest, Totals()).add(score.nats, bytes_T.sum())
            documents[shortest] = documents.get(shortest, 0) + 1
            total.add(score.nats, len(text.text.encode()) - model.tokenizer.missing_bytes(text.text))
            words += count_words(text.text, config.count_line_ends)
    if not total.tokens:
        raise ValueError("The data has no token to predict; give documents with text in them.")
    return {
        "documents": sum(documents.values()),
        "words": words,
        "nats": total.nats,
        **total.figures(),
        "word_perplexity": exp(total.nats / words) if words else None,
        "by_position": [
            {"from": first, "to": 2 * first or 1, **totals.figures()} for first, totals in sorted(by_position.items())
        ],
        "by_document_length": [
            {"from": shortest, "to": 2 * shortest, "documents": documents[shortest], **totals.figures()}
            for shortest, totals in sorted(by_length.items())
        ],
    }


def count_words(text: str, count_line_ends: bool) -> int:
    """Words between white space and, on request, an end of line each."""
    return len(text.split()) + count_line_ends * text.count("\n")


def choose_windows(model: CausalModel, config: PerplexityConfig) -> tuple[PerplexityConfig, str]:
    """The windows of a model that cannot carry its state, where none were asked for, and the setting in words."""
    values = asdict(config)
    if config.context_length is None and not model.carries_state:
        if model.trained_context is None:
            raise ValueError(f"{model.name} neither carries a state nor says its context; give --context-length.")
        values |= {"context_length": model.trained_context, "stride": max(1, model.trained_context // 2)}
    config = PerplexityConfig(**values)
    if config.context_length is None:
        return config, "state carried through each document"
    return config, f"windows of {config.context_length} tokens, stride {config.stride or config.context_length}"


def _groups(texts: Iterator[Text], size: int) -> Iterator[list[Text]]:
    group: list[Text] = []
    for text in texts:
        group.append(text)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _doublings(length: int) -> Iterator[tuple[int, int]]:
    """[0, 1), [1, 2), [2, 4), [4, 8), ... up to `length`."""
    first = 0
    while first < length:
        yield first, min(2 * first or 1, length)
        first = 2 * first or 1
