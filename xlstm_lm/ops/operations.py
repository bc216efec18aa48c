"""The table of all operations."""

from __future__ import annotations

from xlstm_lm.ops.attention import ATTENTION
from xlstm_lm.ops.conv import CONV
from xlstm_lm.ops.gated_delta import GATED_DELTA
from xlstm_lm.ops.loss_operation import LOSS
from xlstm_lm.ops.mlstm import MLSTM
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.selective_scan import SCAN
from xlstm_lm.ops.slstm import SLSTM
from xlstm_lm.ops.ssd import SSD

OPERATIONS: dict[str, Operation] = {
    each.name: each for each in (MLSTM, SLSTM, CONV, SCAN, SSD, GATED_DELTA, ATTENTION, LOSS)
}
"""Every operation by its name. Its backends are imported on first use."""
