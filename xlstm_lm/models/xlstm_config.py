"""Stacks of blocks of any kind: xLSTMs (arXiv 2405.04517, 2503.13427) and hybrids with attention or Mamba."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

from xlstm_lm.base.fields import CountOrZero, Epsilon, Factor, Share, Size, VocabSize, check_fields
from xlstm_lm.models.block import BlockStack
from xlstm_lm.models.layers import NormKind, NumBlocks, SoftCap
from xlstm_lm.models.mixers import MIXERS
from xlstm_lm.models.mixers.mixer import MixerConfig
from xlstm_lm.models.mixers.mlstm_cell import MLSTMBackend
from xlstm_lm.models.mixers.slstm import SLSTMBackend

MixerKind = Literal[*MIXERS]  # type: ignore[valid-type]  # a table that mypy cannot evaluate


@dataclass(kw_only=True)
class XLSTMConfig(BlockStack):
    """An xLSTM language model."""

    family: Literal["xlstm"] = "xlstm"
    """Model family."""
    vocab_size: VocabSize = 50304
    """Rows of the embedding and of the head; at least the tokenizer's vocabulary."""
    embedding_dim: Size = 768
    """Model width."""
    num_blocks: NumBlocks = 12
    """Number of residual blocks."""
    num_heads: Size = 4
    """Heads of every mLSTM and sLSTM cell, and of attention."""
    pattern: str | list[str] = "mlstm"
    """Blocks from first to last: one kind of mixer for all, xlstm[a:b] for a mLSTM to b sLSTM, or a list of kinds."""
    mlstm_block: MixerKind = "mlstm"
    """Kind of the first a of every a + b blocks in xlstm[a:b]."""
    slstm_block: MixerKind = "slstm"
    """Kind of the last b of every a + b blocks in xlstm[a:b]."""
    slstm_positions: list[CountOrZero] | None = None
    """Positions (from 0) of the slstm_block in xlstm[a:b]; by default the last b of every a + b blocks."""
    mixers: list[dict[str, Any]] | None = None
    """Settings by kind, as [{kind: attention, num_heads: 8}], in place of those that the kind shares with the model."""
    input_gate: Literal["exp", "sigmoid"] = "exp"
    """Input gate of the mLSTM."""
    qk_dim_factor: Factor = 0.5
    """Width of queries and keys over the model width, in mlstm and mlstm_conv blocks."""
    v_dim_factor: Factor = 1.0
    """Width of values over the model width, in mlstm and mlstm_conv blocks."""
    feedforward_factor: Factor = 2.667
    """Feed-forward width over the model width in mlstm, mlstm_conv and attention blocks, rounded up to a multiple of
    64."""
    feedforward_dim: Size | None = None
    """Feed-forward width of mlstm, mlstm_conv and attention blocks where it does not follow from the factor."""
    gate_soft_cap: SoftCap | None = 15.0
    """Soft cap of the mLSTM's input and forget gate pre-activations; null for none."""
    logit_soft_cap: SoftCap | None = 30.0
    """Soft cap of the logits; null for none."""
    norm: NormKind = "rms"  # type: ignore[misc]  # the field of one family, a constant of the others
    """Norm before every block and after the last."""
    cell_norm: NormKind = "layer"
    """Norm of each head behind the cell."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of all norms."""
    cell_eps: Epsilon = 1e-6
    """Epsilon of the mLSTM's normalizer."""
    conv_width: Size = 4
    """Width of the causal convolution in mlstm_conv, mlstm_paper, slstm and Mamba blocks."""
    paper_projection_factor: Factor = 2.0
    """Inner width over the model width in mlstm_paper blocks, rounded up to a multiple of 64."""
    paper_qkv_block_size: Size = 4
    """Size of the diagonal blocks of the query, key and value projections in mlstm_paper blocks."""
    slstm_feedforward_factor: Factor = 1.3
    """Feed-forward width over the model width in slstm blocks, rounded up to a multiple of 64."""
    dropout: Share = 0.0
    """Share of units dropped in training, of the embedding and of what each mixer and feed-forward adds."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""
    chunk_length: Size | None = None
    """Chunk length of the mLSTM; null lets the kernel choose."""
    mlstm_backend: MLSTMBackend = "auto"
    """Kernel of the mLSTM."""
    slstm_backend: SLSTMBackend = "auto"
    """Kernel of the sLSTM."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_sections()
        self.block_mixers()

    def mixer(self, kind: str) -> MixerConfig:
        """Mixer of the blocks of a kind: its section in `mixers` over the fields that it shares with the model."""
        section = next((each for each in self.mixers or () if each["kind"] == kind), {})
        try:
            return MIXERS[kind](**self.mixer_settings(MIXERS[kind]) | section)
        except ValueError as error:
            raise ValueError(f"mixers, section {kind}: {error}" if section else str(error)) from None

    def _check_sections(self) -> None:
        kinds, seen = self.block_kinds(), []
        for index, section in enumerate(self.mixers or ()):
            kind = section.get("kind") if isinstance(section, dict) else None
            if not isinstance(kind, str) or kind not in MIXERS:
                raise ValueError(
                    f"mixers[{index}] is {section!r}; it must be a section whose kind is one of {', '.join(MIXERS)}."
                )
            if kind in seen:
                raise ValueError(f"mixers has two sections of kind {kind}; join them.")
            if kind not in kinds:
                raise ValueError(
                    f"mixers has a section of kind {kind}, but the pattern has only {', '.join(dict.fromkeys(kinds))}: "
                    "remove it, or name the kind in the pattern."
                )
            seen.append(kind)
            known = [field.name for field in dataclasses.fields(MIXERS[kind]) if field.name != "embedding_dim"]
            for name in section:
                if name not in known:
                    near = difflib.get_close_matches(str(name), known, n=1)
                    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}."
                    raise ValueError(f"mixers, section {kind} has no field {name!r}; {hint}")

    def block_mixers(self) -> list[MixerConfig]:
        kinds = self.block_kinds()
        mixers = {kind: self.mixer(kind) for kind in dict.fromkeys(kinds)}
        return [mixers[kind] for kind in kinds]

    def block_kinds(self) -> list[str]:
        """The kind of every block, first to last, that `pattern` and `slstm_positions` stand for."""
        if isinstance(self.pattern, list):
            unknown = [kind for kind in self.pattern if kind not in MIXERS]
            if unknown:
                raise ValueError(f"pattern names {unknown[0]!r}; the blocks are {', '.join(MIXERS)}.")
            if len(self.pattern) != self.num_blocks:
                raise ValueError(f"pattern lists {len(self.pattern)} blocks, but num_blocks is {self.num_blocks}.")
            return self.pattern
        if self.pattern in MIXERS:
            return [self.pattern] * self.num_blocks
        ratio = re.fullmatch(r"xlstm\[(\d+):(\d+)\]", self.pattern)
        if not ratio or (period := int(ratio[1]) + int(ratio[2])) == 0:
            raise ValueError(
                f"pattern {self.pattern!r} is none of {', '.join(MIXERS)}, xlstm[a:b] (as xlstm[7:1]) "
                "or a list of blocks."
            )
        positions = self.slstm_positions
        if positions is None:
            if self.num_blocks % period:
                raise ValueError(
                    f"pattern {self.pattern} repeats every {period} blocks, which does not divide num_blocks "
                    f"{self.num_blocks}; choose a multiple of {period}, or say where in slstm_positions."
                )
            positions = [index for index in range(self.num_blocks) if index % period >= int(ratio[1])]
        elif any(not 0 <= position < self.num_blocks for position in positions):
            raise ValueError(
                f"slstm_positions {positions} must lie between 0 and num_blocks - 1 = {self.num_blocks - 1}."
            )
        return [self.slstm_block if index in positions else self.mlstm_block for index in range(self.num_blocks)]


@dataclass(kw_only=True)
class HybridConfig(XLSTMConfig):
    """A language model of mixed blocks that is no xLSTM: the fields are those of the family xlstm."""

    family: Literal["hybrid"] = "hybrid"  # type: ignore[assignment]  # XLSTMConfig shares its fields, not its name
    """Model family."""
