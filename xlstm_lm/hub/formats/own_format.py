"""Our own format: any xLSTM as a transformers model that brings its source along."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from xlstm_lm.hub.bundle import write_code
from xlstm_lm.hub.formats.export_format import ExportFormat, NamedTensors
from xlstm_lm.hub.formats.name_map import PrefixMap
from xlstm_lm.models import with_free_backends
from xlstm_lm.models.xlstm_config import XLSTMConfig

MODEL_TYPE = "xlstm_lm"
"""`model_type` in config.json."""
NAMES = PrefixMap("model.", {"head.weight": "lm_head.weight"})
_AUTO_MAP = {
    "AutoConfig": "configuration_xlstm_lm.XLSTMLMConfig",
    "AutoModel": "modeling_xlstm_lm.XLSTMLMModel",
    "AutoModelForCausalLM": "modeling_xlstm_lm.XLSTMLMForCausalLM",
}


def from_export(values: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of our configuration and our weights for the `config.json` and the tensors of such a folder."""
    fields = {field.name for field in dataclasses.fields(XLSTMConfig)}
    weights = {NAMES.from_(name): tensor for name, tensor in tensors.items()}
    return {name: value for name, value in values.items() if name in fields}, weights


def _convert(config: XLSTMConfig, weights: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    del config
    return ((NAMES.to(name), tensor) for name, tensor in weights)


def _make_config(config: XLSTMConfig) -> Any:
    from xlstm_lm.hub.configuration_xlstm_lm import XLSTMLMConfig

    values = with_free_backends(dataclasses.asdict(config))
    made = XLSTMLMConfig(**values, architectures=["XLSTMLMForCausalLM"], dtype="float32")
    made.auto_map = _AUTO_MAP
    return made


def _model_class() -> type:
    from xlstm_lm.hub.modeling_xlstm_lm import XLSTMLMForCausalLM

    return XLSTMLMForCausalLM


OWN_FORMAT = ExportFormat(
    name="xlstm_lm",
    suits="every use: batched generation with padding, beam search, fine-tuning, bf16, any length and any width",
    limits=(
        "It needs `trust_remote_code=True`, or xlstm-lm installed and `import xlstm_lm.hub`.",
        "Assisted generation is not possible: a recurrent state cannot be rolled back.",
    ),
    objections=lambda config: [],
    make_config=_make_config,
    model_class=_model_class,
    convert=_convert,
    write_code=write_code,
    leaves_out_padding=True,
)
