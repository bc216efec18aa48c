"""An xLSTM of any blocks as a transformers model: `generate`, `pipeline`, adapters, and whatever else takes one.

Padding is no token. Wherever it stands, the tokens of a row are moved together behind it and the row starts anew at the
first of them, so that they see what they would see without it: the state of the cells and the window of the convolution
alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from xlstm_lm.hub.configuration_xlstm_lm import XLSTMLMConfig
from xlstm_lm.models.layers import make_norm, soft_cap
from xlstm_lm.models.xlstm import Block

PIECE_TOKENS = 4096
"""Without gradients a longer input is read in pieces of this length, so that memory does not grow with it."""


class XLSTMLMCache:
    """What the model remembers: the recurrent state of every block, of a size that does not depend on the tokens read.

    A model that is given a cache changes it. To continue one text in two ways, give it two copies (`copy.deepcopy`).
    """

    is_compileable = False  # transformers asks before it generates

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
    cache_params: XLSTMLMCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class XLSTMLMCausalOutput(ModelOutput):
    """The loss where labels were given; logits (B, T, vocabulary) in float32 at least; the rest as in the above."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: XLSTMLMCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class XLSTMLMPreTrainedModel(PreTrainedModel):
    """What both classes share: how transformers is to treat them, and how weights without a value get one."""

    config_class = XLSTMLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise what no file gave a value, as the authors of each kind of block do."""
        model = self.base_model
        small = (2 / (5 * self.config.embedding_dim)) ** 0.5
        parts: list[tuple[nn.Module, Callable[[], Any]]] = [
            (block, lambda block=block, index=index: block.init_weights(index, len(model.blocks)))
            for index, block in enumerate(model.blocks)
        ]
        parts.append((model.embedding, lambda: nn.init.normal_(model.embedding.weight, std=small)))
        parts.append((model.final_norm, lambda: nn.init.ones_(model.final_norm.weight)))
        if self is not model:
            parts.append((self.lm_head, lambda: nn.init.normal_(self.lm_head.weight, std=small)))
        for part, initialise in parts:
            parameters = list(part.parameters())
            given = [parameter for parameter in parameters if getattr(parameter, "_is_hf_initialized", False)]
            if len(given) == len(parameters):
                continue
            values = [parameter.clone() for parameter in given]
            initialise()
            for parameter, value in zip(given, values, strict=True):
                parameter.copy_(value)


class XLSTMLMModel(XLSTMLMPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: XLSTMLMConfig) -> None:
        super().__init__(config)
        model = config.model_config()
        self.embedding = nn.Embedding(model.vocab_size, model.embedding_dim)
        self.blocks = nn.ModuleList(Block(model, kind) for kind in model.block_kinds())
        self.final_norm = make_norm(model.norm, model.embedding_dim, model.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: XLSTMLMCache | None = None,
        use_cache: bool | None = None,
        resets: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> XLSTMLMOutput:
        """Read tokens (B, T), or their embeddings (B, T, D), behind those that the cache holds.

        Args:
            attention_mask: (B, T), or (B, S) with what the cache holds before them: 0 where there is padding. A padded
                position gives a hidden state without meaning.
            use_cache: whether to return a cache; by default as the configuration says, and not in training.
            resets: (B, T) bool; true where a document starts: nothing before it reaches it.

        Raises:
            ValueError: neither or both of tokens and embeddings, shapes that do not fit, or padding behind tokens that
                the cache holds already.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x_BTD = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = cache_params
        if cache is None and use_cache:
            cache = XLSTMLMCache()
        held = 0 if cache is None else cache.num_tokens

        order_BT = None
        if attention_mask is not None:
            order_BT, resets = _without_padding(attention_mask, resets, x_BTD.shape[1], held)
        if order_BT is not None:
            x_BTD = _rearrange(x_BTD, order_BT)
        states = None if cache is None else cache.states
        hidden_BTD, states, layers = self._read(x_BTD, resets, states, cache is not None, output_hidden_states)
        if order_BT is not None:
            back_BT = order_BT.argsort(dim=1)
            hidden_BTD = _rearrange(hidden_BTD, back_BT)
            layers = layers and tuple(_rearrange(layer_BTD, back_BT) for layer_BTD in layers)
        if cache is not None:
            cache.states, cache.num_tokens = states, held + x_BTD.shape[1]
        return XLSTMLMOutput(last_hidden_state=hidden_BTD, cache_params=cache, hidden_states=layers)

    def _read(
        self,
        x_BTD: Tensor,
        resets_BT: Tensor | None,
        states: list[tuple[Tensor, ...]] | None,
        return_state: bool,
        output_hidden_states: bool,
    ) -> tuple[Tensor, list[tuple[Tensor, ...]] | None, tuple[Tensor, ...] | None]:
        """Hidden states, the states after the last token, and the blocks' inputs where wanted."""
        pieces = [slice(None)]
        if x_BTD.shape[1] > PIECE_TOKENS and not torch.is_grad_enabled() and not output_hidden_states:
            pieces = [slice(start, start + PIECE_TOKENS) for start in range(0, x_BTD.shape[1], PIECE_TOKENS)]
        overwrite = not torch.is_grad_enabled()
        outputs, layers = [], []
        for piece in pieces:
            piece_BTD, piece_resets_BT = x_BTD[:, piece], None if resets_BT is None else resets_BT[:, piece]
            keep = return_state or piece is not pieces[-1]
            next_states = []
            for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
                if output_hidden_states:
                    layers.append(piece_BTD)
                if self.gradient_checkpointing and self.training:
                    piece_BTD, state = self._gradient_checkpointing_func(block, piece_BTD, piece_resets_BT, state, keep)
                else:
                    piece_BTD, state = block(piece_BTD, piece_resets_BT, state, keep, overwrite_state=overwrite)
                next_states.append(state)
            states = next_states if keep else None
            outputs.append(self.final_norm(piece_BTD))
        hidden_BTD = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return hidden_BTD, states, (*layers, hidden_BTD) if output_hidden_states else None


class XLSTMLMForCausalLM(XLSTMLMPreTrainedModel, GenerationMixin):
    """The language model: `XLSTMLMModel`, and a head with a soft cap."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: XLSTMLMConfig) -> None:
        super().__init__(config)
        self.model = XLSTMLMModel(config)
        self.lm_head = nn.Linear(config.embedding_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: XLSTMLMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        resets: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **loss_options: Any,
    ) -> XLSTMLMCausalOutput:
        """Logits for the token after each, and the mean loss of `labels` (B, T) where given; see `XLSTMLMModel`.

        Labels stand beside the tokens themselves and are shifted here; -100 is left out. `logits_to_keep` keeps the
        last so many positions, or those of a tensor of indices; 0 keeps all.
        """
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            resets=resets,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(output.last_hidden_state[:, kept])
        logits_BTV = soft_cap(
            logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)), self.config.logit_soft_cap
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **loss_options
            )
        return XLSTMLMCausalOutput(
            loss=loss, logits=logits_BTV, cache_params=output.cache_params, hidden_states=output.hidden_states
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache_params: XLSTMLMCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """As for every model. A cache that `generate` is given holds the beginning of `input_ids`.

        Raises:
            ValueError: the cache holds all of `input_ids`, or more.
        """
        if is_first_iteration and cache_params is not None and inputs_embeds is None:
            held = cache_params.get_seq_length()
            if held >= input_ids.shape[1]:
                raise ValueError(
                    f"cache_params holds {held} tokens, but input_ids has {input_ids.shape[1]}: give all tokens so "
                    "far, those in the cache and at least one new one."
                )
            input_ids = input_ids[:, held:]
        elif not is_first_iteration and cache_params is not None:
            attention_mask = None  # padding precedes the prompt; what is generated is not padded
        return super().prepare_inputs_for_generation(
            input_ids,
            cache_params=cache_params,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **options,
        )

    @staticmethod
    def _reorder_cache(cache_params: XLSTMLMCache, beam_idx: Tensor) -> XLSTMLMCache:
        """For beam search: continue the beams `beam_idx`."""
        cache_params.reorder(beam_idx)
        return cache_params


def _without_padding(
    mask_BS: Tensor, resets_BT: Tensor | None, length: int, held: int
) -> tuple[Tensor | None, Tensor | None]:
    """The order of positions (B, T) that puts padding first, and the resets in that order; no order without padding."""
    if mask_BS.dim() != 2 or mask_BS.shape[1] not in (length, held + length):
        raise ValueError(
            f"attention_mask is {tuple(mask_BS.shape)}; it must be (B, {length}) to go with the tokens, or "
            f"(B, {held + length}) with the {held} in the cache."
        )
    mask_BT = mask_BS[:, -length:].bool()
    if bool(mask_BT.all()):
        return None, resets_BT
    padding_B = (~mask_BT).sum(1)
    if mask_BS.shape[1] > length:
        started_B = mask_BS[:, :-length].bool().any(1)
    else:
        started_B = torch.full_like(padding_B, held > 0, dtype=torch.bool)
    if bool((started_B & (padding_B > 0)).any()):
        raise ValueError(
            "There is padding behind tokens that the cache holds already. A recurrent state cannot leave it out: pad "
            "on the left, give every row its own cache, or give all tokens again without a cache."
        )
    order_BT = mask_BT.to(torch.uint8).argsort(dim=1, stable=True)
    starts_BT = (torch.arange(length, device=mask_BT.device) == padding_B[:, None]) & ~started_B[:, None]
    return order_BT, starts_BT if resets_BT is None else starts_BT | resets_BT.gather(1, order_BT)


def _rearrange(x_BTD: Tensor, order_BT: Tensor) -> Tensor:
    """Position t of each row becomes what was at position order[t]."""
    return x_BTD.gather(1, order_BT.to(x_BTD.device)[..., None].expand_as(x_BTD))


if __name__ == "xlstm_lm.hub.modeling_xlstm_lm":  # not in the copy that an export brings along
    AutoConfig.register(XLSTMLMConfig.model_type, XLSTMLMConfig, exist_ok=True)
    AutoModel.register(XLSTMLMConfig, XLSTMLMModel, exist_ok=True)
    AutoModelForCausalLM.register(XLSTMLMConfig, XLSTMLMForCausalLM, exist_ok=True)
