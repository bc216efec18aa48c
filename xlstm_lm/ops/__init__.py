"""Pure functions on tensors: the cells, the causal convolution and the loss. They import nothing else of ours."""

from xlstm_lm.ops.build_cache import use_node_local_caches

use_node_local_caches()  # before anything imports Triton
