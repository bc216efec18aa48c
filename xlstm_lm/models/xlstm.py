"""The xLSTM language model: any stack of mLSTM and sLSTM blocks (arXiv 2405.04517, 2503.13427)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.models.language_model import LanguageModel, State
from xlstm_lm.models.layers import GatedFeedForward, make_norm
from xlstm_lm.models.xlstm_config import XLSTMConfig
from xlstm_lm.models.xlstm_mixers import MIXERS, MLSTMMixer, PaperMLSTMMixer

SATURATED = 0.95  # a gate beyond this share of its soft cap counts as being at the cap


class Block(nn.Module):
    """Pre-norm residual block: a mixer along time, then, but for mlstm_paper, a gated feed-forward."""

    def __init__(self, config: XLSTMConfig, kind: str) -> None:
        super().__init__()
        self.norm = make_norm(config.norm, config.embedding_dim, config.norm_eps)
        self.mixer = MIXERS[kind](config)
        self.feedforward = None
        if kind != "mlstm_paper":
            hidden, activation = {
                "mlstm": (config.mlstm_feedforward_dim, F.silu),
                "slstm": (config.slstm_feedforward_dim, F.gelu),
            }[kind]
            self.feedforward_norm = make_norm(config.norm, config.embedding_dim, config.norm_eps)
            self.feedforward = GatedFeedForward(config.embedding_dim, hidden, activation)

    def forward(
        self,
        x_BTD: Tensor,
        resets_BT: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        **extras: Any,
    ) -> tuple[Tensor, State | None]:
        """As every block; the mixer is given the `extras`."""
        mixed_BTD, state = self.mixer(self.norm(x_BTD), resets_BT, state, return_state, **extras)
        x_BTD = x_BTD + mixed_BTD
        if self.feedforward is not None:
            x_BTD = x_BTD + self.feedforward(self.feedforward_norm(x_BTD))
        return x_BTD, state

    @torch.no_grad()
    def init_weights(self, index: int, depth: int) -> None:
        """Initialise every parameter of this block, number `index` from 0 of `depth`, as its kind's authors do."""
        mixer = self.mixer
        width, num_heads = mixer.config.embedding_dim, mixer.config.num_heads
        small, scaled_by_depth = (2 / (5 * width)) ** 0.5, 2 / (depth * width**0.5)
        nn.init.ones_(self.norm.weight)
        nn.init.ones_(mixer.head_norm.weight)
        if self.feedforward is not None:
            nn.init.ones_(self.feedforward_norm.weight)
            nn.init.normal_(self.feedforward.gate_up.weight, std=small)
            nn.init.normal_(self.feedforward.down.weight, std=scaled_by_depth)
        if isinstance(mixer, MLSTMMixer):
            # xLSTM-7B: small q, k, v; output gate and gates start from their biases alone; input gate nearly shut.
            qkv, output_gate = mixer.qkvo.weight.split((sum(mixer.widths[:3]), mixer.widths[3]))
            nn.init.normal_(qkv, std=small)
            nn.init.zeros_(output_gate)
            nn.init.normal_(mixer.out.weight, std=scaled_by_depth)
            _init_mlstm_gates(mixer.gates)
            nn.init.constant_(mixer.gates.bias[:num_heads], -10.0)
        elif isinstance(mixer, PaperMLSTMMixer):
            # xLSTM paper: as above, but the input gate starts near 1, and the convolution as torch's own.
            nn.init.normal_(mixer.up.weight, std=small)
            for projection in (mixer.query, mixer.key, mixer.value):
                nn.init.normal_(projection.weight, std=small)
            nn.init.normal_(mixer.down.weight, std=scaled_by_depth)
            nn.init.ones_(mixer.skip)
            mixer.conv.init_weights()
            _init_mlstm_gates(mixer.gates)
            nn.init.normal_(mixer.gates.bias[:num_heads], std=0.1)
        else:
            # xLSTM paper: no recurrence at first; forget biases fall from 5 to -7 over a head.
            nn.init.normal_(mixer.input_weight, std=small)
            nn.init.zeros_(mixer.recurrent_weight)
            nn.init.zeros_(mixer.bias)
            mixer.conv.init_weights()
            unit = torch.linspace(0, 1, mixer.bias.shape[-1])
            mixer.bias[1] = 5 - 12 * unit ** (0.3 + 1.3 * (index / max(depth - 1, 1)))


class XLSTM(LanguageModel):
    """A stack of the blocks that the configuration's pattern names."""

    def __init__(self, config: XLSTMConfig) -> None:
        blocks = (Block(config, kind) for kind in config.block_kinds())
        final_norm = make_norm(config.norm, config.embedding_dim, config.norm_eps)
        super().__init__(config, blocks, final_norm, config.embedding_dim)

    def decode_step(self, tokens_B1: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """As for every family; the mLSTM's matrices are overwritten."""
        return self(tokens_B1, state=state, return_state=True, overwrite_state=True)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter as the authors of each kind of block do."""
        width, depth = self.config.embedding_dim, len(self.blocks)
        small = (2 / (5 * width)) ** 0.5
        nn.init.normal_(self.embedding.weight, std=small)
        nn.init.normal_(self.head.weight, std=small)
        nn.init.ones_(self.final_norm.weight)
        for index, block in enumerate(self.blocks):
            block.init_weights(index, depth)

    def no_decay_parameter_names(self) -> set[str]:
        """As for every family; the sLSTM's biases have a dimension for each gate and head, and are no matrices."""
        biases = {name for name, _ in self.named_parameters() if name.endswith("mixer.bias")}
        return super().no_decay_parameter_names() | biases

    @torch.no_grad()
    def gate_statistics(self, tokens_BT: Tensor, resets_BT: Tensor | None = None) -> dict[str, Tensor]:
        """Means over tokens, heads and blocks (scalars): forget gate, input gate pre-activation, and the share of
        gates at the mLSTM's soft cap."""
        records: list[tuple[Tensor, Tensor]] = []
        self(tokens_BT, resets_BT, observe=lambda input_gate, forget_gate: records.append((input_gate, forget_gate)))
        inputs = torch.cat([input_gate.flatten() for input_gate, _ in records]).float()
        forgets = torch.cat([forget_gate.flatten() for _, forget_gate in records]).float()
        statistics = {"forget_gate": torch.sigmoid(forgets).mean(), "input_gate_preactivation": inputs.mean()}
        if self.config.gate_soft_cap is not None:
            gates = torch.cat((inputs, forgets))
            statistics["share_at_soft_cap"] = (gates.abs() > SATURATED * self.config.gate_soft_cap).float().mean()
        return statistics


def _init_mlstm_gates(gates: nn.Linear) -> None:
    """No weights; forget biases evenly from 3 to 6 over the heads, so that heads begin with different memories."""
    num_heads = gates.bias.shape[0] // 2
    nn.init.zeros_(gates.weight)
    gates.bias[num_heads:] = torch.linspace(3, 6, num_heads, dtype=gates.bias.dtype, device=gates.bias.device)
