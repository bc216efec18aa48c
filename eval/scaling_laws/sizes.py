"""Models of any size of an architecture: the nearest preset, with all its widths in proportion."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xlstm_lm.base.mistakes import nearest
from xlstm_lm.models import FAMILIES, ModelConfig
from xlstm_lm.models.accounting import totals, training_flops_per_token
from xlstm_lm.models.components import components
from xlstm_lm.models.presets import PRESETS, preset_fields

WIDTHS = ("embedding_dim", "feedforward_dim", "hidden_dim")
"""Fields of a model that grow in proportion."""
SMALL, NARROW_STEP, WIDE_STEP = 512, 8, 32
"""Presets narrower than the first change their width in the second's steps, others in the third's."""
MOST_STEPS = 16
"""Widths that are tried one after the other until one fits the heads."""
NEAR = 1.5
"""The largest ratio between the parameters of a model and those asked for, either way."""
OF_SIZE = r"-(cpu-)?[\d.]+[mb]"
"""End of a preset's name after that of its architecture."""


@dataclass(frozen=True)
class SizedModel:
    """A model of an architecture."""

    section: dict[str, Any]
    """Section `model` of a recipe."""
    config: ModelConfig
    params: int
    """All parameters."""
    params_non_embedding: int
    """Parameters without embedding and head."""


@dataclass(frozen=True)
class Architecture:
    """A kind of model with the presets whose widths are scaled."""

    name: str
    presets: list[dict[str, Any]]
    """Sections `model`, the smallest first."""

    def model(self, params: float) -> SizedModel:
        """Build the model whose number of parameters is nearest to `params` in ratio.

        Raises:
            ValueError: no width comes within a factor of `NEAR`; names the nearest.
        """
        counts = [_sized(preset).params for preset in self.presets]
        nearest_preset = min(range(len(counts)), key=lambda place: abs(math.log(counts[place] / params)))
        found = _nearest_width(self.presets[nearest_preset], params)
        if not 1 / NEAR < found.params / params < NEAR:
            raise ValueError(
                f"{self.name}: the nearest model to {params:,.0f} parameters has {found.params:,}. Choose sizes within "
                f"a factor of {NEAR} of a model's, or another preset ({self.name}=PRESET): heads limit the widths."
            )
        return found

    def at_budget(self, flops: float, tokens_per_parameter: float, context: int) -> SizedModel:
        """Build the model that spends a budget on so many tokens for each of its parameters.

        Args:
            flops: the budget.
            tokens_per_parameter: D over N.
            context: tokens of a row.
        """
        params = math.sqrt(flops / (6 * tokens_per_parameter))
        for _ in range(3):  # FLOPs over parameters change slowly with the size
            found = self.model(params)
            ratio = training_flops_per_token(found.config, context) / found.params
            params = math.sqrt(flops / (ratio * tokens_per_parameter))
        return self.model(params)


def find_architecture(text: str, shared: dict[str, Any], on_bytes: bool) -> Architecture:
    """The architecture of a flag: `NAME`, whose presets are NAME-SIZE, or `NAME=PRESET`.

    Args:
        text: the flag's value.
        shared: fields of the section `model` that all models have, such as vocab_size.
        on_bytes: whether the tokens are bytes; else presets for bytes are left out.

    Raises:
        ValueError: there is no such preset.
    """
    name, _, preset = text.partition("=")
    if preset:
        return Architecture(name, [preset_fields(preset) | shared])
    named = [preset_fields(each) for each in PRESETS if re.fullmatch(re.escape(name) + OF_SIZE, each)]
    fitting = [each | shared for each in named if (each.get("vocab_size", 50304) == 257) == on_bytes]
    if not fitting:
        kinds = dict.fromkeys(re.sub(OF_SIZE + ".*", "", each) for each in PRESETS)
        hint = nearest(name, kinds, otherwise="There are {known}.")
        found = "has no presets for this tokenizer" if named else "is no architecture with presets"
        raise ValueError(f"--architecture {name} {found}. {hint} Or give NAME=PRESET, such as mine=xlstm-cpu-0.7m.")
    return Architecture(name, sorted(fitting, key=lambda each: _sized(each).params))


def _sized(section: dict[str, Any]) -> SizedModel:
    config = FAMILIES[section["family"]][0](**section)
    counts = totals(components(config, 1), 1)
    without = int(counts["parameters_without_embedding_and_head"])
    return SizedModel(section, config, int(counts["parameters"]), without)


def _nearest_width(preset: dict[str, Any], params: float) -> SizedModel:
    """The preset with its widths scaled until its parameters are nearest to `params`, by bisection."""
    width = preset["embedding_dim"]
    step = math.lcm(NARROW_STEP if width < SMALL else WIDE_STEP, preset.get("num_heads", 1))
    tried: dict[int, SizedModel] = {}

    def at(place: int) -> SizedModel:
        if place not in tried:
            tried[place] = _scaled(preset, place * step, step)
        return tried[place]

    low, high = 1, max(2, 8 * width // step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).params < params else (low, middle)
    return min((at(low), at(high)), key=_distance_from(params))


def _distance_from(params: float) -> Callable[[SizedModel], float]:
    return lambda model: abs(math.log(model.params / params))


def _scaled(preset: dict[str, Any], width: int, step: int) -> SizedModel:
    """The preset at a width, or at the next one, in steps, that its heads allow."""
    for wider in range(width, width + MOST_STEPS * step, step):
        section, factor = dict(preset), wider / preset["embedding_dim"]
        for name in WIDTHS:
            if preset.get(name):
                section[name] = wider if name == "embedding_dim" else max(4, 4 * round(preset[name] * factor / 4))
        try:
            return _sized(section)
        except ValueError as error:
            reason = error
    raise ValueError(f"No width from {width} on fits the model {preset}: {reason}")
