"""The causal convolution in front of the cells' gates: the definition, and a compiled form for the CPU."""

from xlstm_lm.ops.conv.dispatch import causal_conv, last_inputs
from xlstm_lm.ops.conv.operation import CONV

__all__ = ["CONV", "causal_conv", "last_inputs"]
