"""The baselines as transformers' own types: Llama, Mamba and Mamba-2, written and read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlstm_lm.hub.formats.export_format import ExportFormat, NamedTensors
from xlstm_lm.hub.formats.name_map import NameMap, Table, count_blocks, joined
from xlstm_lm.models import MambaConfig, TransformerConfig

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Type:
    """One of transformers' types, in terms of ours."""

    name: str
    """Name in messages."""
    names: NameMap
    """Names of its tensors; all blocks are of one kind."""
    sizes: Callable[[Any, str], list[int] | None]
    """Rows of each of theirs, where they are not all the same, for our configuration and name within a block."""
    make_config: Callable[[Any], Any]
    """Their configuration for ours."""
    tied_by_default: bool
    """Whether the head of a folder from the type's first releases is tied where `tie_word_embeddings` is missing."""
    foreign: Callable[[dict[str, Any]], dict[str, Any]]
    """Fields of a `config.json` that change the computation -> true where ours cannot compute their value."""
    read_config: Callable[[dict[str, Any], Weights, bool], Any]
    """Ours for the values of theirs and our weights, the head being tied or not."""


def _llama_config(config: TransformerConfig) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embedding_dim,
        intermediate_size=config.mixer.feedforward().hidden,
        num_hidden_layers=config.num_blocks,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.mixer.key_value_heads,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def _from_llama(values: dict[str, Any], weights: Weights, tied: bool) -> TransformerConfig:
    width = weights["embedding.weight"].shape[1]
    num_heads = values.get("num_attention_heads", 32)
    _refuse("Llama", values, {"head_dim": (values.get("head_dim") or 0) * num_heads not in (0, width)})
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    return TransformerConfig(
        vocab_size=weights["embedding.weight"].shape[0],
        embedding_dim=width,
        num_blocks=count_blocks(weights),
        num_heads=num_heads,
        num_key_value_heads=values.get("num_key_value_heads"),
        feedforward_dim=weights["blocks.0.feedforward.down.weight"].shape[1],
        rope_theta=rope.get("rope_theta") or values.get("rope_theta") or 10000.0,
        norm_eps=values.get("rms_norm_eps", 1e-6),
        tie_embeddings=tied,
    )


def _foreign_to_llama(values: dict[str, Any]) -> dict[str, Any]:
    layers = values.get("layer_types") or []
    return {
        "hidden_act": values.get("hidden_act", "silu") not in _SILU,
        "attention_bias": values.get("attention_bias"),
        "mlp_bias": values.get("mlp_bias"),
        "rope_parameters": not _is_plain_rope(values.get("rope_parameters") or {}),
        "rope_scaling": not _is_plain_rope(values.get("rope_scaling") or {}),  # the same before transformers 5
        "partial_rotary_factor": values.get("partial_rotary_factor") not in (None, 1),
        "sliding_window": values.get("sliding_window") and values.get("use_sliding_window", True),
        "layer_types": any(layer != "full_attention" for layer in layers),
    }


def _is_plain_rope(rope: Any) -> bool:
    """Whether rotary positions are those of the first Llama: all units turned, positions and wavelengths unscaled.

    Before transformers 4.43 the field `rope_type` was called `type`; folders since then may have both.
    """
    if not isinstance(rope, dict):
        return False
    kinds = {rope[name] for name in ("rope_type", "type") if rope.get(name) is not None}
    unscaled = rope.get("factor") in (None, 1)
    partial = rope.get("partial_rotary_factor") not in (None, 1)
    if not kinds:
        return not partial and unscaled and rope.keys() <= {"rope_type", "type", "rope_theta", "factor"}
    return not partial and (kinds == {"default"} or (kinds == {"linear"} and unscaled))


def _mamba_config(config: MambaConfig) -> Any:
    from transformers import Mamba2Config as TheirMamba2Config
    from transformers import MambaConfig as TheirMamba1Config

    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embedding_dim,
        "num_hidden_layers": config.num_blocks,
        "state_size": config.mixer.state_dim,
        "expand": config.expand,
        "conv_kernel": config.conv_width,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.initializer_range,
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": False,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": "float32",
    }
    if config.version == 1:
        return TheirMamba1Config(**shared, time_step_rank=config.mixer.rank, architectures=["MambaForCausalLM"])
    return TheirMamba2Config(
        **shared,
        num_heads=config.mixer.num_heads,
        head_dim=config.head_dim,
        n_groups=config.num_groups,
        architectures=["Mamba2ForCausalLM"],
    )


def _from_mamba(version: int) -> Callable[[dict[str, Any], Weights, bool], MambaConfig]:
    def read(values: dict[str, Any], weights: Weights, tied: bool) -> MambaConfig:
        width = weights["embedding.weight"].shape[1]
        inner = weights["blocks.0.mixer.out.weight"].shape[1]
        _refuse(f"Mamba-{version}", values, {"expand": inner % width})
        of_version = {
            1: {"step_rank": weights[_STEP].shape[1] if _STEP in weights else None},
            2: {"head_dim": values.get("head_dim", 64), "num_groups": values.get("n_groups", 8)},
        }
        return MambaConfig(
            version=version,
            vocab_size=weights["embedding.weight"].shape[0],
            embedding_dim=width,
            num_blocks=count_blocks(weights),
            expand=inner // width,
            state_dim=values.get("state_size", 16 if version == 1 else 128),
            conv_width=weights["blocks.0.mixer.conv.weight"].shape[1],
            norm_eps=values.get("layer_norm_epsilon", 1e-5),
            tie_embeddings=tied,
            **of_version[version],
        )

    return read


_STEP, _CONV = "blocks.0.mixer.step.weight", "mixer.conv.weight"
_SILU = ("silu", "swish")  # two names for one function


def _foreign_to_mamba(values: dict[str, Any]) -> dict[str, Any]:
    # transformers writes {"__float__": "Infinity"} for what JSON has no number for.
    smallest, largest = (
        float(each["__float__"]) if isinstance(each, dict) else each
        for each in values.get("time_step_limit") or (0.0, math.inf)
    )
    return {
        "hidden_act": values.get("hidden_act", "silu") not in _SILU,
        "use_bias": values.get("use_bias"),
        "use_conv_bias": not values.get("use_conv_bias", True),
        # Of Mamba-2 alone. (norm_before_gate, true in every folder of 2024, is ignored by transformers as well.)
        "time_step_limit": smallest > 0 or largest != math.inf,
        "rms_norm": not values.get("rms_norm", True),
    }


def _refuse(name: str, values: dict[str, Any], unknown: dict[str, Any]) -> None:
    found = [f"{field} {values.get(field)!r}" for field, differs in unknown.items() if differs]
    if found:
        raise ValueError(f"config.json says {', '.join(found)}, which the {name} of xlstm-lm does not have.")


def _llama_sizes(config: TransformerConfig, name: str) -> list[int] | None:
    shared = config.mixer.key_value_heads * config.mixer.head_dim
    return [config.embedding_dim, shared, shared] if name == "mixer.qkv.weight" else None


_MAMBA_OUTER = {
    "embedding.weight": ("backbone.embeddings.weight",),
    "final_norm.weight": ("backbone.norm_f.weight",),
    "head.weight": ("lm_head.weight",),
}
_MAMBA_BLOCK = {
    "norm.weight": ("norm.weight",),
    "mixer.input.weight": ("mixer.in_proj.weight",),
    "mixer.conv.weight": ("mixer.conv1d.weight",),
    "mixer.conv.bias": ("mixer.conv1d.bias",),
    "mixer.log_decay": ("mixer.A_log",),
    "mixer.skip": ("mixer.D",),
    "mixer.out.weight": ("mixer.out_proj.weight",),
}


def _mamba_names(of_version: Table) -> NameMap:
    return NameMap(_MAMBA_OUTER, "backbone.layers.", {"": _MAMBA_BLOCK | of_version})


LLAMA = Type(
    name="Llama",
    names=NameMap(
        outer={
            "embedding.weight": ("model.embed_tokens.weight",),
            "final_norm.weight": ("model.norm.weight",),
            "head.weight": ("lm_head.weight",),
        },
        prefix="model.layers.",
        kinds={
            "": {
                "norm.weight": ("input_layernorm.weight",),
                "mixer.qkv.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
                "mixer.out.weight": ("self_attn.o_proj.weight",),
                "feedforward_norm.weight": ("post_attention_layernorm.weight",),
                "feedforward.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
                "feedforward.down.weight": ("mlp.down_proj.weight",),
            }
        },
    ),
    sizes=_llama_sizes,
    make_config=_llama_config,
    tied_by_default=False,
    foreign=_foreign_to_llama,
    read_config=_from_llama,
)
MAMBA1 = Type(
    name="Mamba",
    names=_mamba_names(
        {
            "mixer.selection.weight": ("mixer.x_proj.weight",),
            "mixer.step.weight": ("mixer.dt_proj.weight",),
            "mixer.step.bias": ("mixer.dt_proj.bias",),
        }
    ),
    sizes=lambda config, name: None,
    make_config=_mamba_config,
    tied_by_default=True,
    foreign=lambda values: _foreign_to_mamba(values | {"time_step_limit": None}),
    read_config=_from_mamba(1),
)
MAMBA2 = Type(
    name="Mamba-2",
    names=_mamba_names({"mixer.step_bias": ("mixer.dt_bias",), "mixer.norm_weight": ("mixer.norm.weight",)}),
    sizes=lambda config, name: None,
    make_config=_mamba_config,
    tied_by_default=False,
    foreign=_foreign_to_mamba,
    read_config=_from_mamba(2),
)


def type_of(config: TransformerConfig | MambaConfig) -> Type:
    """The type that holds models of a configuration."""
    if isinstance(config, TransformerConfig):
        return LLAMA
    return MAMBA1 if config.version == 1 else MAMBA2


def convert(config: TransformerConfig | MambaConfig, weights: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors for ours, one of ours after the other."""
    theirs = type_of(config)
    # Theirs has a dimension for the one channel of a group.
    shaped = ((name, tensor.unsqueeze(1) if name.endswith(_CONV) else tensor) for name, tensor in weights)
    return theirs.names.split(shaped, lambda name: theirs.sizes(config, name))


def reader(theirs: Type) -> Callable[[dict[str, Any], Weights], tuple[Any, Weights]]:
    """Reader of our configuration and weights from the `config.json` and the tensors of a type.

    It raises ValueError where tensors are missing or left over, all named, or where the configuration has a feature
    that our model lacks.
    """

    def read(values: dict[str, Any], tensors: Weights) -> tuple[Any, Weights]:
        _refuse(theirs.name, values, theirs.foreign(values))
        flag = values.get("tie_word_embeddings")
        flag = theirs.tied_by_default if flag is None else flag
        kinds = [""] * max(theirs.names.count_blocks(tensors), 1)
        parts = theirs.names.select(tensors, kinds, flag, f"a transformers {theirs.name} model")
        weights = joined(parts)
        weights |= {name: tensor.squeeze(1) for name, tensor in weights.items() if name.endswith(_CONV)}
        return theirs.read_config(values, weights, theirs.names.is_tied(flag, tensors)), weights

    return read


def _model_class() -> Callable[[Any], torch.nn.Module]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config


BASELINE_FORMAT = ExportFormat(
    name="transformers",
    suits="every use; it is transformers' own type",
    limits=(),
    objections=lambda config: [
        *(["its logits have no soft cap (model.logit_soft_cap)"] if config.logit_soft_cap is not None else []),
        *(["its attention has no window (model.window)"] if getattr(config, "window", None) else []),
    ],
    make_config=lambda config: type_of(config).make_config(config),
    model_class=_model_class,
    convert=convert,
    write_code=None,
    leaves_out_padding=True,
)
BASELINE_READERS = {"llama": reader(LLAMA), "mamba": reader(MAMBA1), "mamba2": reader(MAMBA2)}
"""`model_type` in config.json -> reader."""
