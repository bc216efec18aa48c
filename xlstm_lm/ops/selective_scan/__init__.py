"""Mamba-1's selective scan: the definition, and a compiled form for the CPU."""

from xlstm_lm.ops.selective_scan.dispatch import selective_scan
from xlstm_lm.ops.selective_scan.operation import SCAN

__all__ = ["SCAN", "selective_scan"]
