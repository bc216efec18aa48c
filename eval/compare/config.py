"""Configuration of a comparison: a recipe that all runs share, and a section `compare` with models, grid, seeds, tests.

The file is a training recipe, with includes. Its other sections are those of a run; fields of the section `model`
override every model's preset. The comparison sets the learning rate, seed and folder of each run.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from eval.compare.results import Published, Scaling
from eval.scaling_laws.fits import read_fits
from eval.scaling_laws.forecast import read_forecasts
from eval.scoring.documents import DocumentsConfig, document_sources
from eval.scoring.perplexity import PerplexityConfig
from eval.study.study_file import check_section
from xlstm_lm.base.fields import Count, Positive, Seed, Size, check_fields
from xlstm_lm.base.mistakes import nearest, shown
from xlstm_lm.base.paths import user_path
from xlstm_lm.base.recipe import merge, read_recipe, with_current_names
from xlstm_lm.data import open_source
from xlstm_lm.data.tokenizer import build_tokenizer
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.models.presets import PRESETS, with_preset_fields
from xlstm_lm.training.run_config import RunConfig, check_run_config

TOLERANCE = 0.01
"""Largest distance of a model's parameter count from the median of its size, as a share."""


@dataclass(kw_only=True)
class ArchitectureConfig:
    """A kind of model."""

    label: str
    """Name in the report, such as xLSTM[1:1] (7B blocks)."""
    sizes: dict[str, str | dict[str, Any]]
    """The model at each size: a preset, the path of a recipe, or the fields of a model section."""
    learning_rates: dict[str, list[Positive]] = field(default_factory=dict)
    """Grid at a size, where it differs from the common one."""


@dataclass(kw_only=True)
class SizeConfig:
    """Settings that the models of a size share."""

    learning_rates: list[Positive] = field(default_factory=list)
    """Grid at this size, where it differs from the common one."""
    recipe: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sections of a run that override the common recipe."""


@dataclass(kw_only=True)
class TestConfig:
    """How the trained models are tested."""

    documents: DocumentsConfig
    """The test documents."""
    scoring: PerplexityConfig = field(default_factory=PerplexityConfig)
    """How they are scored."""
    extrapolate: Size = 16
    """Longest context over that of training, a power of two; 1 for none."""
    max_tokens: Count | None = None
    """Tokens at each context length of the extrapolation, at most."""

    __test__: ClassVar = False  # its name means something to pytest

    def __post_init__(self) -> None:
        check_fields(self)
        if self.extrapolate & (self.extrapolate - 1):
            raise ValueError(f"extrapolate is {self.extrapolate}; it must be a power of two: 16 gives 1, 2, 4, 8, 16.")


@dataclass(kw_only=True)
class SpeedConfig:
    """How speed is measured (`eval.throughput`)."""

    lengths: list[Count] = field(default_factory=lambda: [256, 1024, 4096])
    """Tokens of a training row, one measurement each."""
    tokens: Count = 4096
    """Tokens of a batch, the same at every length."""
    modes: list[Literal["eager", "compiled"]] = field(default_factory=lambda: ["eager"])
    """Ways of running; the report's pictures show the fastest."""
    prompts: list[Count] = field(default_factory=lambda: [256, 1024, 4096])
    """Tokens of a prompt; empty: generation is not measured."""
    batch_sizes: list[Size] = field(default_factory=lambda: [1, 8])
    """Prompts generated from at once."""
    new_tokens: Count = 32
    """Tokens generated after a prompt."""
    rounds: Count = 7
    """Timed rounds at most."""
    seconds: Positive = 60.0
    """Time limit for the rounds of a table."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.modes:
            raise ValueError("modes is empty; name eager, compiled or both.")
        if not self.lengths:
            raise ValueError("lengths is empty; give at least one, or leave the section speed out.")
        if max(self.lengths) > self.tokens:
            raise ValueError(f"lengths has {max(self.lengths)}, more than a batch of tokens {self.tokens} can hold.")


@dataclass(kw_only=True)
class ScalingConfig:
    """A scaling study whose table and pictures the report shows."""

    fit: str
    """File that `python -m eval.scaling_laws fit --out` wrote."""
    forecasts: str | None = None
    """File of `python -m eval.scaling_laws forecast`; null for none."""


@dataclass(kw_only=True)
class CompareConfig:
    """The section `compare`."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    """Name of the comparison and of its folder."""
    title: str
    """Title of the report."""
    question: str
    """The question of the comparison, for the report's first lines."""
    data: str
    """The training and test documents in a sentence, with license or source."""
    models: dict[str, ArchitectureConfig]
    """The architectures by a short key."""
    learning_rates: list[Positive]
    """The grid that every model is tried on, with the first seed."""
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the runs at the best learning rate."""
    sizes: dict[str, SizeConfig] = field(default_factory=dict)
    """Settings of a size that differ from the common ones."""
    matched: bool = True
    """Whether the models of a size must agree in parameters within one percent."""
    data_root: str | None = None
    """Folder that the paths of local data are in, training, validation and test; null for the current one."""
    test: TestConfig | None = None
    """The test of the trained models; null for none."""
    speed: SpeedConfig | None = None
    """The measurement of speed; null for none."""
    scaling: ScalingConfig | None = None
    """Scaling study of these architectures, shown in the report; null for none."""
    published: list[Published] = field(default_factory=list)
    """Numbers from elsewhere, shown beside ours."""
    at_once: Size = 1
    """Runs at a time."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("models", "learning_rates", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; each may be there once.")
        used = {size for architecture in self.models.values() for size in architecture.sizes}
        for where, sizes in [
            ("sizes", self.sizes),
            *((f"models.{key}", m.learning_rates) for key, m in self.models.items()),
        ]:
            for size in sizes.keys() - used:
                raise ValueError(f"{where} names the size {size}, which no model has; there are {', '.join(used)}.")
        grids = [self.learning_rates, *(size.learning_rates for size in self.sizes.values())]
        for grid in grids + [grid for model in self.models.values() for grid in model.learning_rates.values()]:
            if len(set(grid)) < len(grid):
                raise ValueError(f"learning_rates is {grid}; each may be there once.")
        for key, model in self.models.items():
            if not model.sizes:
                raise ValueError(f"models.{key}.sizes is empty; give at least one.")
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", self.name):
            raise ValueError(f"name is {self.name!r}; give a name for a folder: letters, digits, dots, dashes.")


@dataclass(frozen=True)
class Model:
    """An architecture at a size."""

    architecture: str
    size: str
    label: str
    section: dict[str, Any]
    """The model section of its runs."""
    origins: dict[str, str]
    """File that sets each field of `section`."""
    learning_rates: list[Positive]
    """Grid of this model, ascending."""

    @property
    def name(self) -> str:
        """Architecture and size, such as mamba2-1m."""
        return f"{self.architecture}-{self.size}"


@dataclass(frozen=True)
class Comparison:
    """A comparison's configuration, checked."""

    path: Path
    config: CompareConfig
    recipe: dict[str, Any]
    """Sections of a run that all runs share."""
    origins: dict[str, str]
    models: list[Model]
    """Smallest size first, as the sizes come in the file."""
    scaling: Scaling | None = None
    """The scaling study that the report shows; None for none."""

    def first_run(self, model: Model) -> RunConfig:
        """The run with the lowest learning rate and the first seed, to check settings that all runs share."""
        return self.run_config(model, model.learning_rates[0], self.config.seeds[0], Path("run"))

    def run_config(self, model: Model, learning_rate: float, seed: int, run_dir: Path) -> RunConfig:
        """One run.

        Raises:
            ValueError: a key or a value of the recipe or the model is not allowed.
        """
        size = self.config.sizes.get(model.size, SizeConfig())
        values = merge(merge(self.recipe, with_current_names(size.recipe)), {"model": model.section})
        own = {"training": {"seed": seed, "run_dir": str(run_dir)}, "optimizer": {"learning_rate": learning_rate}}
        run = check_run_config(merge(values, own), self.origins | model.origins)
        for source in run.data.sources + run.data.validation:
            source.paths = [self.locate(path) for path in source.paths]
        return run

    def locate(self, path: str) -> str:
        """A path of local data, below `data_root`."""
        return str(Path(self.config.data_root or "") / path)

    def test_documents(self) -> DocumentsConfig:
        """The test documents, with their paths below `data_root`."""
        assert self.config.test
        documents = self.config.test.documents
        if _is_recipe(documents):
            return documents
        return dataclasses.replace(documents, data=[self.locate(path) for path in documents.data])


def load_comparison(path: Path, data_root: str | None = None) -> Comparison:
    """Read and check a comparison: every recipe resolves, and the models of a size agree in parameters.

    Raises:
        ValueError: anything is not allowed; the message names the file and the key.
    """
    recipe, origins = read_recipe(path)
    section = recipe.pop("compare", None)
    if not isinstance(section, dict):
        raise ValueError(f"{path} has no section 'compare' with models, learning_rates and so on.")
    for name, value in recipe.items():
        if not isinstance(value, dict):
            raise ValueError(f"{origins[name]}: {name} = {shown(value)}: must be a section with fields.")
    if data_root is not None:
        section = section | {"data_root": data_root}
    config = check_section(CompareConfig, section, name="compare", origins=origins, path=path)
    comparison = Comparison(path, config, recipe, origins, [], _read_scaling(path, config.scaling))
    comparison.models.extend(_models(comparison))
    _check_runs(comparison)
    if config.matched:
        _check_sizes(comparison)
    return comparison


def _read_scaling(comparison: Path, config: ScalingConfig | None) -> Scaling | None:
    """Read the scaling study that a comparison's file names; None where it names none.

    Raises:
        ValueError: a file is missing or damaged; names it and its key.
    """
    if config is None:
        return None
    try:
        fits = read_fits(user_path(config.fit))
        path = user_path(config.forecasts) if config.forecasts is not None else None
        if path and not path.is_file():
            raise ValueError(f"{path} is missing. Write it with python -m eval.scaling_laws forecast ... --out FILE.")
        forecasts = read_forecasts(path) if path else []
    except ValueError as error:
        raise ValueError(
            f"{comparison}: compare.scaling: {error} To compare without a scaling study, remove compare.scaling."
        ) from None
    architectures = [dataclasses.replace(each, samples=[]) for each in fits.architectures]
    return Scaling(source=config.fit, fits=dataclasses.replace(fits, architectures=architectures), forecasts=forecasts)


def check_data(comparison: Comparison) -> None:
    """Check that all local files exist, before any run begins; nothing is looked up on the hub.

    Raises:
        ValueError: a file is missing or empty; or the tokenizer of bytes does not fit a model.
    """
    config = comparison.config
    try:
        sources = document_sources(comparison.test_documents()) if config.test else []
        for run in map(comparison.first_run, comparison.models):
            sources += run.data.sources + run.data.validation
        for source in sources:
            if source.kind != "hub":
                open_source(source)
    except ValueError as error:
        if config.data_root is None:
            raise
        raise ValueError(
            f"{error}. The data of this comparison are looked for in {config.data_root}; if they lie elsewhere, give "
            f"--data-root FOLDER. They are: {config.data}"
        ) from None


def _is_recipe(documents: DocumentsConfig) -> bool:
    return Path(documents.data[0]).suffix in (".yaml", ".yml")


def _models(comparison: Comparison) -> list[Model]:
    config, found = comparison.config, []
    sizes = dict.fromkeys([*config.sizes, *(size for each in config.models.values() for size in each.sizes)])
    for size in sizes:
        for key, architecture in config.models.items():
            if size not in architecture.sizes:
                continue
            where = f"compare.models.{key}.sizes.{size}"
            section, origins = _model_section(architecture.sizes[size], where, comparison)
            common = config.sizes.get(size, SizeConfig())
            shared = merge(comparison.recipe, common.recipe).get("model", {})
            grid = architecture.learning_rates.get(size) or common.learning_rates or config.learning_rates
            origins = {name: file for name, file in origins.items() if name.removeprefix("model.") not in shared}
            found.append(Model(key, size, architecture.label, merge(section, shared), origins, sorted(grid)))
    return found


def _model_section(
    model: str | dict[str, Any], where: str, comparison: Comparison
) -> tuple[dict[str, Any], dict[str, str]]:
    origin = next((file for key, file in comparison.origins.items() if key.startswith(where)), str(comparison.path))
    section = {"preset": model} if isinstance(model, str) and model in PRESETS else model
    if isinstance(section, dict):
        try:
            section = with_preset_fields(section)
        except ValueError as error:
            raise ValueError(f"{origin}: {where}: {error}") from None
        return section, {f"model.{field_name}": f"{origin}: {where}" for field_name in section}
    path = Path(model)
    if not model.endswith((".yaml", ".yml")) or not path.is_file():
        hint = nearest(model, PRESETS, otherwise="Presets are {known}.")
        raise ValueError(f"{origin}: {where} = {model!r}: there is no such preset or recipe. {hint}")
    values, origins = read_recipe(path)
    if not isinstance(values.get("model"), dict):
        raise ValueError(f"{origin}: {where} = {model!r}: {path} has no section 'model'.")
    return values["model"], {key: file for key, file in origins.items() if key.startswith("model.")}


def _check_runs(comparison: Comparison) -> None:
    """Every model makes a run that can be trained; the grid and the seeds change nothing about that."""
    for model in comparison.models:
        run = comparison.first_run(model)
        run.schedule.check_steps(run.training.steps)
        if not run.data.validation:
            raise ValueError(
                f"{comparison.path}: data.validation is empty, but the best learning rate is the one that is best on "
                "validation documents; name some."
            )
        if run.data.tokenizer.kind == "bytes":
            tokens = build_tokenizer(run.data.tokenizer).vocab_size
            if tokens > run.model.vocab_size:
                raise ValueError(f"{model.name} has vocab_size {run.model.vocab_size}, the tokenizer {tokens} tokens.")


def _check_sizes(comparison: Comparison) -> None:
    by_size: dict[str, dict[str, int]] = {}
    for model in comparison.models:
        count = count_parameters(comparison.first_run(model).model)
        by_size.setdefault(model.size, {})[model.architecture] = count
    for size, counts in by_size.items():
        middle = statistics.median(counts.values())
        far = [key for key, count in counts.items() if math.fabs(count / middle - 1) > TOLERANCE]
        if far:
            listed = ", ".join(f"{key} {count:,}" for key, count in counts.items())
            raise ValueError(
                f"{comparison.path}: of size {size}, {', '.join(far)} differ by more than {TOLERANCE:.0%} in "
                f"parameters ({listed}): match them, or set compare.matched to false, which the report then shows."
            )
