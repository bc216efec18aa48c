"""What a comparison has found: everything its report shows, and nothing that must be looked up elsewhere.

`collect` makes it from run folders and measurements; the report is made from it alone, and it is the report's JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import TypeAdapter

from xlstm_lm.base.fields import Range


@dataclass(kw_only=True)
class CurvePoint:
    """A validation on the way."""

    step: int
    tokens: int
    flops: float
    """Of training so far: tokens times training operations a token."""
    seconds: float
    """Wall time of the run so far, over all its sessions."""
    loss: float
    """Nats a token."""
    bits_per_byte: float | None
    perplexity: float | None


@dataclass(kw_only=True)
class Bucket:
    """The loss over targets at positions [first, last) of a document, or at one context length."""

    first: int
    last: int
    tokens: int
    loss: float
    bits_per_byte: float | None


@dataclass(kw_only=True)
class Extrapolated:
    """The loss at one context length, on the same targets at each."""

    context_length: int
    times_trained: float
    tokens: int
    loss: float
    bits_per_byte: float | None
    second_half_bits_per_byte: float | None
    """Of the targets with at least half a context before them."""


@dataclass(kw_only=True)
class Tested:
    """The trained model on the test documents."""

    how: str
    """State carried, or windows of which stride."""
    tokens: int
    bytes: int
    words: int
    loss: float
    perplexity: float | None
    word_perplexity: float | None
    bits_per_byte: float | None
    by_position: list[Bucket]
    extrapolation: list[Extrapolated] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    """Of the test: date, git commit, versions, hardware."""


@dataclass(kw_only=True)
class Run:
    """One training run."""

    name: str
    seed: int
    learning_rate: float
    status: str
    """finished, unfinished (what there is so far is shown), diverged, failed or missing."""
    problem: str = ""
    """Why it is not finished, in a sentence."""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None
    """Median over the logged steps."""
    curve: list[CurvePoint] = field(default_factory=list)
    tested: Tested | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    """Of the run's last session: git commit, versions, hardware (environment.json)."""


@dataclass(kw_only=True)
class ModelResult:
    """One architecture at one size."""

    architecture: str
    """Its key in the configuration, such as xlstm or mamba2."""
    label: str
    """For people, such as xLSTM[1:1] (7B blocks)."""
    size: str
    """Its key in the configuration, such as 1m."""
    parameters: int
    flops_per_token: float
    """Of training at the context length, forward and backward."""
    state_bytes: list[tuple[int, int]]
    """(context length, bytes of state or cache a sequence); bf16."""
    recipe: str
    """The model section, resolved, as YAML."""
    tried: list[Run]
    """One run for each learning rate of the grid, of the first seed; without `tested`."""
    learning_rate: float | None
    """The best of them, by bits per byte on the validation documents; None until all are there."""
    runs: list[Run]
    """One run for each seed at that learning rate (the first is also in `tried`)."""
    speed_name: str = ""
    """The `name` of its rows in `training_speed` and `generation_speed`; empty where it is not measured there."""


@dataclass(kw_only=True)
class Published:
    """A number from elsewhere, for beside ours."""

    model: str
    size: str
    tokens: str
    """Such as 15B, SlimPajama."""
    quantity: str
    """Such as validation perplexity."""
    value: Annotated[float, Range(-1e12, 1e12)]
    source: str
    """Paper and table."""


@dataclass(kw_only=True)
class Results:
    """A comparison."""

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # the loss of a broken model is read back as it is

    name: str
    title: str
    question: str
    """What is being asked, for the first lines of the report."""
    data: str
    """The training and test documents in a sentence, with licence or source."""
    context_length: int
    config: str
    """The comparison's configuration, as YAML."""
    recipe: str
    """What all runs share, resolved, as YAML."""
    environment: dict[str, Any]
    """Of the report (`eval.bench.measure.environment`): date, git commit, versions, hardware."""
    command: str
    """That makes the report again."""
    models: list[ModelResult]
    training_speed: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `eval.throughput` (its Row) over context lengths at a constant number of tokens a batch."""
    generation_speed: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `eval.throughput --generate` (GenerationRow)."""
    speed_environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the measurements of training and of generation."""
    published: list[Published] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What was asked for and is not there, each with the reason; the report lists it at its top."""
    notes: list[str] = field(default_factory=list)
    """What else a reader must know: whether all runs read the same tokens, which best learning rates are the ends of
    their grid, which runs diverged; the report lists it."""


_RESULTS = TypeAdapter(Results)


def save_results(results: Results, path: Path) -> None:
    """Write as JSON."""
    path.write_bytes(_RESULTS.dump_json(results, indent=1) + b"\n")


def load_results(path: Path) -> Results:
    """Read what `save_results` wrote."""
    return _RESULTS.validate_json(path.read_bytes())
