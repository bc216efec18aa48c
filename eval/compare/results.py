"""The results of a comparison: everything that its report shows.

`collect` builds them from run folders and measurements. The report is made from them alone; they are its JSON file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import TypeAdapter

from eval.scaling_laws.fits import Fits
from eval.scaling_laws.forecast import Forecast
from xlstm_lm.base.fields import Range


@dataclass(kw_only=True)
class CurvePoint:
    """One validation during training."""

    step: int
    tokens: int
    flops: float
    """Operations of training so far: tokens times training operations a token."""
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
    """Bits per byte over the targets with at least half a context before them."""


@dataclass(kw_only=True)
class Tested:
    """The trained model on the test documents."""

    how: str
    """Way of reading: state carried, or windows with their stride."""
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
    """Conditions of the test: date, git commit, versions, hardware."""


@dataclass(kw_only=True)
class Run:
    """One training run."""

    name: str
    seed: int
    learning_rate: float
    status: str
    """One of finished, unfinished (partial results are shown), diverged, failed and missing."""
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
    """Conditions of the run's last session (environment.json): git commit, versions, hardware."""


@dataclass(kw_only=True)
class ModelResult:
    """One architecture at one size."""

    architecture: str
    """Key of the architecture in the configuration, such as xlstm or mamba2."""
    label: str
    """Name in the report, such as xLSTM[1:1] (7B blocks)."""
    size: str
    """Key of the size in the configuration, such as 1m."""
    parameters: int
    flops_per_token: float
    """Operations of training at the context length, forward and backward."""
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
    """A number from elsewhere to set beside our own."""

    model: str
    size: str
    tokens: str
    """Amount and source of the training data, such as 15B, SlimPajama."""
    quantity: str
    """Name of the figure, such as validation perplexity."""
    value: Annotated[float, Range(-1e12, 1e12)]
    source: str
    """Paper and table."""


@dataclass(kw_only=True)
class Scaling:
    """A scaling study of the architectures."""

    source: str
    """Path of fit.json."""
    fits: Fits
    """Fits, without the surfaces of trunks drawn again, which no report shows."""
    forecasts: list[Forecast] = field(default_factory=list)


@dataclass(kw_only=True)
class Results:
    """A comparison."""

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # the loss of a broken model is read back as it is

    name: str
    title: str
    question: str
    """The question of the comparison, for the report's first lines."""
    data: str
    """The training and test documents in a sentence, with license or source."""
    context_length: int
    config: str
    """The comparison's configuration, as YAML."""
    recipe: str
    """The configuration that all runs share, resolved, as YAML."""
    environment: dict[str, Any]
    """Conditions of the report (`eval.bench.measure.environment`): date, git commit, versions, hardware."""
    command: str
    """Command that makes the report again."""
    models: list[ModelResult]
    training_speed: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `eval.throughput` (its Row) over context lengths at a constant number of tokens a batch."""
    generation_speed: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `eval.throughput --generate` (GenerationRow)."""
    speed_environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Conditions of the measurements of training and of generation."""
    scaling: Scaling | None = None
    """The scaling study that the configuration names; None for none."""
    published: list[Published] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Results that were asked for and are missing, each with the reason; the report lists them at its top."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the reader: whether all runs read the same tokens, which best learning rates are the ends of their
    grid, which runs diverged; the report lists them."""


_RESULTS = TypeAdapter(Results)


def save_results(results: Results, path: Path) -> None:
    """Write as JSON."""
    path.write_bytes(_RESULTS.dump_json(results, indent=1) + b"\n")


def load_results(path: Path) -> Results:
    """Read a file that `save_results` wrote."""
    return _RESULTS.validate_json(path.read_bytes())
