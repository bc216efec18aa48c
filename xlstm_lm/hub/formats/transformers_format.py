"""Export as transformers' own `xlstm` type, which holds stacks of xLSTM-7B's blocks and needs no code of ours."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from xlstm_lm.hub.formats.export_format import ExportFormat, NamedTensors
from xlstm_lm.hub.formats.transformers_layout import NAMES
from xlstm_lm.models.xlstm_config import XLSTMConfig


def _objections(config: XLSTMConfig) -> list[str]:
    """Everything that transformers' class cannot compute, or would compute differently without a word."""
    kinds = sorted(set(config.block_kinds()) - {"mlstm"})
    conditions = {
        f"it has mlstm blocks alone, and this model has {' and '.join(kinds)} blocks": bool(kinds),
        "it has one setting for all blocks, and model.mixers has sections": bool(config.mixers),
        "it has a head of its own, and model.tie_embeddings is true": config.tie_embeddings,
        f"its input gate is exponential, and model.input_gate is {config.input_gate}": config.input_gate != "exp",
        f"it has RMS norms, and model.norm is {config.norm}": config.norm != "rms",
        f"it has a layer norm behind its cells, and model.cell_norm is {config.cell_norm}": config.cell_norm != "layer",
        "it has a soft cap on the gates, and model.gate_soft_cap is null": config.gate_soft_cap is None,
        "it has a soft cap on the logits, and model.logit_soft_cap is null": config.logit_soft_cap is None,
    }
    if not kinds:
        mixer = config.mixer("mlstm")
        for name, width in (("queries and keys", mixer.qk_dim), ("values", mixer.v_dim)):
            conditions[f"its {name} have a multiple of 64 units, and these have {width}"] = width % 64 != 0
    return [reason for reason, applies in conditions.items() if applies]


def _make_config(config: XLSTMConfig) -> Any:
    with _without_the_xlstm_package():
        from transformers import xLSTMConfig

    # Their rounding goes down to the multiple below, ours up; a factor a little below meets this width by either.
    mixer = config.mixer("mlstm")
    hidden = mixer.feedforward().hidden
    multiple = math.gcd(hidden, 64)
    feedforward_factor = (hidden - (0.25 if multiple > 1 else 0.0)) / config.embedding_dim
    return xLSTMConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embedding_dim,
        embedding_dim=config.embedding_dim,
        num_hidden_layers=config.num_blocks,
        num_blocks=config.num_blocks,
        num_heads=config.num_heads,
        qk_dim_factor=_factor(mixer.qk_dim, config.embedding_dim),
        v_dim_factor=_factor(mixer.v_dim, config.embedding_dim),
        ffn_proj_factor=feedforward_factor,
        ffn_round_up_to_multiple_of=multiple,
        gate_soft_cap=config.gate_soft_cap,
        output_logit_soft_cap=config.logit_soft_cap,
        norm_eps=config.norm_eps,
        eps=config.cell_eps,
        # The names that need no other package; the state and what goes into it in float32.
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        mode="inference",
        chunk_size=config.chunk_length or 64,
        autocast_kernel_dtype="float32",
        inference_state_dtype="float32",
        weight_mode="single",
        tie_word_embeddings=False,
        architectures=["xLSTMForCausalLM"],
        dtype="float32",
    )


def _factor(inner: int, width: int) -> float:
    """The factor that `int(width * factor)` makes `inner` of."""
    factor = inner / width
    return factor if int(width * factor) == inner else math.nextafter(factor, math.inf)


def _model_class() -> type:
    with _without_the_xlstm_package():
        from transformers import xLSTMForCausalLM

    return xLSTMForCausalLM


def _convert(config: XLSTMConfig, weights: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Ours side by side in one tensor become theirs, one for each projection."""
    mixer = config.mixer("mlstm")
    qkvo = [mixer.qk_dim, mixer.qk_dim, mixer.v_dim, mixer.v_dim]
    return NAMES.split(weights, lambda name: qkvo if name == "mixer.qkvo.weight" else None, "single")


@contextlib.contextmanager
def _without_the_xlstm_package() -> Iterator[None]:
    """Import transformers' own implementation: with the `xlstm` package there it would want that one's kernels."""
    import transformers.utils

    available = transformers.utils.is_xlstm_available
    transformers.utils.is_xlstm_available = lambda: False
    try:
        yield
    finally:
        transformers.utils.is_xlstm_available = available


def _obstacle() -> str | None:
    if not importlib.util.find_spec("xlstm") or importlib.util.find_spec("mlstm_kernels"):
        return None
    return (
        "transformers does not load this format in this environment, because the package xlstm is installed without "
        "mlstm_kernels, which it then needs; run pip uninstall xlstm, or export with --format xlstm_lm. Elsewhere the "
        "export loads, and xlstm-lm itself reads it anywhere."
    )


TRANSFORMERS_FORMAT = ExportFormat(
    name="transformers",
    suits="loading with nothing but transformers, and generating from single prompts or prompts of one length",
    limits=(
        "It ignores the attention mask: prompts padded on the left give wrong text, without a word.",
        "Beam search needs `use_cache=False`.",
        "In bf16, from 64 tokens on, it runs with a cache only.",
        "Training needs `use_cache=False`.",
    ),
    objections=_objections,
    make_config=_make_config,
    model_class=_model_class,
    convert=_convert,
    write_code=None,
    leaves_out_padding=False,
    obstacle=_obstacle,
)
