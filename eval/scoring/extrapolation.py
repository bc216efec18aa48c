"""Loss against the length of the context, beyond that of training too, on the same tokens; and its picture."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.scoring.documents import Text
from eval.scoring.figures import Totals, as_sequence
from eval.scoring.models import CausalModel
from eval.scoring.sequences import check_window, score_sequences
from eval.study.picture import draw_panels


def extrapolate(
    model: CausalModel, texts: Iterable[Text], lengths: Sequence[int], *, batch_size: int, max_tokens: int | None = None
) -> list[dict[str, Any]]:
    """Score the same tokens with contexts of each of `lengths` tokens, in independent windows.

    Documents are cut to a multiple of the longest length and shorter ones left out: all lengths have the same targets.
    `second_half` counts only those with at least half a context before them, which are half of them.

    Args:
        model: any.
        texts: documents.
        lengths: context lengths; each must divide the longest.
        batch_size: rows of the longest length in a batch; shorter lengths take more.
        max_tokens: targets to score at each length, at most (at least one window).

    Raises:
        ValueError: a length that cannot be, or no document is as long as the longest.
    """
    longest = max(lengths)
    for length in lengths:
        check_window(model, length, length)
        if longest % length:
            raise ValueError(f"Context length {length} does not divide the longest, {longest}; give one that does.")
    sequences, left = [], max(max_tokens or sys.maxsize, longest)
    for text in texts:
        sequence = as_sequence(model, text, False)
        kept = min(len(sequence) - 1, left) // longest * longest
        left -= kept
        if kept:
            sequences.append(sequence[: kept + 1])
        if left < longest:
            break
    if not sequences:
        raise ValueError(
            f"No document has {longest} tokens; give longer ones, or lower the context lengths {list(lengths)}."
        )
    bytes_of = model.tokenizer.bytes_per_token.numpy()
    curve = []
    for length in lengths:
        rows = batch_size * longest // length
        scores = score_sequences(model, sequences, batch_size=rows, window=length)
        total, second_half = Totals(), Totals()
        for sequence, score in zip(sequences, scores, strict=True):
            nats_NT, bytes_NT = score.nats.reshape(-1, length), bytes_of[sequence[1:]].reshape(-1, length)
            total.add(nats_NT.ravel(), bytes_NT.sum())
            second_half.add(nats_NT[:, length // 2 :].ravel(), bytes_NT[:, length // 2 :].sum())
        times = length / model.trained_context if model.trained_context else None
        point = {"context_length": length, "times_trained": times, **total.figures()}
        curve.append(point | {"second_half": second_half.figures()})
    return curve


def draw_extrapolation(results: list[dict[str, Any]], path: Path) -> bool:
    """Bits a byte against the context length, a line for each model, with its training context marked.

    Without matplotlib, print a note and return False.
    """

    def fill(axes: Any, _: str) -> None:
        for index, result in enumerate(results):
            lengths = [point["context_length"] for point in result["extrapolation"]]
            for style, part in (("-", lambda point: point), ("--", lambda point: point["second_half"])):
                bits = [part(point)["bits_per_byte"] for point in result["extrapolation"]]
                label = result["model"] if style == "-" else f"{result['model']}, second half of the context"
                axes.plot(lengths, bits, style, marker="o", color=f"C{index}", label=label)
            if result["trained_context"]:
                axes.axvline(result["trained_context"], color=f"C{index}", linestyle=":", alpha=0.7)
        ticks = sorted({point["context_length"] for result in results for point in result["extrapolation"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set(xlabel="context length in tokens (dotted: training)", ylabel="bits per byte")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")

    return draw_panels(path, [""], fill, inches=(7, 4.2), dpi=120)
