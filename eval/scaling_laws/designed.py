"""The runs of a design: how each is trained, and the files of a design's folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eval.scaling_laws.forecast import write_forecasts
from eval.scaling_laws.records import as_csv, read_csv
from xlstm_lm.base.durable_files import replace_durably
from xlstm_lm.training.run_config import RunConfig, as_recipe, load_run_config

Kind = Literal["trunk", "branch", "straight", "check", "seed", "sweep"]
"""Kind of a designed run.

* trunk: a constant learning rate, no loss point of its own
* branch: a cooldown from a kept checkpoint of a trunk
* straight: a run without a trunk
* check: one straight through where a branch is, to compare the two
* seed, sweep: a straight run of another seed or another learning rate
"""


@dataclass(frozen=True, kw_only=True)
class DesignedRun:
    """A row of design.csv."""

    run: str
    """Name of the run and of its folder."""
    kind: Kind
    trunk: str
    """Run whose checkpoint a branch starts from; the run itself for other kinds."""
    architecture: str
    params: int
    """All parameters."""
    params_non_embedding: int
    """Parameters without embedding and head."""
    tokens: int
    """Tokens from the beginning of the trunk to the end of the run."""
    steps: int
    """Steps from the beginning of the trunk to the end of the run."""
    branch_step: int
    """Step of the checkpoint that a branch starts from; 0 for other kinds."""
    warmup_steps: int
    cooldown_steps: int
    cooldown_shape: str = "linear"
    """`schedule.cooldown_shape`; designs from before that field had linear cooldowns."""
    context: int
    """Tokens of a row."""
    batch_tokens: int
    """Tokens of a step."""
    learning_rate: float
    """Peak of the schedule."""
    seed: int
    flops_per_token: float
    """Training FLOPs of one token."""
    flops: float
    """FLOPs of all tokens."""

    @property
    def own_flops(self) -> float:
        """FLOPs that the run itself computes: those of a branch begin at its checkpoint."""
        return self.flops_per_token * self.batch_tokens * (self.steps - self.branch_step)


@dataclass(frozen=True)
class Design:
    """A folder of designed runs."""

    folder: Path
    runs: list[DesignedRun]

    def run_folder(self, name: str) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / name

    def recipe(self, name: str) -> Path:
        """File with the recipe of a run."""
        return self.folder / "configs" / f"{name}.yaml"

    def config(self, run: DesignedRun) -> RunConfig:
        """Read the configuration of a run."""
        return load_run_config([self.recipe(run.run)])

    def named(self, name: str) -> DesignedRun:
        """The run of a name."""
        return next(run for run in self.runs if run.run == name)


DESIGN, FORECASTS = "design.csv", "forecast.csv"
"""Files of a design's folder: a row a run, and a row a forecast."""


def write_design(design: Design, configs: dict[str, RunConfig]) -> list[Path]:
    """Write design.csv, configs/, launch.txt, launch-branches.txt and an empty forecast.csv.

    Args:
        design: the runs.
        configs: configuration of each run by its name.

    Returns:
        the lists: design.csv and the files for launch scripts.

    Raises:
        ValueError: the folder holds a design already.
    """
    path = design.folder / DESIGN
    if path.exists():
        raise ValueError(f"{path} exists: choose another --out, or move that design away.")
    for name, config in configs.items():
        design.recipe(name).parent.mkdir(parents=True, exist_ok=True)
        replace_durably(design.recipe(name), as_recipe(config).encode())
    first, then = (
        "".join(_launch_line(design, run) for run in design.runs if (run.kind == "branch") == is_branch)
        for is_branch in (False, True)
    )
    files = {path: as_csv(DesignedRun, design.runs), design.folder / "launch.txt": first}
    files |= {design.folder / "launch-branches.txt": then} if then else {}
    write_forecasts([], design.folder / FORECASTS)
    for file, text in sorted(files.items(), key=lambda item: item[0] == path):  # design.csv last: the rest is complete
        replace_durably(file, text.encode())
    return list(files)


def _launch_line(design: Design, run: DesignedRun) -> str:
    return f"{shlex.quote(str(design.run_folder(run.run)))} --config {shlex.quote(str(design.recipe(run.run)))}\n"


def read_design(folder: Path) -> Design:
    """Read the design of a folder.

    Raises:
        ValueError: it holds none, or design.csv is damaged.
    """
    path = folder / DESIGN
    if not path.is_file():
        raise ValueError(f"{folder} holds no design ({DESIGN}): make one with python -m eval.scaling_laws design.")
    try:
        rows = read_csv(DesignedRun, path)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Design again, into another folder.") from None
    return Design(folder, rows)
