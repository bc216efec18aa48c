"""The Mamba baselines: Mamba-1 (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from xlstm_lm.base.fields import Epsilon, NonNegative, Range, Share, Size, VocabSize, check_fields
from xlstm_lm.models.block import BlockStack
from xlstm_lm.models.layers import NumBlocks, SoftCap
from xlstm_lm.models.mixers.mamba1 import Mamba1Config, SelectiveScanBackend
from xlstm_lm.models.mixers.mamba2 import Mamba2Config, SSDBackend

ScanBackend = Literal[SelectiveScanBackend, SSDBackend]


@dataclass(kw_only=True)
class MambaConfig(BlockStack):
    """A Mamba language model."""

    family: Literal["mamba"] = "mamba"
    """Model family."""
    version: Literal[1, 2] = 2
    """Mamba-1 (selective scan) or Mamba-2 (SSD)."""
    vocab_size: VocabSize = 50304
    """Rows of the embedding and of the head; at least the tokenizer's vocabulary."""
    embedding_dim: Size = 768
    """Model width."""
    num_blocks: NumBlocks = 24
    """Number of residual blocks."""
    expand: Annotated[int, Range(1, 1024)] = 2
    """Inner width over the model width."""
    state_dim: Annotated[int, Range(1, 2**16)] | None = None
    """State units for each inner unit; null for 16 (Mamba-1) or 128 (Mamba-2)."""
    head_dim: Size = 64
    """Inner units that share a decay, in Mamba-2."""
    num_groups: Size = 1
    """Groups of heads that share B and C, in Mamba-2."""
    step_rank: Size | None = None
    """Rank of the step sizes' projection, in Mamba-1; null for a sixteenth of the model width."""
    conv_width: Size = 4
    """Width of the causal convolution."""
    initializer_range: NonNegative = 0.02
    """Standard deviation of embedding and head at the start."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of all norms."""
    logit_soft_cap: SoftCap | None = None
    """Soft cap of the logits; null for none."""
    dropout: Share = 0.0
    """Share of units dropped in training, of the embedding and of what each mixer and feed-forward adds."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""
    scan_backend: ScanBackend = "auto"
    """Kernel of the selective scan (Mamba-1) or of SSD (Mamba-2)."""

    def __post_init__(self) -> None:
        check_fields(self)
        backends = get_args(SelectiveScanBackend if self.version == 1 else SSDBackend)
        if self.scan_backend not in backends:
            raise ValueError(
                f"scan_backend is {self.scan_backend!r}; for version {self.version} it must be one of "
                f"{', '.join(backends)}."
            )
        self.block_mixers()

    @property
    def mixer(self) -> Mamba1Config | Mamba2Config:
        """Mixer of every block."""
        mixer = Mamba1Config if self.version == 1 else Mamba2Config
        settings = self.mixer_settings(mixer)
        if self.state_dim is None:
            del settings["state_dim"]
        return mixer(**settings)

    def block_mixers(self) -> Sequence[Mamba1Config | Mamba2Config]:
        return [self.mixer] * self.num_blocks

    @property
    def embedding_std(self) -> float:
        """Standard deviation of embedding and head at the start, as published."""
        return self.initializer_range
