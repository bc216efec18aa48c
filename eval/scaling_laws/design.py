"""Design the runs of a ladder, an IsoFLOP grid or a sweep of learning rates.

A ladder is one trunk for each size, with a constant learning rate, and from kept checkpoints of it a cooldown to
each number of tokens: one run gives the whole D axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eval.scaling_laws.designed import Design, DesignedRun, Kind
from eval.scaling_laws.rates import RateLaw
from eval.scaling_laws.sizes import Architecture, SizedModel, find_architecture
from xlstm_lm.base.fields import in_steps
from xlstm_lm.base.recipe import read_recipes
from xlstm_lm.base.run_layout import checkpoint_folder
from xlstm_lm.models.accounting import training_flops_per_token
from xlstm_lm.models.presets import preset_fields
from xlstm_lm.training.run_config import RunConfig, check_run_config
from xlstm_lm.training.schedule import CooldownShape

WARMUP_SHARE = 0.1
"""Longest warm-up as a share of the shortest run of a trunk."""
SWEEP_FACTOR = 2.0
"""Ratio of neighboring learning rates of a sweep."""
SWEPT_SIZES = 2
"""Smallest sizes that a sweep trains."""


@dataclass(frozen=True)
class Span:
    """Numbers from `low` to `high` in equal ratios: LOW:HIGH:COUNT on the command line."""

    low: float
    high: float
    count: int

    @property
    def values(self) -> list[float]:
        """The numbers."""
        return [float(each) for each in np.geomspace(self.low, self.high, self.count)]


@dataclass(frozen=True, kw_only=True)
class DesignOptions:
    """A design's choices."""

    architectures: list[str]
    """NAME or NAME=PRESET of each (`find_architecture`)."""
    recipes: list[Path]
    """Recipes of data, batch, optimizer and warm-up; the model is replaced."""
    out: Path
    """Folder of the design."""
    mode: Literal["ladder", "isoflop"] = "ladder"
    budgets: Span | None = None
    """Compute in FLOPs: of each grid, or of a trunk's size at 20 tokens a parameter."""
    sizes: Span | None = None
    """Parameters of a ladder's trunks, in place of budgets."""
    tokens: Span | None = None
    """Tokens of each size's branches; None for `tokens_per_parameter`."""
    tokens_per_parameter: Span = Span(5, 40, 4)
    """Tokens of each size's branches over its parameters."""
    center: float = 20.0
    """Tokens for each parameter at the center of a grid, and of a budget's trunk."""
    grid: Span = Span(0.5, 2.0, 5)
    """Sizes of a grid over that of its center."""
    cooldown: float = 0.2
    """Share of a run's steps in its cooldown."""
    cooldown_shape: CooldownShape | None = None
    """Shape of all cooldowns; None for the recipe's."""
    seeds: int = 1
    """Seeds at one point: the smallest size with the fewest tokens."""
    check: bool = True
    """Whether a ladder trains one branch's run straight through as well."""
    lr_sweep: int = 0
    """Learning rates of a sweep at the smallest sizes, which replaces the ladder; 0 for none."""
    rates: dict[str, RateLaw] = field(default_factory=dict)
    """Law of the learning rate by architecture; empty for the recipe's rate at all sizes."""
    force: bool = False
    """Whether sizes far beyond the sweep of learning rates are allowed."""


class Designer:
    """Makes the runs of a design with their configurations."""

    def __init__(self, options: DesignOptions) -> None:
        """Read the recipes.

        Raises:
            ValueError: a recipe or a choice cannot be used.
        """
        self.options = options
        _check(options)
        self.base, self.shared = _read_recipes(options.recipes)
        data = self.base.data
        if not data.validation:
            raise ValueError(
                f"{', '.join(map(str, options.recipes))}: data.validation is empty, but a loss point is the loss on "
                "held-out documents; name some."
            )
        self.cooldown_shape = options.cooldown_shape or self.base.schedule.cooldown_shape
        self.context, self.batch_tokens = data.context_length, data.global_batch_size * data.context_length
        self.configs: dict[str, RunConfig] = {}
        """Configuration of each run by its name."""

    def design(self) -> Design:
        """Make all runs.

        Raises:
            ValueError: a size cannot be built, or a run is too short.
        """
        runs: list[DesignedRun] = []
        for text in self.options.architectures:
            found = find_architecture(text, self.shared, self.base.data.tokenizer.kind == "bytes")
            if self.options.lr_sweep:
                runs += self._sweep(found)
            elif self.options.mode == "isoflop":
                runs += self._grids(found)
            else:
                runs += self._ladder(found)
        return Design(self.options.out, sorted(runs, key=lambda run: run.kind == "branch"))

    def _ladder(self, found: Architecture) -> Iterator[DesignedRun]:
        for number, model in enumerate(self._sizes(found)):
            lengths = self._lengths(model)
            warmup = self._warmup(min(lengths))
            cooldowns = [max(1, round(self.options.cooldown * steps)) for steps in lengths]
            kept = [steps - cooldown for steps, cooldown in zip(lengths, cooldowns)]
            rate = self._rate(found.name, model, max(lengths))
            trunk = f"{found.name}-{_short(model.params)}"
            own = {"keep_at": kept, "validate_every": 0}
            yield self._run(trunk, "trunk", found, model, max(kept), warmup, 0, rate, **own)
            for steps, cooldown, start in zip(lengths, cooldowns, kept):
                name = f"{trunk}-{_short(steps * self.batch_tokens)}t"
                resume = str(checkpoint_folder(Design(self.options.out, []).run_folder(trunk), start))
                yield self._run(
                    name, "branch", found, model, steps, warmup, cooldown, rate, trunk=trunk, start=start, resume=resume
                )
            if number == 0:
                name = f"{trunk}-{_short(lengths[0] * self.batch_tokens)}t"
                straight = (found, model, lengths[0], warmup, cooldowns[0], rate)
                if self.options.check:
                    yield self._run(f"{name}-check", "check", *straight)
                for seed in range(1, self.options.seeds):
                    yield self._run(f"{name}-seed{seed}", "seed", *straight, seed=self.base.training.seed + seed)

    def _grids(self, found: Architecture) -> Iterator[DesignedRun]:
        assert self.options.budgets
        for flops in self.options.budgets.values:
            center = found.at_budget(flops, self.options.center, self.context)
            models = {each.params: each for each in (found.model(center.params * x) for x in self.options.grid.values)}
            for model in models.values():
                per_token = training_flops_per_token(model.config, self.context)
                steps = self._steps(flops / per_token, f"{found.name} with {model.params:,} parameters")
                cooldown = max(1, round(self.options.cooldown * steps))
                rate = self._rate(found.name, model, steps)
                name = f"{found.name}-{flops:.2g}-{_short(model.params)}".replace("+", "")
                yield self._run(name, "straight", found, model, steps, self._warmup(steps), cooldown, rate)

    def _sweep(self, found: Architecture) -> Iterator[DesignedRun]:
        count = self.options.lr_sweep
        for model in self._sizes(found)[:SWEPT_SIZES]:
            steps = self._lengths(model)[0]
            cooldown = max(1, round(self.options.cooldown * steps))
            for place in range(count):
                rate = self.base.optimizer.learning_rate * SWEEP_FACTOR ** (place - (count - 1) / 2)
                name = f"{found.name}-{_short(model.params)}-lr{rate:.3g}"
                yield self._run(name, "sweep", found, model, steps, self._warmup(steps), cooldown, rate)

    def _sizes(self, found: Architecture) -> list[SizedModel]:
        """Models of the trunks, the smallest first, each once."""
        options = self.options
        if options.sizes:
            models = [found.model(params) for params in options.sizes.values]
        else:
            assert options.budgets
            models = [found.at_budget(flops, options.center, self.context) for flops in options.budgets.values]
        return sorted({model.params: model for model in models}.values(), key=lambda model: model.params)

    def _lengths(self, model: SizedModel) -> list[int]:
        """Steps of a size's branches, the shortest first."""
        options = self.options
        tokens = options.tokens.values if options.tokens else None
        tokens = tokens or [ratio * model.params for ratio in options.tokens_per_parameter.values]
        return sorted({self._steps(each, f"{model.params:,} parameters") for each in tokens})

    def _steps(self, tokens: float, name: str) -> int:
        steps = round(tokens / self.batch_tokens)
        if steps * min(self.options.cooldown, WARMUP_SHARE) < 1:
            raise ValueError(
                f"{name}: {tokens:,.0f} tokens are {steps} steps of {self.batch_tokens:,} tokens, too few for a "
                "warm-up and a cooldown: give more tokens, or a smaller data.global_batch_size in the recipe."
            )
        return steps

    def _warmup(self, shortest: int) -> int:
        """Steps of the warm-up: the recipe's, but at most `WARMUP_SHARE` of the shortest run."""
        return max(1, min(in_steps(self.base.schedule.warmup, shortest), round(WARMUP_SHARE * shortest)))

    def _rate(self, architecture: str, model: SizedModel, steps: int) -> float:
        if not self.options.rates:
            return self.base.optimizer.learning_rate
        if architecture not in self.options.rates:
            raise ValueError(
                f"--rates has no sweep of {architecture}; it has {', '.join(self.options.rates)}. Sweep that one too, "
                "or design it alone, without --rates, at the recipe's learning rate."
            )
        law = self.options.rates[architecture]
        return float(f"{law.rate(model.params, steps * self.batch_tokens, self.options.force):.4g}")

    def _run(
        self,
        name: str,
        kind: Kind,
        found: Architecture,
        model: SizedModel,
        steps: int,
        warmup: int,
        cooldown: int,
        rate: float,
        *,
        trunk: str = "",
        start: int = 0,
        seed: int | None = None,
        **training: object,
    ) -> DesignedRun:
        """One run; adds its configuration to `configs`."""
        if name in self.configs:
            raise ValueError(f"Two runs are called {name}: choose sizes, budgets or learning rates further apart.")
        seed = self.base.training.seed if seed is None else seed
        training |= {"steps": steps, "seed": seed, "run_dir": str(Design(self.options.out, []).run_folder(name))}
        schedule = {
            "kind": "wsd" if cooldown else "constant",
            "warmup": warmup,
            "cooldown": cooldown,
            "cooldown_shape": self.cooldown_shape,
        }
        self.configs[name] = dataclasses.replace(
            self.base,
            model=model.config,
            training=dataclasses.replace(self.base.training, **training),
            schedule=dataclasses.replace(self.base.schedule, **schedule),
            optimizer=dataclasses.replace(self.base.optimizer, learning_rate=rate),
        )
        per_token = training_flops_per_token(model.config, self.context)
        tokens = steps * self.batch_tokens
        return DesignedRun(
            run=name,
            kind=kind,
            trunk=trunk or name,
            architecture=found.name,
            params=model.params,
            params_non_embedding=model.params_non_embedding,
            tokens=tokens,
            steps=steps,
            branch_step=start,
            warmup_steps=warmup,
            cooldown_steps=cooldown,
            cooldown_shape=self.cooldown_shape,
            context=self.context,
            batch_tokens=self.batch_tokens,
            learning_rate=rate,
            seed=seed,
            flops_per_token=per_token,
            flops=per_token * tokens,
        )


def _read_recipes(paths: Sequence[Path]) -> tuple[RunConfig, dict[str, Any]]:
    """The run that recipes describe, with any model, and the fields of a model that all models of the design have.

    These are the fields of the recipes' section `model` where it names no model itself; else its vocabulary alone.
    """
    values, origins = read_recipes(paths)
    section = values.pop("model", {})
    if not isinstance(section, dict) or {"family", "preset"} & section.keys():
        section = {"vocab_size": section["vocab_size"]} if "vocab_size" in section else {}
    return check_run_config(values | {"model": preset_fields("transformer-165m")}, origins), section


def _check(options: DesignOptions) -> None:
    """Refuse choices that exclude each other.

    Raises:
        ValueError: names the flags.
    """
    if options.mode == "isoflop" and (options.sizes or options.tokens or not options.budgets):
        raise ValueError("--mode isoflop needs --budgets LOW:HIGH:COUNT, and neither --sizes nor --tokens.")
    if (options.sizes is None) == (options.budgets is None):
        raise ValueError("Give either --sizes LOW:HIGH:COUNT (parameters) or --budgets LOW:HIGH:COUNT (FLOPs).")
    names = [each.partition("=")[0] for each in options.architectures]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--architecture names {twice[0]} more than once: give each a name of its own, NAME=PRESET.")


def _short(number: float) -> str:
    """A number as part of a name, such as 128k or 1.29m."""
    for unit, factor in (("b", 1e9), ("m", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.0f}"
