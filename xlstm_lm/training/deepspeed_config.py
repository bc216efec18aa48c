"""The JSON that DeepSpeed is given: the user's `deepspeed` section and our fields for the rest."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch

from xlstm_lm.ops.announce import announce_once

OUR_FIELDS = {
    "train_batch_size": "data.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size (and data.global_batch_size)",
    "managed_gradient_accumulation": "training.micro_batch_size",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "gradient_clipping": "optimizer.gradient_clip",
    "optimizer": "the section optimizer",
    "scheduler": "the section schedule",
    "activation_checkpointing": "training.activation_checkpointing",
    "wandb": "the section wandb",
    "checkpoint": "training.checkpoint_every",
    "steps_per_print": "training.log_every",
    "gradient_allreduce_op": "nothing: the loss is normalised by the tokens of the whole batch",
}
"""Keys of a DeepSpeed configuration that a recipe must not hold, and what says the same thing here."""

Precision = Literal["bf16", "fp32"]


def choose_precision(choice: str, device: torch.device) -> Precision:
    """What `training.precision` means on `device`: auto is bf16 where the device multiplies it natively."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"


def check_deepspeed_section(section: dict[str, Any]) -> None:
    """Refuse what is not the section's to say.

    Raises:
        ValueError: a key that a field of ours stands for, an unknown stage, or an offload that checkpoints cannot read.
    """
    for key in section:
        if key in OUR_FIELDS:
            raise ValueError(f"deepspeed.{key} is not set there: use {OUR_FIELDS[key]} and remove it.")
    zero = section.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_optimization.stage is {zero['stage']!r}; it must be 0, 1, 2 or 3.")
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) or {}
        if offload.get("device", "none") not in ("none", "cpu") or offload.get("ratio", 1.0) != 1.0:
            raise ValueError(
                f"deepspeed.zero_optimization.{name} is {offload}; checkpoints can be read from and written to device "
                "cpu with ratio 1 only."
            )
    if zero.get("zenflow"):
        raise ValueError("deepspeed.zero_optimization.zenflow is not supported: it changes when weights are updated.")


def deepspeed_json(
    section: dict[str, Any],
    *,
    precision: Precision,
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
    gradient_clip: float,
) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`. `section` must have passed `check_deepspeed_section`."""
    config = copy.deepcopy(section)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if precision == "bf16" and zero.setdefault("stage", 0) == 0:
        announce_once(
            "DeepSpeed's bf16 at ZeRO stage 0 takes a step of the optimizer at start: stage 1, which computes the "
            "same, is used instead."
        )
        zero["stage"] = 1
    config |= {
        "train_batch_size": micro_batch_size * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        # At stage 0 the engine of ours clips, because DeepSpeed's does not tell the norm.
        "gradient_clipping": gradient_clip if zero["stage"] else 0.0,
        "bf16": {"enabled": precision == "bf16"},
        # torch's fused AdamW steps CPU tensors as well, and compiles nothing.
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16":
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return config
