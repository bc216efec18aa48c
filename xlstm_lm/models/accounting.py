"""The one place that counts: parameters, floating-point operations, and bytes of recurrent state."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from xlstm_lm.models import FAMILIES, LSTMConfig, MambaConfig, ModelConfig, TransformerConfig, XLSTMConfig
from xlstm_lm.models.lstm import GATES

DEFAULT_CHUNK_LENGTH = 64  # for the count alone, where the configuration leaves the chunk length to the kernel


def model_config(yaml_path_or_config: str | Path | ModelConfig) -> ModelConfig:
    """The model configuration itself, or that of a recipe's `model` section.

    Raises:
        ValueError: the recipe cannot be read, has no model section, or names an unknown family or key.
    """
    if not isinstance(yaml_path_or_config, (str, Path)):
        return yaml_path_or_config
    from xlstm_lm.base.recipe import read_recipe  # here, for the models need torch alone

    values, _ = read_recipe(yaml_path_or_config)
    if "model" not in values:
        raise ValueError(f"{yaml_path_or_config} has no section 'model'; it has {', '.join(values) or 'none'}.")
    if not isinstance(values["model"], dict):
        raise ValueError(f"{yaml_path_or_config}: model is {values['model']!r}; it must be a section with fields.")
    family = values["model"].get("family", "xlstm")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{yaml_path_or_config}: model.family is {family!r}; the families are {', '.join(FAMILIES)}.")
    config_class = FAMILIES[family][0]
    unknown = set(values["model"]) - set(config_class.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{yaml_path_or_config}: model has no field {', '.join(sorted(unknown))}.")
    return config_class(**values["model"])


def count_parameters(yaml_path_or_config: str | Path | ModelConfig) -> int:
    """Exact number of parameters, a tied head counted once. Allocates no memory for them.

    Blocks of a kind are alike, from the second on, so that models of one and two blocks tell the size of any.
    """
    config = model_config(yaml_path_or_config)
    if not isinstance(config, XLSTMConfig):
        one, two = (_count_as_built(replace(config, num_blocks=blocks)) for blocks in (1, 2))
        return one + (config.num_blocks - 1) * (two - one)
    kinds, total, around_blocks = Counter(config.block_kinds()), 0, 0
    for kind, blocks in kinds.items():
        small = (replace(config, pattern=[kind] * blocks, num_blocks=blocks, slstm_positions=None) for blocks in (1, 2))
        one, two = map(_count_as_built, small)
        total += blocks * (two - one)
        around_blocks = 2 * one - two
    return total + around_blocks


def _count_as_built(config: ModelConfig) -> int:
    return sum(shape.numel() for shape in parameter_shapes(config).values())


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of each parameter by its name, a tied head once. Allocates no memory for them."""
    with torch.device("meta"):
        model = FAMILIES[config.family][1](config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def training_flops_per_token(config: ModelConfig, context_length: int) -> float:
    """Floating-point operations of forward and backward for one token of a row of `context_length` tokens.

    A product of (m, k) and (k, n) counts 2 m k n, the backward twice the forward. Counted are all projections,
    convolutions and the logits; not embedding look-ups, norms, activations, skips and soft caps. What mixes tokens, for
    a token and a head:

    * mLSTM, chunks of L (at most the context): 2 L (K + V) / 2 for the causal half of Q K^T and W V; 4 K V to read C
      and to write it; 4 K for the normalizer and 4 L for gates and row sums within the chunk.
    * sLSTM, D units: 8 D^2 for the recurrent products and 20 D for the gates and states.
    * attention: 4 T K / 2 for the causal half of Q K^T and W V, whatever documents lie in the row.
    * Mamba-2: as the mLSTM with K = states and V = head, without normalizer.
    * Mamba-1, a unit: 9 N for N states: decay, update and output.
    * LSTM, GRU and plain recurrence: their matrices; 20 for each unit's gates.
    """
    forward = _FORWARD_FLOPS[config.family](config, context_length)
    head_width = config.width if isinstance(config, LSTMConfig) else config.embedding_dim
    return 3.0 * (forward + 2 * head_width * config.vocab_size)


def _linear_attention_flops(chunk: int, heads: int, K: int, V: int) -> int:
    return heads * (chunk * (K + V) + 4 * K * V + 4 * chunk)


def _xlstm_flops(config: XLSTMConfig, context_length: int) -> int:
    width, heads = config.embedding_dim, config.num_heads
    chunk = min(config.chunk_length or DEFAULT_CHUNK_LENGTH, context_length)

    def mlstm_cell(qk_dim: int, v_dim: int) -> int:
        return _linear_attention_flops(chunk, heads, qk_dim // heads, v_dim // heads) + 4 * qk_dim

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
    return sum(forward[kind] for kind in config.block_kinds())


def _transformer_flops(config: TransformerConfig, context_length: int) -> int:
    width = config.embedding_dim
    projections = 2 * width * (2 * width + 2 * config.key_value_heads * config.head_dim)
    return config.num_blocks * (projections + 2 * context_length * width + 6 * width * config.hidden_dim)


def _mamba_flops(config: MambaConfig, context_length: int) -> int:
    width, inner, N = config.embedding_dim, config.inner_dim, config.states
    if config.version == 1:
        block = 2 * width * 2 * inner + 2 * config.conv_width * inner + 2 * inner * (config.rank + 2 * N)
        block += 2 * config.rank * inner + 9 * inner * N
    else:
        chunk = min(DEFAULT_CHUNK_LENGTH, context_length)
        convolved = inner + 2 * config.num_groups * N
        block = 2 * width * (inner + convolved + config.num_heads) + 2 * config.conv_width * convolved
        block += _linear_attention_flops(chunk, config.num_heads, N, config.head_dim)
    return config.num_blocks * (block + 2 * inner * width)


def _lstm_flops(config: LSTMConfig, context_length: int) -> int:
    del context_length
    inputs = config.embedding_dim + (config.num_blocks - 1) * config.width
    matrices = GATES[config.cell] * config.width * (inputs + config.num_blocks * config.width)
    return 2 * matrices + 20 * config.num_blocks * config.width


_FORWARD_FLOPS = {
    "xlstm": _xlstm_flops,
    "transformer": _transformer_flops,
    "mamba": _mamba_flops,
    "lstm": _lstm_flops,
}


def state_bytes(config: ModelConfig, bytes_per_activation: int = 2, context_length: int = 0) -> int:
    """Bytes of what one sequence of `context_length` tokens leaves behind for the next: cell states in float32; the
    inputs that convolutions remember, an LSTM's state and keys and values in `bytes_per_activation`.

    Only a transformer's depends on the length.
    """
    if isinstance(config, TransformerConfig):
        cached = 2 * config.key_value_heads * config.head_dim * bytes_per_activation
        return config.num_blocks * cached * context_length
    if isinstance(config, LSTMConfig):
        parts = 2 if config.cell == "lstm" else 1
        return config.num_blocks * parts * config.width * bytes_per_activation
    remembered = (config.conv_width - 1) * bytes_per_activation
    if isinstance(config, MambaConfig):
        inner, N = config.inner_dim, config.states
        convolved = inner if config.version == 1 else inner + 2 * config.num_groups * N
        return config.num_blocks * (4 * inner * N + remembered * convolved)
    heads, width, inner = config.num_heads, config.embedding_dim, config.paper_inner_dim
    state = {
        "mlstm": 4 * (config.qk_dim * config.v_dim // heads + config.qk_dim + heads),
        "mlstm_paper": 4 * (inner * inner // heads + inner + heads) + remembered * inner,
        "slstm": 4 * 4 * width + remembered * width,
    }
    return sum(state[kind] for kind in config.block_kinds())
