"""The learning curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_learning_curve(run_dir: Path) -> Path:
    """Draw bits per byte, where the tokens are no text the loss, over the tokens of run_dir/metrics.jsonl into
    run_dir/learning_curve.png."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    is_text = any(record["bits_per_byte"] is not None for record in records)
    measure, label = ("bits_per_byte", "bits per byte") if is_text else ("loss", "loss (nats a token)")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for split, style in (("train", {"linewidth": 1, "alpha": 0.7}), ("validation", {"marker": "o", "linewidth": 1.5})):
        points = [
            (record["tokens"], record[measure])
            for record in records
            if record["split"] == split and record[measure] is not None
        ]
        if points:
            tokens, values = zip(*points, strict=True)
            axes.plot(tokens, values, label=f"{split}: {values[-1]:.3f} at the end", **style)
    axes.set(xlabel="tokens", ylabel=label, title=run_dir.resolve().name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    path = run_dir / "learning_curve.png"
    figure.savefig(path, dpi=120)
    return path
