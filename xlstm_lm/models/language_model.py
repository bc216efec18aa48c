"""The language model of every family: embedding, blocks, final norm and head, and the walk through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xlstm_lm.models.block import make_contexts
from xlstm_lm.models.layers import CausalConv, soft_cap
from xlstm_lm.models.mixers.mixer import Mixer, State
from xlstm_lm.ops.loss import Reduction, linear_cross_entropy

if TYPE_CHECKING:
    from xlstm_lm.parallel.divided_rows import DividedRows

SATURATED = 0.95
"""Share of its soft cap beyond which a gate counts as being at the cap."""


class LanguageModel(nn.Module):
    """Tokens to hidden states, hidden states to logits or loss. Weights have no values before `init_weights`."""

    def __init__(self, config: Any) -> None:
        """`config` is a family's: it builds the blocks and the final norm, and has the sizes of embedding and head."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.blocks: Any = nn.ModuleList(config.build_blocks())  # a ModuleList types its items as bare modules
        self.final_norm = config.build_final_norm()
        self.head = nn.Linear(config.head_width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.activation_checkpointing = False

    def divide_rows(self, divided_rows: DividedRows | None) -> None:
        """Let `forward` receive, on each of these processes, its slice of every row; None for whole rows again."""
        for module in self.modules():
            if isinstance(module, (Mixer, CausalConv)):
                module.divided_rows = divided_rows

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Input of the first block: (B, T, D)."""
        return F.dropout(self.embedding(tokens_BT), self.config.dropout, self.training)

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
        host, where attention and the LSTM read it without waiting for a device. The state holds a tuple of tensors for
        each block; a recurrent block's has a size that does not depend on T. The `extras` reach every block.
        """
        x_BTD = self.embed(tokens_BT)
        before: Sequence[State | None] = state or [None] * len(self.blocks)
        contexts = make_contexts(self.blocks, x_BTD, resets_BT, before)
        states = []
        for block, context, block_state in zip(self.blocks, contexts, before, strict=True):
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
        """Hidden states (B, 1, D) of one more token, and the state after it.

        The caller gives `state` up: mixers may overwrite it, so generating takes the memory of one state.
        """
        return self(tokens_B1, state=state, return_state=True, overwrite_state=True)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, vocabulary), in float32 at least, of hidden states (B, T, D)."""
        logits_BTV = self.head(hidden_BTD)
        return soft_cap(logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)), self.config.logit_soft_cap)

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor, reduction: Reduction = "sum", z_loss: float = 0.0) -> Tensor:
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
        """Initialize every parameter as the authors of its kind of block do, from torch's current random state."""
        for _ in self.initialize_in_turn():
            pass

    @torch.no_grad()
    def initialize_in_turn(self) -> Iterator[Tensor]:
        """Initialize every parameter; yields each right before its values are written, a tied one twice."""
        in_order, std, depth = self.config.drawn_in_order, self.config.embedding_std, len(self.blocks)
        yield self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=std)
        if not in_order:
            yield self.head.weight
            nn.init.normal_(self.head.weight, std=std)
        yield self.final_norm.weight
        nn.init.ones_(self.final_norm.weight)
        for index, block in enumerate(self.blocks):
            yield from block.initialize_in_turn(index, depth, mixer_first=in_order)
        if in_order and not self.config.tie_embeddings:
            yield self.head.weight
            nn.init.normal_(self.head.weight, std=std)

    def no_decay_parameter_names(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: the embedding and all that is no matrix."""
        names = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
        names |= {f"blocks.{index}.{name}" for index, block in enumerate(self.blocks) for name in block.no_decay}
        return names | {"embedding.weight"}

    @torch.no_grad()
    def gate_statistics(self, tokens_BT: Tensor, resets_BT: Tensor | None = None) -> dict[str, Tensor]:
        """Means over tokens, heads and blocks (scalars): forget gate, input gate pre-activation, and, of the gates with
        a soft cap, the share at it. Empty for a model without gates."""
        if not any(block.has_gates for block in self.blocks):
            return {}
        inputs, forgets, at_cap = [], [], []

        def observe(input_BTX: Tensor, forget_BTX: Tensor, cap: float | None) -> None:
            inputs.append(input_BTX.flatten().float())
            forgets.append(forget_BTX.flatten().float())
            if cap is not None:
                at_cap.append(torch.cat((inputs[-1], forgets[-1])).abs() > SATURATED * cap)

        self(tokens_BT, resets_BT, observe=observe)
        statistics = {
            "forget_gate": torch.sigmoid(torch.cat(forgets)).mean(),
            "input_gate_preactivation": torch.cat(inputs).mean(),
        }
        if at_cap:
            statistics["share_at_soft_cap"] = torch.cat(at_cap).float().mean()
        return statistics
