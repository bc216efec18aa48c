"""Continue a text token by token, with the recurrent state as the only memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlstm_lm.base.fields import Count, NonNegative, PositiveRatio, Seed, check_fields
from xlstm_lm.base.finite import check_finite
from xlstm_lm.models.language_model import LanguageModel

GREEDY = 1e-6  # temperatures below would overflow, and draw the likeliest token in any case
PREFILL_TOKENS = 4096  # a longer prompt is read in pieces of this length, and memory does not grow with it


@dataclass(kw_only=True)
class SamplingConfig:
    """How the next token is drawn."""

    max_new_tokens: Count = 256
    """Tokens to generate at most."""
    temperature: NonNegative = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_p: PositiveRatio = 0.95
    """The likeliest tokens that together reach this probability are the candidates."""
    seed: Seed = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        check_fields(self)


def sample(logits_V: Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    """Draw one token id from logits (V,)."""
    if config.temperature < GREEDY:
        return int(logits_V.argmax())
    probability_V, token_V = torch.softmax(logits_V.float() / config.temperature, dim=-1).sort(descending=True)
    beyond_V = probability_V.cumsum(0) - probability_V >= config.top_p
    beyond_V[0] = False  # where top_p is too small for float32
    choice = torch.multinomial(probability_V.masked_fill(beyond_V, 0), 1, generator=generator)
    return int(token_V[choice])


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: list[int],
    config: SamplingConfig,
    stop_token: int | None = None,
    num_tokens: int | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt`, each as soon as it is known, until `stop_token` or `max_new_tokens`.

    Only ids below `num_tokens` are drawn: a model may have more rows in its head than the tokenizer has tokens. Time
    and memory for a token do not depend on how many came before it.

    Raises:
        ValueError: the prompt is empty, or the model's logits are not finite.
    """
    if not prompt:
        raise ValueError("The prompt has no token; give at least one character to continue.")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(config.seed)
    state: Any = None
    for piece_T in torch.tensor(prompt, device=device).split(PREFILL_TOKENS):
        hidden_BTD, state = model(piece_T.unsqueeze(0), state=state, return_state=True)
    token = None
    for _ in range(config.max_new_tokens):
        if token is not None:
            hidden_BTD, state = model.decode_step(torch.tensor([[token]], device=device), state)
        logits_V = model.logits(hidden_BTD[:, -1:])[0, -1, :num_tokens]
        check_finite(logits_V, model, "The model's logits")
        token = sample(logits_V, config, generator)
        if token == stop_token:
            return
        yield token


def continue_text(model: LanguageModel, tokenizer: Any, prompt: str, config: SamplingConfig) -> Iterator[str]:
    """Yield the text that follows `prompt`, in pieces, each as soon as it is known.

    The model sees the prompt as the beginning of a document, as in training.

    Raises:
        ValueError: the prompt is empty, or the model's logits are not finite.
    """
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError("The prompt is empty; give at least one character to continue.")
    decoder = tokenizer.decoder()
    end = tokenizer.end_of_document
    for token in generate(model, [end, *tokens], config, stop_token=end, num_tokens=tokenizer.vocab_size):
        yield decoder.push(token)
    yield decoder.finish()
