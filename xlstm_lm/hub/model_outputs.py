"""The cache and the outputs of the transformers model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

OUTPUT_HAS_CACHE = hasattr(ModelOutput, "cache_params")
"""Whether transformers calls the cache of every output `cache`, as from 5.24 on. Before, ours is `cache_params`."""


class XLSTMLMCache:
    """Recurrent state of every block, of a size that does not depend on the tokens read.

    A model that is given a cache changes it. To continue one text in two ways, give it two copies (`copy.deepcopy`).
    """

    # Attributes that transformers reads before it generates.
    is_compileable = False
    is_croppable = False
    is_linear = (True,)

    def __init__(self) -> None:
        self.states: list[tuple[Tensor, ...]] | None = None
        self.num_tokens = 0

    def get_seq_length(self) -> int:
        """Tokens read so far, padding included."""
        return self.num_tokens

    def reorder(self, rows_B: Tensor) -> None:
        """Keep the states of `rows_B` (indices of rows), in that order."""
        if self.states is not None:
            self.states = [
                tuple(tensor.index_select(0, rows_B.to(tensor.device)) for tensor in state) for state in self.states
            ]


@dataclass
class XLSTMLMOutput(ModelOutput):
    """Hidden states (B, T, D) behind the final norm; the cache; on request the input of every block and the former."""

    last_hidden_state: Tensor | None = None
    if OUTPUT_HAS_CACHE:
        cache: XLSTMLMCache | None = None
    else:
        cache_params: XLSTMLMCache | None = None
        cache = property(lambda self: self.cache_params)
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class XLSTMLMCausalOutput(ModelOutput):
    """The loss, where labels were given; logits (B, T, V) in float32 at least; the rest as in `XLSTMLMOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    if OUTPUT_HAS_CACHE:
        cache: XLSTMLMCache | None = None
    else:
        cache_params: XLSTMLMCache | None = None
        cache = property(lambda self: self.cache_params)
    hidden_states: tuple[Tensor, ...] | None = None
