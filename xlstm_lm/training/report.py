"""Reports of a run: a record of each logged step for metrics.jsonl, wandb and the line of progress."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.folder import MetricsSplit, RunFolder
from xlstm_lm.runs.metrics import MetricsFile
from xlstm_lm.training.deepspeed_config import Precision
from xlstm_lm.training.engine import StepResult
from xlstm_lm.training.telemetry import Clock, Progress, peak_flops
from xlstm_lm.training.wandb_run import WandbConfig, WandbRun


class Report:
    """Reports of a run. All ranks report; rank 0 writes."""

    def __init__(
        self,
        run_dir: Path,
        *,
        config: dict[str, Any],
        wandb: WandbConfig,
        world: World,
        precision: Precision,
        steps: int,
        flops_per_token: float,
        state: dict[str, Any],
        split: MetricsSplit | None,
    ) -> None:
        """Open the files of the run and continue its counters.

        Args:
            run_dir: Folder of the run.
            config: The whole configuration, as nested mappings, for wandb.
            wandb: Section wandb of the recipe.
            world: All processes of the run.
            precision: Type of weights and activations, for the peak that mfu is a share of.
            steps: Steps of the whole run.
            flops_per_token: Operations of a training step for each token.
            state: Counters to continue from, as in a checkpoint: step, tokens, elapsed_seconds.
            split: On rank 0, the metrics of earlier sessions, split at that step: later ones are set aside. None on
                other ranks.
        """
        self.world, self._folder = world, RunFolder(run_dir)
        self.clock = Clock(state["elapsed_seconds"])
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops(world.device, precision)
        self._tokens = torch.tensor(state["tokens"], dtype=torch.int64, device=world.device)
        self._tokens_at_window = state["tokens"]
        self._resources = contextlib.ExitStack()
        self.progress = Progress(steps, state["step"], enabled=world.is_first)
        self._resources.callback(self.progress.close)
        if split is not None:
            self._metrics = MetricsFile(self._folder)
            self._resources.callback(self._metrics.close)
            self._cut(split)
            self._wandb = WandbRun(wandb, run_dir, config)
            self._resources.callback(self._wandb.close)

    @property
    def tokens(self) -> int:
        """Number of target tokens trained on. Waits for the device."""
        return int(self._tokens)

    def count(self, step_tokens: torch.Tensor) -> None:
        """Count a step with this many target tokens over all ranks."""
        self._tokens += step_tokens
        self.progress.advance()

    def go_back(self, state: dict[str, Any]) -> None:
        """Continue from an earlier step: its counters hold, and later lines of metrics.jsonl are set aside.

        Args:
            state: Counters of the checkpoint of that step: step, tokens.
        """
        self._tokens.fill_(state["tokens"])
        self._tokens_at_window = state["tokens"]
        self.clock.restart_window()
        self.progress.go_back(state["step"])
        if self.world.is_first:
            self._metrics.close()
            self._cut(self._folder.split(state["step"]))

    def _cut(self, split: MetricsSplit) -> None:
        self._metrics.cut(split)
        if split.cut:
            self.progress.say(
                f"{len(split.cut)} lines of metrics.jsonl come after step {split.step}, from which this run goes on: "
                f"they are kept in {self._metrics.superseded}"
            )

    def train_step(
        self,
        step: int,
        result: StepResult,
        counts: torch.Tensor,
        learning_rate: float,
        measured: dict[str, torch.Tensor],
        ranks: Callable[[], dict[str, Any]],
    ) -> None:
        """Report a step. Collective; waits for the device.

        Args:
            step: Number of steps made, including this one.
            result: Outcome of the step.
            counts: Target tokens of the step and their bytes over all ranks; further entries are ignored.
            learning_rate: Rate of the step.
            measured: Further metrics by name, as scalars.
            ranks: Gathers metrics of all ranks, memory_bytes among them, on rank 0. Collective.
        """
        nats = float(self.world.sum_(result.loss_sum.double()))
        of_ranks = ranks()
        if not self.world.is_first:
            return
        step_tokens, step_bytes = counts.tolist()[:2]
        tokens = self.tokens
        tokens_per_second = (tokens - self._tokens_at_window) / self.clock.restart_window()
        self._tokens_at_window = tokens
        record = {
            "split": "train",
            "step": step,
            "tokens": tokens,
            "loss": nats / max(step_tokens, 1),
            "bits_per_byte": bits_per_byte(nats, step_bytes),
            "lr": learning_rate,
            "grad_norm": float(result.gradient_norm),
            "tokens_per_second": tokens_per_second,
        }
        if not result.applied:
            record["skipped"] = True
        if self._peak_flops:
            record["mfu"] = tokens_per_second * self._flops_per_token / (self._peak_flops * self.world.size)
        record |= {
            **of_ranks,
            "elapsed_seconds": self.clock.elapsed,
            **{name: float(value) for name, value in measured.items()},
        }
        self._write(record)
        self.progress.show(record["loss"], record["bits_per_byte"], tokens_per_second)

    def validation(self, step: int, nats: float, tokens: int, size: int) -> None:
        """Report a validation.

        Args:
            step: Number of steps made.
            nats: Sum of the losses of all held-out tokens.
            tokens: Number of those tokens.
            size: Bytes of the text that they stand for; 0 if they stand for no text.
        """
        if not self.world.is_first:
            return
        record = {
            "split": "validation",
            "step": step,
            "tokens": self.tokens,
            "loss": nats / tokens,
            "bits_per_byte": bits_per_byte(nats, size),
            "perplexity": math.exp(min(nats / tokens, 700.0)),
            "elapsed_seconds": self.clock.elapsed,
        }
        self._write(record)
        bits = "" if record["bits_per_byte"] is None else f"{record['bits_per_byte']:.4f} bits/byte, "
        self.progress.say(
            f"validation at step {step}: {bits}loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}"
        )

    def event(self, step: int, kind: str, message: str, **fields: Any) -> None:
        """Report something that happened once, such as a skipped step, as a line of split event. Prints nothing.

        Args:
            step: Number of steps made.
            kind: Name of the kind of event, such as skipped.
            message: Sentences for a reader.
            fields: Further JSON values by name.
        """
        if self.world.is_first:
            self._write({"split": "event", "step": step, "event": kind, "message": message, **fields})

    def sync(self) -> None:
        """Flush all records to the disk."""
        if self.world.is_first:
            self._metrics.sync()

    def close(self) -> None:
        """Close files and the wandb run."""
        self._resources.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._metrics.append(record)
        self._wandb.log(record)


def bits_per_byte(nats: float, size: int) -> float | None:
    """Convert a loss in nats over `size` bytes of text; None for 0 bytes, when the tokens stand for no text."""
    return nats / math.log(2) / size if size else None
