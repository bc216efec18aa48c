"""Training: one loop, and the parts it is made of."""

from __future__ import annotations

import logging

# DeepSpeed warns of a machine without a GPU at import, before its own settings can be reached.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
