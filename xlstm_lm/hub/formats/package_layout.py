"""State dicts of the authors' `xlstm` package, of its `xLSTMLMModel` and its `xLSTMLarge`, mapped to our names.

Sizes are read off the tensors; the configuration beside them says what tensors cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xlstm_lm.hub.formats.name_map import NameMap
from xlstm_lm.hub.formats.transformers_layout import LARGE_NAMES, NAMES, from_transformers
from xlstm_lm.models.xlstm_config import XLSTMConfig

STACK = "xlstm_block_stack."


def from_package(values: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[XLSTMConfig, dict[str, Tensor]]:
    """Our configuration and weights for a state dict of the package and the configuration of its model.

    Raises:
        ValueError: the tensors are those of neither model, or some are missing or left over; all of them are named.
    """
    if any(name.startswith("backbone.blocks.") for name in tensors):
        return _from_large(values, tensors)
    return _from_paper(values, tensors)


def _from_large(values: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[XLSTMConfig, dict[str, Tensor]]:
    """xLSTMLarge: transformers' names but for the embedding's."""
    if not values.get("add_out_norm", True):
        raise ValueError("The configuration says add_out_norm: false; xlstm-lm's models end with a norm.")
    return from_transformers(values, tensors, LARGE_NAMES if "embedding.weight" in tensors else NAMES)


def _norm(weight: Tensor) -> Tensor:
    """Their norms keep the weight less one, and add it where they compute."""
    return 1 + weight.float()


def _input_weights(*weights: Tensor) -> Tensor:
    """(heads, out, in) of each gate to (gates, heads, in, out)."""
    return torch.stack([weight.transpose(1, 2) for weight in weights])


def _is_cuda_kernel(kernel: Tensor) -> bool:
    """Whether a recurrent kernel is stored as their CUDA backend does, (heads, in, 4 * out), or as the vanilla one,
    (heads, 4 * out, in)."""
    return kernel.shape[2] == 4 * kernel.shape[1]


def _recurrent_weight(kernel: Tensor) -> Tensor:
    """To (gates, heads, in, out)."""
    if _is_cuda_kernel(kernel):
        return kernel.unflatten(2, (4, -1)).permute(2, 0, 1, 3)
    return kernel.unflatten(1, (4, -1)).permute(1, 0, 3, 2)


def _recurrent_bias(bias: Tensor, kernel: Tensor) -> Tensor:
    """To (gates, heads, units); flat, the CUDA backend has heads before gates, the vanilla one gates before heads."""
    heads = kernel.shape[0]
    return bias.view(heads, 4, -1).transpose(0, 1) if _is_cuda_kernel(kernel) else bias.view(4, heads, -1)


_CELL = "xlstm.slstm_cell"
_EVERY_BLOCK = {
    "norm.weight": ("xlstm_norm.weight",),
    "mixer.conv.weight": ("xlstm.conv1d.conv.weight",),
    "mixer.conv.bias": ("xlstm.conv1d.conv.bias",),
}
PAPER_NAMES = NameMap(
    outer={
        "embedding.weight": ("token_embedding.weight",),
        "final_norm.weight": (f"{STACK}post_blocks_norm.weight",),
        "head.weight": ("lm_head.weight",),
    },
    prefix=f"{STACK}blocks.",
    kinds={
        "mlstm_paper": _EVERY_BLOCK
        | {
            "mixer.up.weight": ("xlstm.proj_up.weight",),
            "mixer.query.weight": ("xlstm.q_proj.weight",),
            "mixer.key.weight": ("xlstm.k_proj.weight",),
            "mixer.value.weight": ("xlstm.v_proj.weight",),
            "mixer.gates.weight": ("xlstm.mlstm_cell.igate.weight", "xlstm.mlstm_cell.fgate.weight"),
            "mixer.gates.bias": ("xlstm.mlstm_cell.igate.bias", "xlstm.mlstm_cell.fgate.bias"),
            "mixer.head_norm.weight": ("xlstm.mlstm_cell.outnorm.weight",),
            "mixer.skip": ("xlstm.learnable_skip",),
            "mixer.down.weight": ("xlstm.proj_down.weight",),
        },
        "slstm": _EVERY_BLOCK
        | {
            # The layer's fgate arrives in the cell's input gate, and its igate in the cell's forget gate.
            "mixer.input_weight": tuple(f"xlstm.{gate}gate.weight" for gate in "fizo"),
            "mixer.recurrent_weight": (f"{_CELL}._recurrent_kernel_",),
            "mixer.bias": (f"{_CELL}._bias_",),
            "mixer.head_norm.weight": ("xlstm.group_norm.weight",),
            "feedforward_norm.weight": ("ffn_norm.weight",),
            "feedforward.gate_up.weight": ("ffn.proj_up.weight",),
            "feedforward.down.weight": ("ffn.proj_down.weight",),
        },
    },
)


def _paper_weight(name: str, parts: dict[str, list[Tensor]]) -> Tensor:
    """Our tensor of that name; `parts` holds theirs by our names."""
    theirs = parts[name]
    if name.endswith("norm.weight"):
        return _norm(*theirs)
    if name.endswith("mixer.conv.weight"):
        return theirs[0].squeeze(1)
    if name.endswith("mixer.input_weight"):
        return _input_weights(*theirs)
    if name.endswith("mixer.recurrent_weight"):
        return _recurrent_weight(*theirs)
    if name.endswith("mixer.bias"):
        return _recurrent_bias(*theirs, *parts[name.replace("mixer.bias", "mixer.recurrent_weight")])
    return torch.cat(theirs) if len(theirs) > 1 else theirs[0]


def _from_paper(values: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[XLSTMConfig, dict[str, Tensor]]:
    """xLSTMLMModel: the blocks of the first paper (arXiv 2405.04517)."""
    _check_paper_options(values)
    num_blocks = max(PAPER_NAMES.count_blocks(tensors), 1)
    kinds = [
        "slstm" if f"{STACK}blocks.{index}.{_CELL}._bias_" in tensors else "mlstm_paper" for index in range(num_blocks)
    ]
    flag = bool(values.get("tie_weights"))
    parts = PAPER_NAMES.select(tensors, kinds, flag, "the xlstm package's xLSTMLMModel")
    weights = {name: _paper_weight(name, parts) for name in parts}
    return _paper_config(kinds, weights, PAPER_NAMES.is_tied(flag, tensors)), weights


def _check_paper_options(values: dict[str, Any]) -> None:
    slstm = values.get("slstm_block") or {}
    allowed = {
        "slstm_block.feedforward.act_fn": ((slstm.get("feedforward") or {}).get("act_fn", "gelu"), "gelu"),
        "slstm_block.slstm.function": ((slstm.get("slstm") or {}).get("function", "slstm"), "slstm"),
    }
    for name, (value, expected) in allowed.items():
        if value != expected:
            raise ValueError(f"The configuration says {name}: {value}; xlstm-lm's slstm block has {expected}.")


def _paper_config(kinds: list[str], weights: dict[str, Tensor], tied: bool) -> XLSTMConfig:
    """The sizes of the blocks, each off the first of its kind."""
    vocab_size, width = weights["embedding.weight"].shape
    sizes: dict[str, Any] = {"conv_width": weights["blocks.0.mixer.conv.weight"].shape[1]}
    heads = {}
    if "mlstm_paper" in kinds:
        first = f"blocks.{kinds.index('mlstm_paper')}.mixer"
        heads["mLSTM"] = weights[f"{first}.gates.bias"].shape[0] // 2
        sizes["paper_qkv_block_size"] = weights[f"{first}.query.weight"].shape[2]
        sizes["paper_projection_factor"] = _factor(
            "an inner width", weights[f"{first}.down.weight"].shape[1], width, XLSTMConfig.paper_projection_factor
        )
    if "slstm" in kinds:
        first = f"blocks.{kinds.index('slstm')}"
        heads["sLSTM"] = weights[f"{first}.mixer.recurrent_weight"].shape[1]
        sizes["slstm_feedforward_factor"] = _factor(
            "a feed-forward width",
            weights[f"{first}.feedforward.down.weight"].shape[1],
            width,
            XLSTMConfig.slstm_feedforward_factor,
        )
    if len(set(heads.values())) > 1:
        raise ValueError(
            f"Its mLSTM blocks have {heads['mLSTM']} heads and its sLSTM blocks {heads['sLSTM']}; xlstm-lm has one "
            "num_heads for all blocks."
        )
    return XLSTMConfig(
        vocab_size=vocab_size,
        embedding_dim=width,
        num_blocks=len(kinds),
        num_heads=next(iter(heads.values())),
        pattern=kinds[0] if len(set(kinds)) == 1 else kinds,
        norm="layer",
        norm_eps=1e-5,
        gate_soft_cap=None,
        logit_soft_cap=None,
        tie_embeddings=tied,
        **sizes,
    )


def _factor(what: str, inner: int, width: int, usual: float) -> float:
    """The factor that gives `inner` from `width`, rounded up to a multiple of 64: the usual one where it does.

    Raises:
        ValueError: `inner` is no multiple of 64.
    """
    if inner % 64:
        raise ValueError(f"The model has {what} of {inner}; xlstm-lm's blocks have multiples of 64.")
    return usual if inner - 64 < usual * width <= inner else (inner - 32) / width
