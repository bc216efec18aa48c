"""Pure functions on tensors: the cells, attention, the causal convolution and the loss; on top of `xlstm_lm.base`."""

from xlstm_lm.ops.build_cache import use_node_local_caches

use_node_local_caches()  # before anything imports Triton
