"""Length of a run, its folder, and how often it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from xlstm_lm.base.fields import Count, CountOrZero, NonNegative, Positive, Seed, Size, check_fields
from xlstm_lm.base.paths import user_path
from xlstm_lm.base.run_layout import is_kept


@dataclass(kw_only=True)
class TrainingConfig:
    """A run."""

    steps: Count = 1000
    """Optimizer steps of the whole run."""
    run_dir: str = "runs/default"
    """Folder of the run: configuration, metrics, checkpoints. Giving it again continues the run."""
    seed: Seed = 0
    """Seed of the initial weights and of the data order."""
    resume: str = "auto"
    """auto: continue the run in run_dir if there is one; never: refuse a run_dir that holds one; or the path of a
    checkpoint (or of a run, for its newest) of another run, or of an imported model, to start from."""
    log_every: Count = 10
    """Steps between two lines in metrics.jsonl."""
    checkpoint_every: Count = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: Count = 3
    """Number of newest checkpoints that are kept."""
    keep_at: list[Count] = field(default_factory=list)
    """Steps whose checkpoints are written and kept for ever, to branch from."""
    keep_every: CountOrZero = 0
    """Steps between two checkpoints that are written and kept for ever; 0 for none but those of keep_at."""
    max_hours: Positive | None = None
    """Hours of one session, its last save included: the run then stops as preempted; null for no limit."""
    validate_every: CountOrZero = 1000
    """Steps between two validations; 0 validates after the last step only."""
    gate_statistics_every: CountOrZero = 100
    """Steps between two measurements of gates and of norms by layer (an extra forward pass of one micro batch, and a
    sum of the gradients by layer); 0 for none."""
    micro_batch_size: Size | None = None
    """Rows of one forward and backward pass on one device; null for all rows of the device at once."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 with float32 master weights, or fp32; auto means bf16 if the device computes it natively."""
    activation_checkpointing: bool = False
    """Whether each block's activations are recomputed in the backward pass instead of kept."""
    sequence_parallel: Count = 1
    """Processes that divide the tokens of each row, for rows too long for one device; 1 for whole rows."""
    carry_state: bool = False
    """Whether a lane's recurrent state goes on from row to row within a document; gradients stop where a row begins."""
    z_loss: NonNegative = 0.0
    """Weight of the squared log-normalizer of the logits in each token's training loss; 0 for none."""

    def __post_init__(self) -> None:
        check_fields(self, "training.")
        if not self.run_dir.strip(" "):
            raise ValueError("training.run_dir is empty; give the folder that the run writes to.")

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of a step is written and kept for ever."""
        return is_kept(step, self.keep_at, self.keep_every)

    @property
    def folder(self) -> Path:
        """run_dir as an absolute path, independent of the current folder."""
        return user_path(self.run_dir).absolute()


def split_batch(global_batch_size: int, world_size: int, micro_batch_size: int | None) -> tuple[int, int]:
    """Return the rows of a micro batch and the micro batches of a step, for each rank.

    Raises:
        ValueError: the batch does not divide by the ranks, or a rank's rows by the micro batch.
    """
    rows, remainder = divmod(global_batch_size, world_size)
    if remainder or not rows:
        raise ValueError(
            f"data.global_batch_size is {global_batch_size}, which {world_size} processes cannot share evenly: choose "
            f"a multiple of {world_size}, or start as many processes as divide {global_batch_size}."
        )
    micro_batch_size = micro_batch_size or rows
    if rows % micro_batch_size:
        fitting = [size for size in range(1, rows + 1) if rows % size == 0]
        raise ValueError(
            f"training.micro_batch_size is {micro_batch_size}, which does not divide the {rows} rows of a device "
            f"(data.global_batch_size {global_batch_size} over {world_size} processes): choose one of {fitting}."
        )
    return micro_batch_size, rows // micro_batch_size
