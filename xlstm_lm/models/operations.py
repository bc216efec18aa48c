"""The operations that a model calls, with their sizes and options."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from xlstm_lm.models.mamba import MambaConfig
from xlstm_lm.models.transformer import TransformerConfig
from xlstm_lm.models.xlstm_config import XLSTMConfig
from xlstm_lm.ops.attention import ATTENTION
from xlstm_lm.ops.conv import CONV
from xlstm_lm.ops.mlstm import MLSTM
from xlstm_lm.ops.mlstm.operation import options_of
from xlstm_lm.ops.operation import Call, Operation, make_call
from xlstm_lm.ops.selective_scan import SCAN
from xlstm_lm.ops.slstm import SLSTM
from xlstm_lm.ops.ssd import SSD


class OperationUse(NamedTuple):
    """One operation of a model at one set of sizes."""

    operation: Operation
    sizes: dict[str, int]
    options: Hashable = ()
    backend: str = "auto"
    """The backend that the configuration names."""

    def call(self, device: torch.device, dtype: torch.dtype) -> Call:
        """The call in training: with gradient, over rows of several documents."""
        return make_call(device, dtype, self.sizes, self.options)


def operations_of(config: Any, micro_rows: int) -> list[OperationUse]:
    """The operations that a model calls for `micro_rows` rows; none for models on kernels of torch alone."""
    if isinstance(config, XLSTMConfig):
        return _xlstm_operations(config, micro_rows)
    if isinstance(config, MambaConfig):
        return _mamba_operations(config)
    if isinstance(config, TransformerConfig):
        return [OperationUse(ATTENTION, {}, options=rows) for rows in ("long", "short")]
    return []


def _xlstm_operations(config: XLSTMConfig, micro_rows: int) -> list[OperationUse]:
    kinds, heads, width = set(config.block_kinds()), config.num_heads, config.embedding_dim
    inner = config.paper_inner_dim
    uses = []
    options = options_of(config.input_gate, True, config.chunk_length, config.cell_eps)
    for kind, (qk_dim, v_dim) in {"mlstm": (config.qk_dim, config.v_dim), "mlstm_paper": (inner, inner)}.items():
        if kind in kinds:
            sizes = {"K": qk_dim // heads, "V": v_dim // heads}
            uses.append(OperationUse(MLSTM, sizes, options, config.mlstm_backend))
    if "slstm" in kinds:
        sizes = {"B": micro_rows, "H": heads, "D": width // heads}
        uses.append(OperationUse(SLSTM, sizes, backend=config.slstm_backend))
    convolutions = {channels for kind, channels in (("slstm", width), ("mlstm_paper", inner)) if kind in kinds}
    return uses + [OperationUse(CONV, {"D": channels, "W": config.conv_width}) for channels in sorted(convolutions)]


def _mamba_operations(config: MambaConfig) -> list[OperationUse]:
    channels = config.inner_dim
    if config.version == 1:
        scan = OperationUse(SCAN, {"N": config.states}, backend=config.scan_backend)
    else:
        channels += 2 * config.num_groups * config.states
        sizes = {"P": config.head_dim, "N": config.states, "G": min(config.num_groups, 2)}
        scan = OperationUse(SSD, sizes, backend=config.scan_backend)
    return [scan, OperationUse(CONV, {"D": channels, "W": config.conv_width})]
