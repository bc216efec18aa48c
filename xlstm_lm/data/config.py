"""The data section of a run: sources, tokenizer, row length and the number of lanes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from xlstm_lm.base.fields import Count, Range, Size, check_fields
from xlstm_lm.data.sources import SourceConfig
from xlstm_lm.data.tokenizer import TokenizerConfig


@dataclass(kw_only=True)
class DataConfig:
    """The data of a run."""

    context_length: Annotated[int, Range(1, 2**30)] = 256
    """Tokens in a row (inputs of the model)."""
    global_batch_size: Size = 32
    """Rows in a step over all ranks; each is a lane with an own stream of documents."""
    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig(kind="python_stdlib")])
    """Training documents; several sources are mixed by tokens as their weights say."""
    validation: list[SourceConfig] = field(default_factory=list)
    """Held-out documents; none: no validation."""
    validation_tokens: Count = 262144
    """At most so many tokens of each validation source, from its beginning."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer of all documents."""
    task: dict[str, Any] | None = None
    """A task of a study, by name and settings, whose made-up rows take the place of documents and tokenizer; such runs
    are trained by python -m eval.tasks."""
    shuffle: bool = True
    """Shuffle files and documents by the run's seed; otherwise they come in the order of the sources."""
    shuffle_documents: Count = 256
    """Documents of a file that a lane reads ahead and shuffles as a block; 1 shuffles only the order of files."""
    num_workers: Annotated[int, Range(0, 1024)] = 1
    """Background processes a rank that read and tokenize ahead; 0 does it in the training process."""
    prefetch_batches: Size = 8
    """Batches that each worker reads ahead at most."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        if self.task is not None and (self.sources or self.validation):
            raise ValueError("data.task takes the place of documents: set data.sources and data.validation to []")
        if self.task is None and not self.sources:
            raise ValueError("data.sources is empty: name at least one source, such as kind: python_stdlib")
        if len({source.weight_by for source in self.sources}) > 1:
            raise ValueError("weight_by differs between data.sources: weigh all by tokens, or all by epochs")

    def check_steps(self, steps: int) -> None:
        """Check that the sources have enough tokens by their limits.

        Raises:
            ValueError: they end before the last step.
        """
        limits = [source.max_tokens for source in self.sources]
        wanted = (steps * self.context_length + 1) * self.global_batch_size
        if limits and None not in limits and (found := sum(filter(None, limits))) < wanted:
            raise ValueError(
                f"all data.sources together have a max_tokens of {found:,}, but {steps:,} steps need {wanted:,}: raise "
                "max_tokens, leave it out for one source, or lower training.steps"
            )
