"""An xLSTM of any blocks as a transformers model for `generate`, `pipeline`, adapters and other tools.

Padding changes nothing, and documents packed into one row do not see each other: see `row_layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from xlstm_lm.hub.configuration_xlstm_lm import XLSTMLMConfig
from xlstm_lm.hub.model_outputs import OUTPUT_HAS_CACHE, XLSTMLMCache, XLSTMLMCausalOutput, XLSTMLMOutput
from xlstm_lm.hub.row_layout import PACKING_OPTIONS, RowLayout, lay_out_rows
from xlstm_lm.models.block import Block, make_contexts
from xlstm_lm.models.layers import soft_cap

PIECE_TOKENS = 4096
"""Without gradients a longer input is read in pieces of this length, and memory does not grow with it."""
LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments of `forward` that are handed to the loss."""
NEUTRAL_OPTIONS: dict[str, Any] = {"output_attentions": False, "output_router_logits": False, "is_causal": True}
"""Arguments that transformers gives every model, and the one value (beside None) for which there is nothing to do."""


class XLSTMLMBlock(GradientCheckpointingLayer, Block):
    """A block that transformers can checkpoint by itself."""


class XLSTMLMPreTrainedModel(PreTrainedModel):
    """Base of both classes: their treatment by transformers, and the initialization of weights that have no value."""

    config_class = XLSTMLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["XLSTMLMBlock"]  # noqa: RUF012
    _is_stateful = True

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise what has no value yet, from a file or from here, as the authors of each kind of block do."""
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
            if getattr(part, "_is_hf_initialized", False):
                continue
            parameters = list(part.parameters())
            given = [parameter for parameter in parameters if getattr(parameter, "_is_hf_initialized", False)]
            if len(given) < len(parameters):
                values = [parameter.clone() for parameter in given]
                initialise()
                for parameter, value in zip(given, values, strict=True):
                    parameter.copy_(value)
            part._is_hf_initialized = True


class XLSTMLMModel(XLSTMLMPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: XLSTMLMConfig) -> None:
        super().__init__(config)
        model = config.model_config()
        self.embedding = nn.Embedding(model.vocab_size, model.embedding_dim)
        self.blocks = nn.ModuleList(map(XLSTMLMBlock, model.blocks()))
        self.final_norm = model.build_final_norm()
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
        cache: XLSTMLMCache | None = None,
        use_cache: bool | None = None,
        resets: Tensor | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cache_params: XLSTMLMCache | None = None,
        past_key_values: XLSTMLMCache | None = None,
        **kwargs: Any,
    ) -> XLSTMLMOutput:
        """Read tokens (B, T), or their embeddings (B, T, D), behind those that the cache holds.

        Args:
            attention_mask: (B, T), or (B, S) with what the cache holds before them: 0 where there is padding. A padded
                position gives a hidden state without meaning.
            cache: a cache that this model returned; `cache_params` and `past_key_values` are older names for it.
            use_cache: whether to return a cache; by default as the configuration says, and not in training.
            resets: (B, T) bool; true where a document starts: nothing before it reaches it.
            position_ids: (B, T) or (1, T); a document starts where they do not go on by one. A single document is the
                same at any position.
            seq_idx: (B, T); a document starts where it changes.
            kwargs: `cu_seq_lens_q`, the boundaries of documents in a single row, and what comes with it: see
                `row_layout`.

        Raises:
            ValueError: neither or both of tokens and embeddings, shapes that do not fit, padding behind tokens that
                the cache holds already, contradictory starts of documents, or the cache of another model.
            TypeError: an argument that the model has no use for.
        """
        packing = {name: kwargs.pop(name) for name in PACKING_OPTIONS if name in kwargs}
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x_BTD = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = _given_cache(cache, cache_params, past_key_values)
        if cache is None and use_cache:
            cache = XLSTMLMCache()
        held = 0 if cache is None else cache.num_tokens
        layout = lay_out_rows(
            tuple(x_BTD.shape[:2]),
            held,
            x_BTD.device,
            attention_mask=attention_mask,
            resets=resets,
            position_ids=position_ids,
            seq_idx=seq_idx,
            **packing,
        )
        states = None if cache is None else cache.states
        hidden_BTD, states, layers = self._read(x_BTD, layout, states, cache is not None, output_hidden_states)
        if cache is not None:
            cache.states, cache.num_tokens = states, held + x_BTD.shape[1]
        return XLSTMLMOutput(hidden_BTD, cache, layers)

    def _read(
        self,
        x_BTD: Tensor,
        layout: RowLayout,
        states: list[tuple[Tensor, ...]] | None,
        return_state: bool,
        output_hidden_states: bool,
    ) -> tuple[Tensor, list[tuple[Tensor, ...]] | None, tuple[Tensor, ...] | None]:
        """Hidden states, the states after the last token, and the blocks' inputs where wanted."""
        x_BTD, resets_BT = layout.arrange(x_BTD), layout.resets_BT
        pieces = [slice(None)]
        if x_BTD.shape[1] > PIECE_TOKENS and not torch.is_grad_enabled() and not output_hidden_states:
            pieces = [slice(start, start + PIECE_TOKENS) for start in range(0, x_BTD.shape[1], PIECE_TOKENS)]
        overwrite = not torch.is_grad_enabled()
        outputs, layers = [], []
        for piece in pieces:
            piece_BTD, piece_resets_BT = x_BTD[:, piece], None if resets_BT is None else resets_BT[:, piece]
            keep = return_state or piece is not pieces[-1]
            next_states: list[tuple[Tensor, ...]] = []
            before: Sequence[tuple[Tensor, ...] | None] = states or [None] * len(self.blocks)
            contexts = make_contexts(self.blocks, piece_BTD, piece_resets_BT, before)
            for block, context, state in zip(self.blocks, contexts, before, strict=True):
                if output_hidden_states:  # all positions are one piece, and what is returned is part of the graph
                    layers.append(layout.restore(piece_BTD))
                    piece_BTD = layout.arrange(layers[-1])
                piece_BTD, state = block(piece_BTD, context, state, keep, overwrite_state=overwrite)
                next_states.append(state)
            states = next_states if keep else None
            outputs.append(self.final_norm(piece_BTD))
        hidden_BTD = layout.restore(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))
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
        cache: XLSTMLMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        resets: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cache_params: XLSTMLMCache | None = None,
        past_key_values: XLSTMLMCache | None = None,
        **kwargs: Any,
    ) -> XLSTMLMCausalOutput:
        """Logits for the token after each, and the mean loss of `labels` (B, T) where given; see `XLSTMLMModel`.

        Labels stand beside the tokens themselves and are shifted here, unless `shift_labels` are given too; -100 is
        left out. `logits_to_keep` keeps the last so many positions, or those of a tensor of indices; 0 keeps all.
        """
        loss_options = {name: kwargs.pop(name) for name in LOSS_OPTIONS if kwargs.get(name) is not None}
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=_given_cache(cache, cache_params, past_key_values),
            use_cache=use_cache,
            resets=resets,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
            seq_idx=seq_idx,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(output.last_hidden_state[:, kept])
        logits_BTV = soft_cap(
            logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)), self.config.logit_soft_cap
        )
        loss = None
        if labels is not None or "shift_labels" in loss_options:
            loss = self.loss_function(
                logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **loss_options
            )
        return XLSTMLMCausalOutput(loss, logits_BTV, output.cache, output.hidden_states)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: XLSTMLMCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        cache_params: XLSTMLMCache | None = None,
        past_key_values: XLSTMLMCache | None = None,
        **kwargs: Any,  # of this name, or `generate` refuses what only `forward` takes
    ) -> dict[str, Any]:
        """Arguments of the next call of `forward`. A cache that `generate` is given holds the beginning of `input_ids`.

        `resets` and `seq_idx` describe the prompt; what is generated belongs to its last document.

        Raises:
            ValueError: the cache holds all of `input_ids`, or more.
        """
        for name in ("tokenizer", "assistant_tokenizer"):  # for stop strings; `generate` hands them on to the model
            kwargs.pop(name, None)
        cache = _given_cache(cache, cache_params, past_key_values)
        if is_first_iteration and cache is not None and inputs_embeds is None:
            held = cache.get_seq_length()
            if held >= input_ids.shape[1]:
                raise ValueError(
                    f"cache_params holds {held} tokens, but input_ids has {input_ids.shape[1]}: give all tokens so "
                    "far, those in the cache and at least one new one."
                )
            input_ids = input_ids[:, held:]
            kwargs |= {name: kwargs[name][:, held:] for name in ("resets", "seq_idx") if kwargs.get(name) is not None}
        elif not is_first_iteration and cache is not None:
            # Padding and other documents precede what is generated.
            attention_mask = None
            kwargs |= dict.fromkeys(("resets", "seq_idx", "position_ids"))
        elif not is_first_iteration:
            kwargs |= _continued(kwargs, input_ids.shape[1])
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return inputs | {"cache": cache}

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """Nothing: positions mean nothing to the model where no document starts."""

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of the next step."""
        arguments = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if not OUTPUT_HAS_CACHE and outputs.cache is not None:
            arguments["past_key_values"] = outputs.cache  # before 5.13 beam search reorders what has this name alone
        return arguments

    @staticmethod
    def _reorder_cache(cache: XLSTMLMCache, beam_idx: Tensor) -> XLSTMLMCache:
        """Continue the beams `beam_idx` in a beam search."""
        cache.reorder(beam_idx)
        return cache


def _given_cache(*caches: Any) -> XLSTMLMCache | None:
    """The cache that was given under any of its names.

    Raises:
        ValueError: it is none of this model, or there are two.
    """
    given = {id(cache): cache for cache in caches if cache is not None}
    if len(given) > 1:
        raise ValueError("cache, cache_params and past_key_values are three names of one thing; give one of them.")
    cache = next(iter(given.values()), None)
    if cache is not None and not isinstance(cache, XLSTMLMCache):
        raise ValueError(
            f"The cache (cache, cache_params or past_key_values) is a {type(cache).__name__}; a recurrent model "
            "continues only from an XLSTMLMCache, which it returns with use_cache=True."
        )
    return cache


def _continued(arguments: dict[str, Any], length: int) -> dict[str, Tensor]:
    """`resets` and `seq_idx` of a prompt, for as many positions, of which the last document has the new ones."""
    resets_BT, document_BT = arguments.get("resets"), arguments.get("seq_idx")
    continued = {}
    if resets_BT is not None:
        continued["resets"] = F.pad(resets_BT, (0, length - resets_BT.shape[1]))
    if document_BT is not None:
        new = length - document_BT.shape[1]
        continued["seq_idx"] = torch.cat((document_BT, document_BT[:, -1:].expand(-1, new)), dim=1)
    return continued


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    """Allow what transformers hands to every model; None is no argument."""
    for name, value in arguments.items():
        if value is None or name == "cache_position":  # the cache itself knows how many tokens it holds
            continue
        if name not in NEUTRAL_OPTIONS:
            raise TypeError(f"The model has no use for the argument {name!r} and would ignore it: leave it out.")
        if value != NEUTRAL_OPTIONS[name]:
            raise ValueError(f"{name}={value!r} is not possible: a recurrent model has no attention.")


if __name__ == "xlstm_lm.hub.modeling_xlstm_lm":  # not in the copy that an export brings along
    AutoConfig.register(XLSTMLMConfig.model_type, XLSTMLMConfig, exist_ok=True)
    AutoModel.register(XLSTMLMConfig, XLSTMLMModel, exist_ok=True)
    AutoModelForCausalLM.register(XLSTMLMConfig, XLSTMLMForCausalLM, exist_ok=True)
