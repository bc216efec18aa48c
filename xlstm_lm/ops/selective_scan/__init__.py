"""Mamba-1's selective scan: the definition, and a compiled form for the CPU."""

from xlstm_lm.ops.selective_scan.dispatch import BACKENDS, choose_backend, selective_scan

__all__ = ["BACKENDS", "choose_backend", "selective_scan"]
