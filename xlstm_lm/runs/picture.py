"""The learning curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xlstm_lm.base.durable_files import disk_errors_explained

SPLITS: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 1, "alpha": 0.7},
    "validation": {"marker": "o", "linewidth": 1.5},
}
"""The lines of the picture and their styles."""
BEYOND = 1e30
"""A loss from here on, of a run that diverges, leaves no axis that could be drawn."""


def draw_learning_curve(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw bits per byte, or the loss where the tokens are no text, over tokens.

    Args:
        records: those of metrics.jsonl.
        path: the picture to write.
        title: its title.
    """
    records = [record for record in records if record["split"] in SPLITS]
    is_text = any(record.get("bits_per_byte") is not None for record in records)
    measure, label = ("bits_per_byte", "bits per byte") if is_text else ("loss", "loss (nats a token)")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for split, style in SPLITS.items():
        points = [
            (record["tokens"], record[measure])
            for record in records
            if record["split"] == split and record.get(measure) is not None and abs(record[measure]) < BEYOND
        ]
        if points:
            tokens, values = zip(*points, strict=True)
            axes.plot(tokens, values, label=f"{split}: {values[-1]:.3f} at the end", **style)
    axes.set(xlabel="tokens", ylabel=label, title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with disk_errors_explained(path):
        figure.savefig(path, dpi=120)
