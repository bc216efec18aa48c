"""Every field of every section and family: values that no run can have are refused by name and in plain words."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from eval.compare.config import CompareConfig
from eval.gradient_reach.runs import StudyConfig as ReachConfig
from eval.tasks.registry import TASKS
from eval.tasks.study import StudyConfig
from xlstm_lm.base.fields import Count, NonNegative, Positive, Range, Share, Size, argument, check_fields
from xlstm_lm.models import FAMILIES
from xlstm_lm.models.generation import SamplingConfig
from xlstm_lm.models.mixers.mamba1 import SelectiveScanBackend
from xlstm_lm.models.mixers.mamba2 import SSDBackend
from xlstm_lm.models.mixers.mlstm_cell import MLSTMBackend
from xlstm_lm.models.mixers.slstm import SLSTMBackend
from xlstm_lm.ops import mlstm, selective_scan, slstm, ssd
from xlstm_lm.training.run_config import RunConfig, load_run_config
from xlstm_lm.training.run_config import fields as flags

ABSURD = (float("nan"), float("inf"), -float("inf"), 10**25, -(10**25), 1e300, True)
NUMBERS = [
    (each, alternative)
    for each in flags()
    if {"INT", "NUMBER"} & set(each.type_name.split("|"))
    for alternative in each.alternatives or ("",)
]


@pytest.mark.parametrize(("field", "alternative"), NUMBERS, ids=lambda value: getattr(value, "name", value))
def test_every_number_has_bounds(field, alternative):
    chosen = {field.tag: alternative} if field.tag else {}
    for value in ABSURD:
        with pytest.raises(ValueError) as refused:
            load_run_config([], {"model": {}, "data": {}, **chosen, field.name: value})
        message = str(refused.value)
        assert message.startswith(f"flag --{field.name}: {field.name} = ") and "must be" in message, message


def numbers_without_range(hint: Any, path: str = "") -> list[str]:
    """Where below a type a plain int or float stands."""
    if hint in (int, float):
        return [path]
    if any(isinstance(each, Range) for each in get_args(hint)[1:]) and get_args(hint)[0] in (int, float):
        return []
    if is_dataclass(hint) or hasattr(hint, "__total__"):
        hints = get_type_hints(hint, include_extras=True)
        names = [each.name for each in fields(hint)] if is_dataclass(hint) else list(hints)
        return [found for name in names for found in numbers_without_range(hints[name], f"{path}.{name}")]
    if get_origin(hint) is None or str(get_origin(hint)) == "typing.Literal":
        return []
    parts = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    return [found for part in parts for found in numbers_without_range(part, path)]


@pytest.mark.parametrize(
    "config_class", [RunConfig, SamplingConfig, CompareConfig, StudyConfig, ReachConfig, *dict.fromkeys(TASKS.values())]
)
def test_no_number_of_any_configuration_is_without_a_range(config_class):
    assert not numbers_without_range(config_class)


@pytest.mark.parametrize("family", FAMILIES)
def test_caps_and_epsilons_and_factors_below_zero_are_refused(family):
    config_class = FAMILIES[family][0]
    for each in fields(config_class):
        if each.name.endswith(("_cap", "_eps", "_factor", "_range", "dropout")):
            with pytest.raises(ValueError, match=f"{each.name} is -1.0; it must be a number"):
                config_class(**{each.name: -1.0})
        if each.name.endswith(("_cap", "_factor")):
            with pytest.raises(ValueError, match=f"{each.name} is 0.0; it must be a number above 0"):
                config_class(**{each.name: 0.0})


@pytest.mark.parametrize(
    ("names", "registered"),
    [
        (MLSTMBackend, mlstm.MLSTM.names),
        (SLSTMBackend, slstm.SLSTM.names),
        (SelectiveScanBackend, selective_scan.SCAN.names),
        (SSDBackend, ssd.SSD.names),
    ],
)
def test_backends_that_a_recipe_may_name_are_those_registered(names, registered):
    installable = {"triton", "triton_step", "mamba_ssm"}
    assert {"auto", *registered} <= set(get_args(names)) <= {"auto", *registered, *installable}


def test_a_backend_of_the_other_mamba_is_refused():
    with pytest.raises(ValueError, match="for version 1 it must be one of auto, recurrence, compiled, mamba_ssm"):
        FAMILIES["mamba"][0](version=1, scan_backend="mlstm")


@dataclass
class Example:
    """A configuration."""

    width: Size = 1
    part: Share | None = None
    parts: tuple[Share, Share] = (0.0, 0.5)
    places: list[Count] | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "example.width is 0; it must be a whole number from 1 to 1,048,576."),
        ({"width": 1.5}, "example.width is 1.5; it must be a whole number"),
        ({"width": True}, "example.width is True"),
        ({"part": 1.0}, "example.part is 1.0; it must be a number of at least 0 and below 1 or null."),
        (
            {"parts": (0.1,)},
            "example.parts is (0.1,); it must be a list of 2, each a number of at least 0 and below 1.",
        ),
        ({"places": [1, 0]}, "example.places is [1, 0]; it must be a list, each item a whole number"),
    ],
)
def test_a_class_checks_its_own_fields(values, message):
    check_fields(Example(), "example.")
    with pytest.raises(ValueError) as refused:
        check_fields(Example(**values), "example.")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("hint", "text"), [(Count, "0"), (Count, "1.5"), (Positive, "nan"), (NonNegative, "-1"), (NonNegative, "inf")]
)
def test_flags_of_the_same_types(hint, text):
    assert argument(hint)("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match=rf"{text} must be a (whole )?number"):
        argument(hint)(text)
