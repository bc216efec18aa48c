"""A run's record at Weights & Biases."""

from __future__ import annotations

import logging
import math
import socket
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from xlstm_lm.runs.folder import RunFolder

logger = logging.getLogger("xlstm_lm")

REACH_SECONDS = 5
INIT_SECONDS = 60


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases; metrics.jsonl is written in any case."""

    mode: Literal["online", "offline", "disabled"] = "disabled"
    """online sends, offline writes to run_dir/wandb for a later `wandb sync`, disabled does neither."""
    project: str = "xlstm-lm"
    """Project."""
    entity: str | None = None
    """User or team; null for the account's own."""
    name: str | None = None
    """Name of the run; null for the name of run_dir."""
    group: str | None = None
    """Group of runs that belong together."""
    tags: list[str] = field(default_factory=list)
    """Tags."""
    id: str | None = None
    """Id of the run; null for a random one, which is kept in run_dir/wandb.json."""


class WandbRun:
    """Logger of the records of metrics.jsonl. A continued training run continues the same wandb run."""

    def __init__(self, config: WandbConfig, run_dir: Path, run_config: dict[str, Any]) -> None:
        """Start or continue the wandb run, offline with a warning if the server cannot be reached.

        Args:
            config: Section wandb of the recipe.
            run_dir: Folder of the training run.
            run_config: The whole configuration, as nested mappings.
        """
        self._run: Any = None
        self._best: float | None = None
        if config.mode == "disabled":
            return
        import wandb  # takes a second

        settings = wandb.Settings(init_timeout=INIT_SECONDS, console="off", silent=True)
        mode = config.mode
        if mode == "online":
            address = wandb.setup().settings.base_url
            if not _reachable(address):
                mode = "offline"
                logger.warning(
                    "wandb: %s cannot be reached; logging offline. Send it later with: wandb sync %s",
                    address,
                    run_dir / "wandb" / "offline-run-*",
                )
        arguments = {
            "entity": config.entity,
            "project": config.project,
            "name": config.name or run_dir.resolve().name,
            "group": config.group,
            "tags": config.tags or None,
            "id": config.id or _kept_id(run_dir),
            "dir": str(run_dir),
            "config": run_config,
            "resume": "allow",
            "settings": settings,
        }
        try:
            self._run = wandb.init(mode=mode, **arguments)
        except wandb.errors.Error as error:  # no account, wrong key, time-out
            if mode == "offline":
                raise
            logger.warning("wandb: %s Logging offline instead.", error)
            self._run = wandb.init(mode="offline", **arguments)
        # wandb's own step counter starts at 0 offline and after a kill.
        self._run.define_metric("step")
        for split in ("train", "validation", "event"):
            self._run.define_metric(f"{split}/*", step_metric="step")

    @property
    def active(self) -> bool:
        """Whether records are logged."""
        return self._run is not None

    def log(self, record: dict[str, Any]) -> None:
        """Log one record: {"split": "train", "step": 10, "loss": 2.5} becomes train/loss at step 10."""
        if not self._run:
            return
        split = record["split"]
        values = {f"{split}/{key}": value for key, value in record.items() if key not in ("split", "step")}
        self._run.log({"step": record["step"], **values})
        if split == "validation":
            loss = record["loss"]
            if math.isfinite(loss):
                self._best = loss if self._best is None else min(self._best, loss)
            self._run.summary.update({"validation/final_loss": loss, "validation/best_loss": self._best})

    def close(self) -> None:
        """Finish the wandb run, if there is one."""
        if self._run:
            self._run.finish()


def _kept_id(run_dir: Path) -> str:
    """Id of the run in this folder, drawn at first use, because wandb does not keep one offline."""
    folder = RunFolder(run_dir)
    kept = folder.wandb_id()
    if kept is None:
        kept = uuid.uuid4().hex[:12]
        folder.write_wandb_id(kept)
    return kept


def _reachable(url: str) -> bool:
    """Whether something listens at the address of `url`."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=REACH_SECONDS).close()
    except OSError:
        return False
    return True
