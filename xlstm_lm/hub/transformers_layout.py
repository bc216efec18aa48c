"""transformers' `xlstm` folders: their names and shapes in terms of ours.

Sizes are read off the tensors, since published configurations leave some of them out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xlstm_lm.hub.tensor_names import check_names, count_blocks, is_tied
from xlstm_lm.models.xlstm_config import XLSTMConfig

# Ours -> theirs, side by side in our tensor; with "weight_mode": "fused" theirs is one tensor already.
BLOCK_TENSORS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "norm.weight": (("norm_mlstm.weight",), None),
    "mixer.qkvo.weight": (
        tuple(f"mlstm_layer.{name}.weight" for name in ("q", "k", "v", "ogate_preact")),
        "mlstm_layer.qkv_opreact.weight",
    ),
    "mixer.gates.weight": (
        ("mlstm_layer.igate_preact.weight", "mlstm_layer.fgate_preact.weight"),
        "mlstm_layer.ifgate_preact.weight",
    ),
    "mixer.gates.bias": (
        ("mlstm_layer.igate_preact.bias", "mlstm_layer.fgate_preact.bias"),
        "mlstm_layer.ifgate_preact.bias",
    ),
    "mixer.head_norm.weight": (("mlstm_layer.multihead_norm.weight",), None),
    "mixer.out.weight": (("mlstm_layer.out_proj.weight",), None),
    "feedforward_norm.weight": (("norm_ffn.weight",), None),
    "feedforward.gate_up.weight": (("ffn.proj_up_gate.weight", "ffn.proj_up.weight"), "ffn.proj_up_gate_z.weight"),
    "feedforward.down.weight": (("ffn.proj_down.weight",), None),
}
OUTER_TENSORS = {
    "embedding.weight": "backbone.embeddings.weight",
    "final_norm.weight": "backbone.out_norm.weight",
    "head.weight": "lm_head.weight",
}


def from_transformers(values: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[XLSTMConfig, dict[str, Tensor]]:
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
    num_blocks = count_blocks(tensors, r"backbone\.blocks\.(\d+)\.")
    fused = any(name.endswith("mlstm_layer.qkv_opreact.weight") for name in tensors)
    wanted = {ours: (theirs,) for ours, theirs in OUTER_TENSORS.items()}
    for index in range(max(num_blocks, 1)):
        for ours, (single, one) in BLOCK_TENSORS.items():
            theirs = (one,) if fused and one else single
            wanted[f"blocks.{index}.{ours}"] = tuple(f"backbone.blocks.{index}.{name}" for name in theirs)
    embedding, head = OUTER_TENSORS["embedding.weight"], OUTER_TENSORS["head.weight"]
    tied = is_tied(bool(values.get("tie_word_embeddings")), tensors, embedding, head)
    if tied:
        wanted["head.weight"] = (embedding,)
        tensors = {name: tensor for name, tensor in tensors.items() if name != head}
    check_names(tensors, {name for parts in wanted.values() for name in parts}, "a transformers xlstm model")
    weights = {
        ours: torch.cat([tensors[name] for name in parts]) if len(parts) > 1 else tensors[parts[0]]
        for ours, parts in wanted.items()
    }
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
        tie_embeddings=tied,
    )
    return config, weights
