"""Targets of low-rank adapters (PEFT's LoRA) in an xLSTM. PEFT has no table for these models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xlstm_lm.models import FAMILIES, XLSTMConfig

_STOCK = ["q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact", "out_proj"]
_STOCK_FEEDFORWARD = ["proj_up_gate", "proj_up", "proj_down"]


def lora_targets(model_config: Any, format_name: str) -> dict[str, list[str]]:
    """Fields of `peft.LoraConfig` that reach every weight matrix of the blocks; empty where PEFT has defaults or the
    model is a baseline.

    Linear layers are `target_modules`. PEFT adapts stacks of matrices, such as a block-diagonal projection, as
    `target_parameters`. A parameter with more dimensions, such as an sLSTM's (gates, heads, units, units), has too many
    for it: the module that holds it is trained in full, as one of the `modules_to_save`, and saved with the adapter.
    """
    if not isinstance(model_config, XLSTMConfig):
        return {}
    if format_name == "transformers":
        return {"target_modules": [*_STOCK, *_STOCK_FEEDFORWARD]}
    with torch.device("meta"):
        model = FAMILIES[model_config.family][1](model_config)
    no_decay = model.no_decay_parameter_names()
    targets: dict[str, dict[str, None]] = {"target_modules": {}, "target_parameters": {}, "modules_to_save": {}}
    for path, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            targets["target_modules"][path.rpartition(".")[2]] = None
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.ndim == 3 and name not in no_decay:
                targets["target_parameters"][".".join(name.split(".")[-2:])] = None
            elif parameter.ndim > 3:
                targets["modules_to_save"][path] = None
    return {field: list(names) for field, names in targets.items() if names}
