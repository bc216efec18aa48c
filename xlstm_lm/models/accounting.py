"""The one place that counts: parameters, floating-point operations, and bytes of recurrent state."""

from __future__ import annotations

from pathlib import Path

import torch

from xlstm_lm.models import FAMILIES
from xlstm_lm.models.xlstm_config import XLSTMConfig

DEFAULT_CHUNK_LENGTH = 64  # for the count alone, where the configuration leaves the chunk length to the kernel


def model_config(yaml_path_or_config: str | Path | XLSTMConfig) -> XLSTMConfig:
    """The model configuration itself, or that of a recipe's `model` section.

    Raises:
        ValueError: the recipe cannot be read, has no model section, or names an unknown family or key.
    """
    if not isinstance(yaml_path_or_config, (str, Path)):
        return yaml_path_or_config
    from xlstm_lm.recipe import read_recipe  # here, for the models need torch alone

    values, _ = read_recipe(yaml_path_or_config)
    if "model" not in values:
        raise ValueError(f"{yaml_path_or_config} has no section 'model'; it has {', '.join(values) or 'none'}.")
    family = values["model"].get("family", "xlstm")
    if family not in FAMILIES:
        raise ValueError(f"{yaml_path_or_config}: model.family is {family!r}; the families are {', '.join(FAMILIES)}.")
    config_class = FAMILIES[family][0]
    unknown = set(values["model"]) - set(config_class.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{yaml_path_or_config}: model has no field {', '.join(sorted(unknown))}.")
    return config_class(**values["model"])


def count_parameters(yaml_path_or_config: str | Path | XLSTMConfig) -> int:
    """Exact number of parameters, a tied head counted once. Allocates no memory for them."""
    config = model_config(yaml_path_or_config)
    with torch.device("meta"):
        model = FAMILIES[config.family][1](config)
    return sum(parameter.numel() for parameter in model.parameters())


def training_flops_per_token(config: XLSTMConfig, context_length: int) -> float:
    """Floating-point operations of forward and backward for one token of a row of `context_length` tokens.

    A product of (m, k) and (k, n) counts 2 m k n, the backward twice the forward. Counted are all projections,
    convolutions and the logits; not embedding look-ups, norms, activations, skips and soft caps. The cells, for a
    token and a head:

    * mLSTM, chunks of L (at most the context): 2 L (K + V) / 2 for the causal half of Q K^T and W V; 4 K V to read C
      and to write it; 4 K for the normalizer and 4 L for gates and row sums within the chunk.
    * sLSTM, D units: 8 D^2 for the recurrent products and 20 D for the gates and states.
    """
    width, heads = config.embedding_dim, config.num_heads
    chunk = min(config.chunk_length or DEFAULT_CHUNK_LENGTH, context_length)

    def mlstm_cell(qk_dim: int, v_dim: int) -> int:
        k, v = qk_dim // heads, v_dim // heads
        return heads * (chunk * (k + v) + 4 * k * v + 4 * k + 4 * chunk)

    inner, convolution = config.paper_inner_dim, 2 * config.conv_width
    head_dim = width // heads
    forward = {
        "mlstm": 2 * width * (2 * config.qk_dim + 2 * config.v_dim + 2 * heads)
        + mlstm_cell(config.qk_dim, config.v_dim)
        + 2 * config.v_dim * width
        + 6 * width * config.mlstm_feedforward_dim,
        "mlstm_paper": 2 * width * 2 * inner
        + convolution * inner
        + 3 * 2 * inner * config.paper_qkv_block_size
        + 2 * 3 * inner * 2 * heads
        + mlstm_cell(inner, inner)
        + 2 * inner * width,
        "slstm": convolution * width
        + 2 * 4 * width * head_dim
        + heads * (8 * head_dim**2 + 20 * head_dim)
        + 6 * width * config.slstm_feedforward_dim,
    }
    blocks = sum(forward[kind] for kind in config.block_kinds())
    return 3.0 * (blocks + 2 * width * config.vocab_size)


def state_bytes(config: XLSTMConfig, bytes_per_activation: int = 2) -> int:
    """Bytes of the recurrent state of one sequence, whatever its length: cell states in float32, the inputs that the
    convolutions remember in `bytes_per_activation`."""
    heads, width, inner = config.num_heads, config.embedding_dim, config.paper_inner_dim
    remembered = (config.conv_width - 1) * bytes_per_activation
    state = {
        "mlstm": 4 * (config.qk_dim * config.v_dim // heads + config.qk_dim + heads),
        "mlstm_paper": 4 * (inner * inner // heads + inner + heads) + remembered * inner,
        "slstm": 4 * 4 * width + remembered * width,
    }
    return sum(state[kind] for kind in config.block_kinds())
