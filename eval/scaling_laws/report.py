"""The report of fits: a Markdown page with all results, forecasts and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.scaling_laws.fits import Fits
from eval.scaling_laws.forecast import Forecast
from eval.scaling_laws.pictures import draw_all, pictures_of
from eval.scaling_laws.summary import as_markdown, table
from xlstm_lm.base.durable_files import replace_durably


def write_report(fits: Fits, forecasts: Sequence[Forecast], folder: Path) -> list[Path]:
    """Write report.md and its pictures, and return the files."""
    pictures = draw_all(pictures_of(fits, forecasts), folder)
    parts = ["# Scaling laws", as_markdown(fits).strip()]
    if forecasts:
        parts += ["## Forecasts", _forecasts(forecasts)]
    for picture in pictures:
        name, caption = picture.name, picture.caption
        parts.append(f"![{caption}]({name}.png)\n\n{caption} ([SVG]({name}.svg))")
    page = folder / "report.md"
    replace_durably(page, ("\n\n".join(parts) + "\n").encode())
    return [page, *(folder / f"{picture.name}.png" for picture in pictures)]


def _forecasts(forecasts: Sequence[Forecast]) -> str:
    header = ["run", "registered", "times the largest fitted FLOPs", "predicted", "interval", "measured", "in interval"]
    rows = [
        [
            Path(each.run).name,
            each.registered,
            f"{each.times_largest:.3g}",
            f"{each.predicted:.4f}",
            f"{each.low:.4f} to {each.high:.4f}",
            "not yet" if each.measured is None else f"{each.measured:.4f}",
            {None: "not yet", True: "yes", False: "no"}[each.holds],
        ]
        for each in forecasts
    ]
    return table(header, rows)
