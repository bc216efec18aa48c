"""Pure functions on tensors: the cells, the causal convolution and the loss. They import nothing else of ours."""
