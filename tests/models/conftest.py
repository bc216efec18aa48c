"""With the `xlstm` package there, transformers would run its kernels; the oracle is transformers' own code."""

import transformers.utils

transformers.utils.is_xlstm_available = lambda: False
