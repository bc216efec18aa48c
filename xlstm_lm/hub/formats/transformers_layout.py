"""transformers' `xlstm` folders: their names and shapes mapped to ours.

Sizes are read off the tensors, since published configurations leave some of them out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from xlstm_lm.hub.formats.name_map import NameMap, joined
from xlstm_lm.models.xlstm_config import XLSTMConfig

_OUTER = {
    "embedding.weight": ("backbone.embeddings.weight",),
    "final_norm.weight": ("backbone.out_norm.weight",),
    "head.weight": ("lm_head.weight",),
}
_SINGLE = {
    "norm.weight": ("norm_mlstm.weight",),
    "mixer.qkvo.weight": tuple(f"mlstm_layer.{name}.weight" for name in ("q", "k", "v", "ogate_preact")),
    "mixer.gates.weight": ("mlstm_layer.igate_preact.weight", "mlstm_layer.fgate_preact.weight"),
    "mixer.gates.bias": ("mlstm_layer.igate_preact.bias", "mlstm_layer.fgate_preact.bias"),
    "mixer.head_norm.weight": ("mlstm_layer.multihead_norm.weight",),
    "mixer.out.weight": ("mlstm_layer.out_proj.weight",),
    "feedforward_norm.weight": ("norm_ffn.weight",),
    "feedforward.gate_up.weight": ("ffn.proj_up_gate.weight", "ffn.proj_up.weight"),
    "feedforward.down.weight": ("ffn.proj_down.weight",),
}
_FUSED = _SINGLE | {
    "mixer.qkvo.weight": ("mlstm_layer.qkv_opreact.weight",),
    "mixer.gates.weight": ("mlstm_layer.ifgate_preact.weight",),
    "mixer.gates.bias": ("mlstm_layer.ifgate_preact.bias",),
    "feedforward.gate_up.weight": ("ffn.proj_up_gate_z.weight",),
}
NAMES = NameMap(_OUTER, "backbone.blocks.", {"single": _SINGLE, "fused": _FUSED})
"""By `weight_mode`: one tensor a projection, or, as in ours, one for all that lie side by side."""
LARGE_NAMES = dataclasses.replace(NAMES, outer=_OUTER | {"embedding.weight": ("embedding.weight",)})
"""The same model in the authors' package, xLSTMLarge."""


def from_transformers(
    values: dict[str, Any], tensors: dict[str, Tensor], names: NameMap = NAMES
) -> tuple[XLSTMConfig, dict[str, Tensor]]:
    """Our configuration and weights for the `config.json` and the tensors of a transformers `xlstm` folder.

    transformers ignores `tie_word_embeddings` for this type and always has a head of its own. So does this, except that
    the head is tied where the configuration says so and no other head is there: none at all, or one equal to the
    embedding.

    Raises:
        ValueError: the folder uses biases, or tensors are missing or left over; all of them are named.
    """
    if values.get("use_bias"):
        raise ValueError(
            "config.json says use_bias: true; xlstm-lm's mlstm block has no biases but those of its gates."
        )
    num_blocks = names.count_blocks(tensors)
    fused = any(name.endswith("mlstm_layer.qkv_opreact.weight") for name in tensors)
    flag = bool(values.get("tie_word_embeddings"))
    kinds = ["fused" if fused else "single"] * max(num_blocks, 1)
    weights = joined(names.select(tensors, kinds, flag, "a transformers xlstm model"))
    vocab_size, width = weights["embedding.weight"].shape
    v_dim = weights["blocks.0.mixer.out.weight"].shape[1]
    config = XLSTMConfig(
        vocab_size=vocab_size,
        embedding_dim=width,
        num_blocks=num_blocks,
        num_heads=weights["blocks.0.mixer.gates.bias"].shape[0] // 2,
        pattern="mlstm",
        qk_dim_factor=(weights["blocks.0.mixer.qkvo.weight"].shape[0] / 2 - v_dim) / width,
        v_dim_factor=v_dim / width,
        feedforward_dim=weights["blocks.0.feedforward.down.weight"].shape[1],
        gate_soft_cap=values.get("gate_soft_cap", 15.0),
        logit_soft_cap=values.get("output_logit_soft_cap", 30.0),
        norm_eps=values.get("norm_eps", 1e-6),
        cell_eps=values.get("eps", 1e-6),
        tie_embeddings=names.is_tied(flag, tensors),
    )
    return config, weights
