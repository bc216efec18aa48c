"""The causal convolution in front of the cells' gates: the definition, and a compiled form for the CPU."""

from xlstm_lm.ops.conv.dispatch import BACKENDS, causal_conv, choose_backend

__all__ = ["BACKENDS", "causal_conv", "choose_backend"]
