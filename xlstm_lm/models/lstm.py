"""The classics: stacks of LSTM, GRU or plain recurrent layers, on torch's own kernels, restarted with each document.

Documents of a row become sequences of their own for the kernel, the first of a row with the given state, all at
once in a packed batch; in training on a CPU in a padded one, where that is not much longer. Peepholes, which no kernel
has, run step by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.fields import Epsilon, Range, Share, Size, VocabSize, check_fields
from xlstm_lm.models.language_model import LanguageModel
from xlstm_lm.models.layers import NumBlocks, SoftCap
from xlstm_lm.models.mixers.mixer import NORMS, PROJECTIONS, Mixer, Observer, OperationUse, State
from xlstm_lm.models.storage import FLOAT32, Storage
from xlstm_lm.ops.document_rnn import KERNELS, document_rnn

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
KEPT_BY_KERNEL = {"lstm": (10, 6), "gru": (6, 0), "rnn": (0, 0)}
"""Numbers in the run's type and in float32 that torch's kernel keeps for each unit and token, beside its output."""
PADDING = 2
"""How many times longer a padded batch may be: on a CPU torch takes several times as long for a packed one."""


@dataclass(kw_only=True)
class LSTMConfig:
    """A stack of recurrent layers between an embedding and a head, without residual connections."""

    family: Literal["lstm"] = "lstm"
    """Model family."""
    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    """LSTM with three gates, GRU, or plain recurrence with tanh."""
    vocab_size: VocabSize = 50304
    """Rows of the embedding and of the head; at least the tokenizer's vocabulary."""
    embedding_dim: Size = 768
    """Width of the embedding."""
    hidden_dim: Size | None = None
    """Width of the layers; null for that of the embedding."""
    num_blocks: NumBlocks = 2
    """Number of recurrent layers."""
    dropout: Share = 0.0
    """Share of units dropped in training, on connections that are not recurrent (arXiv 1409.2329)."""
    layer_norm: bool = False
    """Whether a layer norm stands behind every layer."""
    peepholes: bool = False
    """Whether an LSTM's gates see its cell (Gers, Schraudolph and Schmidhuber, 2002)."""
    forget_bias: Annotated[float, Range(-1e3, 1e3)] = 1.0
    """An LSTM's forget bias at the start (Gers, Schmidhuber and Cummins, 2000)."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the layer norms."""
    logit_soft_cap: SoftCap | None = None
    """Soft cap of the logits; null for none."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.peepholes and self.cell != "lstm":
            raise ValueError(f"peepholes belong to an LSTM, but cell is {self.cell}; set one or the other.")
        if self.tie_embeddings and self.width != self.embedding_dim:
            raise ValueError(
                f"tie_embeddings needs layers as wide as the embedding, but hidden_dim is {self.width} and "
                f"embedding_dim {self.embedding_dim}."
            )

    @property
    def width(self) -> int:
        """Width of the layers."""
        return self.hidden_dim or self.embedding_dim

    @property
    def head_width(self) -> int:
        """Width of the hidden states that the head sees."""
        return self.width

    def build_blocks(self) -> Iterator[nn.Module]:
        """Modules of the layers."""
        return (Layer(self, width) for width in self.input_widths)

    def build_final_norm(self) -> nn.Module:
        """Module behind the last layer: nothing."""
        return nn.Identity()

    @property
    def input_widths(self) -> list[int]:
        """Width of each layer's input, first to last."""
        return [self.embedding_dim] + [self.width] * (self.num_blocks - 1)

    def layer_flops_by_part(self, input_width: int) -> dict[str, float]:
        """FLOPs of a layer's forward pass for one token: the inputs' products, and the recurrent ones with 20 for each
        unit's gates."""
        gates = GATES[self.cell] * self.width
        return {PROJECTIONS: 2.0 * gates * input_width, self.cell: 2.0 * gates * self.width + 20.0 * self.width}

    def layer_kept_by_part(self, storage: Storage, input_width: int) -> dict[str, float]:
        """Bytes that a layer keeps for the backward pass for each token: its input and output, what torch's kernel
        keeps for each unit (as measured on a CPU), and the layer norm's."""
        a, width = storage.itemsize, self.width
        own, in_float32 = KEPT_BY_KERNEL[self.cell]
        kept = {PROJECTIONS: a * float(input_width), self.cell: width * (a * (1.0 + own) + FLOAT32 * in_float32)}
        return kept | ({NORMS: storage.norm("layer", width)} if self.layer_norm else {})

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """Bytes of one sequence's state: outputs and, in an LSTM, cells."""
        del context_length
        return self.num_blocks * self.layer_state_bytes(bytes_per_activation)

    def layer_state_bytes(self, bytes_per_activation: int) -> int:
        """Bytes of one layer's part of the state."""
        return (2 if self.cell == "lstm" else 1) * self.width * bytes_per_activation

    def operations(self, micro_rows: int) -> list[OperationUse]:
        """None: the layers run on torch's own kernels."""
        del micro_rows
        return []


class Context(NamedTuple):
    """Where the documents of packed rows lie."""

    resets_BT: Tensor | None
    places: PackedSequence | None = None
    """The documents as packed sequences of places in the rows laid end to end; None without resets, and in a graph of
    torch.compile, where an operator finds them."""
    first_B: Tensor | None = None
    """The number of each row's first document, which goes on the state unless it starts there."""
    last_B: Tensor | None = None
    """The number of each row's last document."""
    padded_MS: Tensor | None = None
    """The places of each document's tokens, padded; None where packed sequences are better."""
    back_P: Tensor | None = None
    """Where in these each token of the rows stands."""


class Layer(Mixer):
    """One recurrent layer, its layer norm and its dropout: (B, T, D) -> (B, T, H).

    The state is (y, c) for an LSTM and (y,) otherwise, each (B, H).
    """

    context_key = "documents"
    parts = MappingProxyType({"input_weight": PROJECTIONS})

    def __init__(self, config: LSTMConfig, input_width: int) -> None:
        super().__init__()
        self.config = config
        gates, width = GATES[config.cell], config.width
        self.input_weight = nn.Parameter(torch.empty(gates * width, input_width))
        self.recurrent_weight = nn.Parameter(torch.empty(gates * width, width))
        self.bias = nn.Parameter(torch.empty(gates * width))
        if config.peepholes:
            self.peephole = nn.Parameter(torch.empty(3, width))
            self.no_decay = frozenset({"peephole"})
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.layer_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def make_context(self, x_BTD: Tensor, resets_BT: Tensor | None, state: State | None) -> Context:
        """Documents as sequences of their own, where there is more than one in a row.

        torch's kernels need their lengths on the host: resets on a device are waited for.
        """
        del state
        (B, T), device = x_BTD.shape[:2], x_BTD.device
        if resets_BT is None or torch.compiler.is_compiling():
            return Context(None if resets_BT is None else resets_BT.to(device, non_blocking=True))
        starts_BT = resets_BT.cpu().clone()
        starts_BT[:, 0] = True
        start_M = starts_BT.flatten().nonzero().flatten()
        length_M = torch.cat((start_M[1:], start_M.new_tensor([B * T]))) - start_M
        documents = torch.arange(B * T).split(length_M.tolist())
        documents_B = starts_BT.sum(1)
        last_B = documents_B.cumsum(0) - 1
        places = pack_sequence(documents, enforce_sorted=False)
        parts: tuple[Any, ...] = (resets_BT, places, last_B + 1 - documents_B, last_B)
        context = Context(*(part.to(device, non_blocking=True) for part in parts))
        longest = int(length_M.max())
        if device.type == "cpu" and longest * len(documents) <= PADDING * B * T:
            row_M = longest * torch.arange(len(documents)) - start_M  # of a document, less where it starts
            back_P = torch.arange(B * T) + row_M.repeat_interleave(length_M)
            context = context._replace(padded_MS=pad_sequence(documents, batch_first=True), back_P=back_P)
        return context

    def forward(
        self,
        x_BTD: Tensor,
        context: Context,
        state: State | None = None,
        return_state: bool = False,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        del observe, overwrite_state
        if state is None:
            state = (x_BTD.new_zeros(x_BTD.shape[0], self.config.width),) * (2 if self.config.cell == "lstm" else 1)
        state = tuple(each.to(x_BTD.dtype) for each in state)
        if self.config.peepholes:
            y_BTH, state = self._with_peepholes(x_BTD, context.resets_BT, state)
        elif context.resets_BT is None:
            y_BTH, state = self._kernel((x_BTD,), state)
        elif context.places is None:
            weights = (self.input_weight, self.recurrent_weight, self.bias)
            first = state if len(state) == 2 else (*state, None)
            y_BTH, *last = document_rnn(x_BTD, context.resets_BT, *first, *weights, self.config.cell)
            state = tuple(last[: len(state)])
        elif context.padded_MS is not None and not return_state:
            y_BTH = self._padded(x_BTD, context, state)
        else:
            y_BTH, state = self._packed(x_BTD, context, state)
        return self.dropout(self.norm(y_BTH)), state if return_state else None

    def _kernel(self, x: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        """torch's kernel over (B, T, D), or over packed sequences and their batch sizes."""
        # torch's second bias adds nothing to the first, and stays zero.
        weights = [self.input_weight, self.recurrent_weight, self.bias, torch.zeros_like(self.bias)]
        first = tuple(each.unsqueeze(0) for each in state)
        options = {"num_layers": 1, "dropout": 0.0, "train": self.training, "bidirectional": False}
        if len(x) == 1:
            options["batch_first"] = True
        y, *last = KERNELS[self.config.cell](
            *x, first if self.config.cell == "lstm" else first[0], weights, has_biases=True, **options
        )
        return y, tuple(each[0] for each in last)

    def _first_states(self, count: int, context: Context, state: State) -> State:
        """First state of each of `count` documents: the one that its row continues, or zeros."""
        assert context.resets_BT is not None and context.first_B is not None
        first = (each.masked_fill(context.resets_BT[:, :1], 0) for each in state)
        return tuple(each.new_zeros(count, each.shape[1]).index_copy(0, context.first_B, each) for each in first)

    def _padded(self, x_BTD: Tensor, context: Context, state: State) -> Tensor:
        assert context.padded_MS is not None
        first = self._first_states(len(context.padded_MS), context, state)
        y_MSH, _ = self._kernel((x_BTD.flatten(0, 1)[context.padded_MS],), first)
        return y_MSH.flatten(0, 1)[context.back_P].unflatten(0, x_BTD.shape[:2])

    def _packed(self, x_BTD: Tensor, context: Context, state: State) -> tuple[Tensor, State]:
        assert context.places is not None
        places, batch_sizes, order, back = context.places
        assert order is not None
        first = self._first_states(len(order), context, state)
        y, last = self._kernel((x_BTD.flatten(0, 1)[places], batch_sizes), tuple(each[order] for each in first))
        y_BTH = torch.empty_like(y).index_copy(0, places, y).unflatten(0, x_BTD.shape[:2])
        return y_BTH, tuple(each[back][context.last_B] for each in last)

    def _with_peepholes(self, x_BTD: Tensor, resets_BT: Tensor | None, state: State) -> tuple[Tensor, State]:
        announce_once("no kernel has an LSTM with peepholes: it runs step by step in Python")
        y_BH, c_BH = state
        peek_input, peek_forget, peek_output = self.peephole
        steps = []
        for t, gates_BG in enumerate(nn.functional.linear(x_BTD, self.input_weight, self.bias).unbind(1)):
            if resets_BT is not None:
                starts_B1 = resets_BT[:, t, None]
                y_BH, c_BH = y_BH.masked_fill(starts_B1, 0), c_BH.masked_fill(starts_B1, 0)
            i, f, z, o = (gates_BG + y_BH @ self.recurrent_weight.T).chunk(4, dim=-1)
            i, f = torch.sigmoid(i + peek_input * c_BH), torch.sigmoid(f + peek_forget * c_BH)
            c_BH = f * c_BH + i * torch.tanh(z)
            y_BH = torch.sigmoid(o + peek_output * c_BH) * torch.tanh(c_BH)
            steps.append(y_BH)
        return torch.stack(steps, dim=1), (y_BH, c_BH)

    @torch.no_grad()
    def initialize_in_turn(self, index: int, depth: int) -> Iterator[Tensor]:
        """Make each gate's recurrence orthogonal (arXiv 1312.6120); no biases but an LSTM's forget gate's."""
        yield self.input_weight
        for gate in self.input_weight.chunk(GATES[self.config.cell]):
            nn.init.xavier_uniform_(gate)
        yield self.recurrent_weight
        for gate in self.recurrent_weight.chunk(GATES[self.config.cell]):
            nn.init.orthogonal_(gate)
        yield self.bias
        nn.init.zeros_(self.bias)
        if self.config.cell == "lstm":  # gates in torch's order: input, forget, cell input, output
            self.bias.chunk(4)[1].fill_(self.config.forget_bias)
        if self.config.peepholes:
            yield self.peephole
            nn.init.zeros_(self.peephole)
        if isinstance(self.norm, nn.LayerNorm):
            yield self.norm.weight
            nn.init.ones_(self.norm.weight)
            yield self.norm.bias
            nn.init.zeros_(self.norm.bias)


class LSTM(LanguageModel):
    """A stack of recurrent layers."""

    @torch.no_grad()
    def initialize_in_turn(self) -> Iterator[Tensor]:
        """Draw an embedding of unit variance, as the input projections expect it (Glorot and Bengio, 2010), the head,
        then the layers."""
        yield self.embedding.weight
        nn.init.normal_(self.embedding.weight)
        yield self.head.weight
        nn.init.normal_(self.head.weight, std=self.config.width**-0.5)
        for index, layer in enumerate(self.blocks):
            yield from layer.initialize_in_turn(index, len(self.blocks))
