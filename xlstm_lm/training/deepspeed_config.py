"""DeepSpeed's configuration: the recipe's section `deepspeed`, completed by settings from the other sections."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch

from xlstm_lm.base.announce import announce_once

Precision = Literal["bf16", "fp32"]


def choose_precision(choice: str, device: torch.device) -> Precision:
    """Resolve `training.precision` for a device: auto means bf16 if the device multiplies it natively."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"


def zero_stage(section: dict[str, Any], precision: Precision) -> int:
    """The effective ZeRO stage: 1 in place of 0 for bf16, where DeepSpeed steps the optimizer when it sets up."""
    stage = section.get("zero_optimization", {}).get("stage", 0)
    return max(stage, 1) if precision == "bf16" else stage


def deepspeed_json(
    section: dict[str, Any],
    *,
    precision: Precision,
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
    gradient_clip: float,
) -> dict[str, Any]:
    """Build the configuration for `deepspeed.initialize`.

    Args:
        section: Section deepspeed of the recipe, checked.
        precision: Type of weights and activations.
        micro_batch_size: Rows of one forward and backward pass on one rank.
        accumulation_steps: Micro batches of a step on one rank.
        world_size: Number of processes, all of which DeepSpeed regards as data-parallel.
        gradient_clip: Largest norm of the whole gradient; 0 for no limit.
    """
    config = copy.deepcopy(section)
    zero, stage = config.setdefault("zero_optimization", {}), zero_stage(section, precision)
    if zero.get("stage", 0) != stage:
        announce_once(
            "DeepSpeed's bf16 at ZeRO stage 0 takes a step of the optimizer at start: stage 1, which computes the "
            "same, is used instead."
        )
    zero["stage"] = stage
    config |= {
        "train_batch_size": micro_batch_size * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        # At stage 0 TrainingEngine clips, because DeepSpeed does not return the norm.
        "gradient_clipping": gradient_clip if stage else 0.0,
        "bf16": {"enabled": precision == "bf16"},
        # The optimizers of xlstm-lm update CPU tensors as well, and compile nothing.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    # DeepSpeed would sum a bf16 run's gradients in bf16, each addition of a ring rounded to 8 bits.
    config.setdefault("communication_data_type", "fp32")
    if precision == "bf16":
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return config


@contextlib.contextmanager
def refusals_explained() -> Iterator[None]:
    """Turn DeepSpeed's errors for incompatible values or missing packages into a ValueError of one line."""
    try:
        yield
    except (AssertionError, ImportError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split("For further information")[0].split()) or type(error).__name__
        raise ValueError(f"DeepSpeed refuses the section deepspeed: {reason}. Change or remove that key.") from error
