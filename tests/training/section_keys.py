"""Each key of the section deepspeed: a value to try, and two steps with it beside two without; a program for torchrun.

Prints a JSON object: for each case, the largest relative difference of losses and gradient norms, and whether the value
reached DeepSpeed's configuration.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any, NamedTuple, get_args, get_type_hints

from typing_extensions import is_typeddict

from tests.training.equivalence import batches, build_engine, engine_step
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.training.deepspeed_section import DeepSpeedSection


class Trial(NamedTuple):
    """A value of a key, and where it can matter."""

    value: Any
    stages: tuple[int, ...]
    precision: str = "fp32"
    tolerance: float = 1e-6
    beside: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """Keys that the value needs."""


PARTITIONED, WHOLE, ALL = (3,), (1, 2), (0, 1, 2, 3)
STAGE_3 = {
    "prefetch_bucket_size": 0,
    "param_persistence_threshold": 0,
    "model_persistence_threshold": 10,
    "max_live_parameters": 0,
    "max_reuse_distance": 0,
    "use_all_reduce_for_fetch_params": True,
    "allgather_sequential": True,
}
"""Keys of ZeRO 3 with two names, one of them with stage3_ in front."""
OFFLOADED = {"offload_optimizer.device": "cpu"}
PARAMETERS_OFFLOADED = {**OFFLOADED, "offload_param.device": "cpu"}
ZERO = {
    "stage": [Trial(stage, (stage,)) for stage in ALL],
    "contiguous_gradients": [Trial(False, (1, 2, 3))],
    "reduce_scatter": [Trial(False, (1, 2, 3))],
    "reduce_bucket_size": [Trial(50, (1, 2, 3))],
    "use_multi_rank_bucket_allreduce": [Trial(False, WHOLE)],
    "allgather_bucket_size": [Trial(50, WHOLE)],
    "overlap_comm": [Trial(True, (1, 2)), Trial(False, PARTITIONED)],
    "offload_optimizer.device": [Trial("cpu", (1, 2, 3))],
    "offload_optimizer.pin_memory": [Trial(True, (1, 2, 3), beside=OFFLOADED)],
    "offload_param.device": [Trial("cpu", PARTITIONED, beside=OFFLOADED)],
    "offload_param.pin_memory": [Trial(True, PARTITIONED, beside=PARAMETERS_OFFLOADED)],
    "sub_group_size": [Trial(50, PARTITIONED)],
    "ignore_unused_parameters": [Trial(False, (2,))],
    "memory_efficient_linear": [Trial(False, PARTITIONED)],
    "log_trace_cache_warnings": [Trial(True, PARTITIONED)],
    "enable_sanity_checks": [Trial(True, PARTITIONED)],
    **{name: [Trial(value, PARTITIONED)] for key, value in STAGE_3.items() for name in (key, f"stage3_{key}")},
}
TRIALS: dict[str, list[Trial]] = {
    **{f"zero_optimization.{key}": trials for key, trials in ZERO.items()},
    "communication_data_type": [Trial("fp32", ALL), Trial("bf16", (1, 2, 3), "bf16", 0.02)],
    "data_types.grad_accum_dtype": [Trial("fp32", (2, 3)), Trial("bf16", (1, 2, 3), "bf16", 0.02)],
    "prescale_gradients": [Trial(True, (0, 1))],
    "gradient_predivide_factor": [Trial(2.0, (0, 1))],
    "disable_python_gc": [Trial(True, (2,))],
    "wall_clock_breakdown": [Trial(True, (2, 3))],
    "memory_breakdown": [Trial(True, (2,))],
    "dump_state": [Trial(True, (2,))],
    "log_level": [Trial("error", (2,))],
    "flops_profiler.enabled": [Trial(True, (2, 3))],
    "comms_logger.enabled": [Trial(True, (2, 3))],
    **{
        f"flops_profiler.{key}": [Trial(value, (2,), beside={"flops_profiler.enabled": True})]
        for key, value in {
            "recompute_fwd_factor": 1.0,
            "profile_step": 2,
            "module_depth": 1,
            "top_modules": 2,
            "detailed": False,
            "output_file": None,
        }.items()
    },
    **{
        f"comms_logger.{key}": [Trial(value, (2,), beside={"comms_logger.enabled": True})]
        for key, value in {"prof_all": False, "prof_ops": ["all_reduce"], "verbose": True, "debug": True}.items()
    },
}
"""Values to try of every allowed key, by its dotted name."""


def allowed_keys(section: Any = DeepSpeedSection, prefix: str = "") -> set[str]:
    """Dotted names of the keys that the section allows."""
    found: set[str] = set()
    for key, annotation in get_type_hints(section).items():
        inner = [each for each in (annotation, *get_args(annotation)) if is_typeddict(each)]
        found |= allowed_keys(inner[0], f"{prefix}{key}.") if inner else {prefix + key}
    return found


def section_with(values: dict[str, Any]) -> dict[str, Any]:
    """The section of dotted keys and values."""
    section: dict[str, Any] = {}
    for name, value in values.items():
        *path, key = name.split(".")
        place = section
        for part in path:
            place = place.setdefault(part, {})
        place[key] = value
    return section


def section_of(key: str, trial: Trial, stage: int) -> dict[str, Any]:
    """The section in which a trial stands."""
    zero = key.startswith("zero_optimization.")
    beside = {f"zero_optimization.{name}" if zero else name: value for name, value in trial.beside.items()}
    return section_with({"zero_optimization.stage": stage, **beside, key: trial.value})


def two_steps(world: World, section: dict[str, Any], precision: str) -> tuple[list[float], Any]:
    """Losses and gradient norms of two steps, and DeepSpeed's configuration."""
    stage = section["zero_optimization"]["stage"]
    _, engine = build_engine(world, stage, precision=precision, section=section)
    found = []
    for step, batch in enumerate(batches(2)):
        result, loss = engine_step(world, engine, batch, step)
        assert result.applied
        found += [loss, float(result.gradient_norm)]
    config = engine._engine._config
    engine.close()
    return found, config


def in_configuration(config: Any, key: str) -> Any:
    """Value that DeepSpeed's configuration holds for a key."""
    places = {
        "zero_optimization": "zero_config",
        "flops_profiler": "flops_profiler_config",
        "comms_logger": "comms_config.comms_logger",
        "data_types": "",
    }
    first, _, rest = key.partition(".")
    path = f"{places[first]}.{rest.removeprefix('stage3_')}" if first in places else key
    value = config
    for name in filter(None, path.split(".")):
        value = getattr(value, name)
    return getattr(value, "value", value)


def main() -> dict[str, Any]:
    world = join_world()
    plain: dict[tuple[int, str], list[float]] = {}
    report: dict[str, Any] = {}
    for key, trials in TRIALS.items():
        for trial in trials:
            for stage in trial.stages:
                case = f"{key} = {trial.value} at stage {stage}"
                at = (stage, trial.precision)
                if at not in plain:
                    plain[at], _ = two_steps(world, {"zero_optimization": {"stage": stage}}, trial.precision)
                found, config = two_steps(world, section_of(key, trial, stage), trial.precision)
                worst = max(abs(a - b) / abs(b) for a, b in zip(found, plain[at], strict=True))
                held = in_configuration(config, key)
                report[case] = {
                    "difference": worst,
                    "allowed": trial.tolerance,
                    "reached": held == trial.value
                    or str(held) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}.get(trial.value),
                }
    return report if world.is_first else {}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
        found = main()
    if found:
        print(json.dumps(found))
