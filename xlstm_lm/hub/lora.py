"""Targets of low-rank adapters (PEFT's LoRA) in an xLSTM. PEFT has no table for these models."""

from __future__ import annotations

from typing import Any

_STOCK = ["q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact", "out_proj"]
_STOCK_FEEDFORWARD = ["proj_up_gate", "proj_up", "proj_down"]
_MODULES = {
    "mlstm": ["qkvo", "gates", "out", "gate_up", "down"],
    "mlstm_paper": ["up", "gates", "down"],
    "slstm": ["gate_up", "down"],
    "attention": ["qkv", "out", "gate_up", "down"],
    "mamba1": ["input", "selection", "step", "out"],
    "mamba2": ["input", "out"],
}
_PARAMETERS = ["query.weight", "key.weight", "value.weight"]


def lora_targets(model_config: Any, format_name: str) -> dict[str, list[str]]:
    """Fields of `peft.LoraConfig` that reach every weight matrix of the blocks; empty where PEFT has defaults or the
    model is a baseline.

    The block-diagonal projections of `mlstm_paper` are stacks of matrices, which PEFT adapts as `target_parameters`. An
    sLSTM's matrices, (gates, heads, units, units), have one dimension too many for it: they are trained in full, as
    `modules_to_save`, which also holds them in the adapter.
    """
    if model_config.family not in ("xlstm", "hybrid"):
        return {}
    if format_name == "transformers":
        return {"target_modules": [*_STOCK, *_STOCK_FEEDFORWARD]}
    kinds = model_config.block_kinds()
    modules = [name for kind in dict.fromkeys(kinds) for name in _MODULES[kind]]
    targets = {"target_modules": list(dict.fromkeys(modules))}
    if "mlstm_paper" in kinds:
        targets["target_parameters"] = _PARAMETERS
    if "slstm" in kinds:
        targets["modules_to_save"] = [f"blocks.{index}.mixer" for index, kind in enumerate(kinds) if kind == "slstm"]
    return targets
