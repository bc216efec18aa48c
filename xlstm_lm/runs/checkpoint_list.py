"""List, verify and merge the checkpoints of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from xlstm_lm.base.durable_files import disk_errors_explained, replace_durably
from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.run_layout import MANIFEST, is_kept
from xlstm_lm.runs.checkpoint import damage, read_checkpoint
from xlstm_lm.runs.folder import RunFolder


@dataclass(frozen=True)
class Listed:
    """One checkpoint of a run."""

    step: int
    form: int | None
    """Format; None where the manifest cannot be read."""
    ranks: int | None
    """Ranks that wrote it; None where state.json cannot be read, and for an imported model."""
    size: int
    """Bytes of its files."""
    is_kept: bool
    """Whether the run keeps it for ever."""
    damage: str
    """Description of its damage; empty if none was found."""


def list_checkpoints(run_dir: Path, verify: bool) -> list[Listed]:
    """Describe all checkpoints of a run, oldest first.

    Args:
        run_dir: Folder of the run.
        verify: Whether checksums are computed, which reads all files; otherwise sizes are compared.

    Raises:
        ValueError: the folder holds no checkpoints.
    """
    folder = RunFolder(run_dir)
    found = folder.checkpoints()
    if not found:
        raise ValueError(f"{run_dir} has no checkpoint: there is no checkpoints/step_* in it.")
    training = folder.config().get("training", {})
    keep_at, keep_every = training.get("keep_at", []), training.get("keep_every", 0)
    listed = []
    for step, place in sorted(found.items()):
        problem = damage(place, checksums=verify)
        readable = not problem
        listed.append(
            Listed(
                step=step,
                form=read_json(place / MANIFEST, {"format": int}, "")["format"] if readable else None,
                ranks=read_checkpoint(place).state.get("processes") if readable else None,
                size=sum(path.stat().st_size for path in place.rglob("*") if path.is_file()),
                is_kept=is_kept(step, keep_at, keep_every),
                damage=problem,
            )
        )
    return listed


def table(listed: list[Listed], verified: bool) -> str:
    """Lay the checkpoints out as a table for the terminal."""
    sound = "intact" if verified else "complete (--verify compares checksums)"
    lines = [f"{'step':>10} {'format':>6} {'ranks':>6} {'MB':>12}  kept   state"]
    for each in listed:
        form, ranks = ("?" if number is None else str(number) for number in (each.form, each.ranks))
        kept = "ever" if each.is_kept else "newest"
        lines.append(
            f"{each.step:>10} {form:>6} {ranks:>6} {each.size / 1e6:>12,.1f}  {kept:<6} {each.damage or sound}"
        )
    return "\n".join(lines)


def merge(run_dir: Path, step: int, out: Path) -> Path:
    """Write all weights of a checkpoint, in float32, to one safetensors file.

    Args:
        run_dir: Folder of the run.
        step: Step of the checkpoint.
        out: New file.

    Raises:
        ValueError: the run has no intact checkpoint of that step, or the file exists.
        RunError: the file cannot be written.
    """
    found = RunFolder(run_dir).checkpoints()
    if step not in found:
        known = ", ".join(map(str, sorted(found))) or "none"
        raise ValueError(f"{run_dir} has no checkpoint of step {step}; its checkpoints are of steps {known}.")
    if problem := damage(found[step]):
        raise ValueError(f"{problem} Choose another step.")
    if out.exists():
        raise ValueError(f"{out} exists; give --out the name of a new file.")
    weights = {name: weight.contiguous() for name, weight in read_checkpoint(found[step]).all_weights().items()}
    with disk_errors_explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(out, safetensors.torch.save(weights, {"format": "pt"}))
    return out
