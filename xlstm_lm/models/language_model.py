"""What the model families share: embedding, residual blocks, final norm, head and loss, and the walk through them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xlstm_lm.models.layers import soft_cap
from xlstm_lm.ops.loss import linear_cross_entropy

State = tuple[Tensor, ...]
"""What a block remembers after the last token."""


class LanguageModel(nn.Module):
    """Tokens to hidden states, hidden states to logits or loss. Weights are uninitialised until `init_weights`.

    A block maps (x_BTD, context, state, return_state, **extras) to (x_BTD, state), where `context` is what
    `make_context` says of the rows, by default where documents start.
    """

    def __init__(self, config: Any, blocks: Iterable[nn.Module], final_norm: nn.Module, width: int) -> None:
        """`config` has vocab_size, embedding_dim, tie_embeddings and logit_soft_cap; `width` is that of the head."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.activation_checkpointing = False

    def make_context(self, tokens_BT: Tensor, resets_BT: Tensor | None, state: list[State] | None) -> Any:
        """What every block is told of the rows."""
        del state
        return None if resets_BT is None else resets_BT.to(tokens_BT.device, non_blocking=True)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """What the first block sees: (B, T, D)."""
        return self.embedding(tokens_BT)

    def forward(
        self,
        tokens_BT: Tensor,
        resets_BT: Tensor | None = None,
        state: list[State] | None = None,
        return_state: bool = False,
        **extras: Any,
    ) -> Tensor | tuple[Tensor, list[State]]:
        """Hidden states (B, T, D) behind the final norm and, on request, the state after the last token.

        Where `resets_BT` is true a document starts: nothing before it, nor in `state`, reaches it. It may be on the
        host, where attention and the LSTM can read it without waiting for a device. The state holds a
        tuple of tensors for each block; a recurrent block's has a size that does not depend on T.
        """
        context = self.make_context(tokens_BT, resets_BT, state)
        x_BTD = self.embed(tokens_BT)
        states = []
        for block, block_state in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD, block_state = checkpoint(
                    block, x_BTD, context, block_state, return_state, use_reentrant=False, **extras
                )
            else:
                x_BTD, block_state = block(x_BTD, context, block_state, return_state, **extras)
            states.append(block_state)
        hidden_BTD = self.final_norm(x_BTD)
        return (hidden_BTD, states) if return_state else hidden_BTD

    def decode_step(self, tokens_B1: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """Hidden states (B, 1, D) of one more token, and the state after it. The state handed in is given up: a family
        may overwrite it, so that generating takes the memory of one state."""
        return self(tokens_B1, state=state, return_state=True)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, vocabulary), in float32 at least, of hidden states (B, T, D)."""
        logits_BTV = self.head(hidden_BTD)
        return soft_cap(logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)), self.config.logit_soft_cap)

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor, reduction: str = "sum", z_loss: float = 0.0) -> Tensor:
        """Cross entropy, in nats, of the targets (B, T) given hidden states (B, T, D), without forming all logits.

        A target of -100 is left out. `reduction` is sum, mean or none.
        """
        return linear_cross_entropy(
            hidden_BTD,
            self.head.weight,
            targets_BT,
            soft_cap=self.config.logit_soft_cap,
            z_loss=z_loss,
            reduction=reduction,
        )

    def init_weights(self) -> None:
        """Initialise every parameter as the family's authors do, from torch's current random state."""
        raise NotImplementedError

    def no_decay_parameter_names(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: the embedding and all that is no matrix."""
        no_decay = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
        return no_decay | {"embedding.weight"}
