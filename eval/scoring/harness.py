"""Adapter of a `CausalModel` to lm-evaluation-harness: log-likelihoods, whole documents, and generation, in batches.

Scores do not depend on the batch: rows are padded on the right where tokens are scored, and on the left where they are
continued if the model proves to ignore that, otherwise only prompts of one length share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from eval.scoring.models import CausalModel
from eval.scoring.sequences import check_window, score_sequences
from xlstm_lm.models.generation import SamplingConfig, sample

BATCHES_AT_ONCE = 64  # requests are sorted by length among so many batches, and progress is shown after them
SAMPLING_ARGUMENTS = {"do_sample", "temperature", "top_p", "until", "max_gen_toks"}


class HarnessModel(TemplateLM):
    """Answers lm_eval's three kinds of requests with a model of any kind."""

    def __init__(self, model: CausalModel, *, batch_size: int = 8, window: int | None = None, seed: int = 0) -> None:
        """Wrap a model.

        Args:
            model: from `eval.scoring.models.load_model`.
            batch_size: rows in a batch; changes no score.
            window: None carries the state through contexts and documents of any length; a number cuts contexts to their
                last so many tokens, and documents into windows of so many, as lm_eval's own backend does.
            seed: of sampled generations.

        Raises:
            ValueError: the model cannot carry its state and no window is given, or the window cannot be.
        """
        super().__init__()
        if window is None and not model.carries_state:
            raise ValueError(f"{model.name} keeps no state of constant size: give the context length it is to see.")
        if window is not None:
            check_window(model, window, window)
        self.model, self.window, self.seed = model, window, seed
        self.batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        return self.model.begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begins = self.model.always_begins if add_special_tokens is None else add_special_tokens
        return [self.model.begin] * begins + self.model.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        kept = None if self.window is None else self.window + 1
        sequences = []
        for (context, continuation), context_tokens, continuation_tokens in requests:
            if not continuation_tokens or (kept and len(continuation_tokens) >= kept):
                raise ValueError(
                    f"The continuation {continuation[:80]!r} of {context[-80:]!r} has {len(continuation_tokens)} "
                    f"tokens; it must have at least one{f' and at most {self.window}' if self.window else ''}."
                )
            elements = (context_tokens or [self.model.begin]) + continuation_tokens
            sequences.append(np.array(elements[-(kept or 0) :], dtype=np.int64))
        answers = []
        scores = self._scores(sequences, "log-likelihoods", disable_tqdm)
        for (_, _, continuation_tokens), (nats, greedy) in zip(requests, scores, strict=True):
            scored = slice(-len(continuation_tokens), None)
            answers.append((-float(nats[scored].sum(dtype=np.float64)), bool(greedy[scored].all())))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole documents, each token given all before it or its window, the first given `begin`."""
        texts = [request.args[0] for request in requests]
        sequences = [np.array([self.model.begin, *self.model.tokenizer.encode(text)], dtype=np.int64) for text in texts]
        scores = self._scores(sequences, "documents", disable_tqdm)
        return [-float(nats.sum(dtype=np.float64)) for nats, _ in scores]

    def _scores(
        self, sequences: list[np.ndarray], what: str, disable_tqdm: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        step = self.batch_size * BATCHES_AT_ONCE
        with tqdm(total=len(order), desc=what, disable=disable_tqdm) as progress:
            for first in range(0, len(order), step):
                part = order[first : first + step]
                scores = score_sequences(
                    self.model, [sequences[index] for index in part], batch_size=self.batch_size, window=self.window
                )
                found |= {index: (score.nats, score.greedy) for index, score in zip(part, scores, strict=True)}
                progress.update(len(part))
        return (found[index] for index in range(len(sequences)))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt until a stop string, the end of a document or the limit of tokens."""
        groups: dict[tuple[str, int], list[int]] = {}
        prompts, settings = [], []
        for index, request in enumerate(requests):
            context, arguments = request.args
            arguments = normalize_gen_kwargs(arguments)
            unknown = sorted(arguments.keys() - SAMPLING_ARGUMENTS)
            if unknown:
                raise ValueError(
                    f"generation with {', '.join(unknown)} is not known here; known are "
                    f"{', '.join(sorted(SAMPLING_ARGUMENTS))}."
                )
            prompt = self.tok_encode(context) or [self.model.begin]
            if self.window is not None:
                room = self.window - arguments["max_gen_toks"]
                if room < 1:
                    raise ValueError(
                        f"{arguments['max_gen_toks']} tokens are to be generated, which leaves no room for a prompt in "
                        f"a context of {self.window}; give a longer one."
                    )
                prompt = prompt[-room:]
            prompts.append(prompt)
            settings.append(arguments)
            # Prompts of different lengths share a batch only where padding changes nothing.
            key = repr(sorted(arguments.items())), 0 if self.model.pads_left else len(prompt)
            groups.setdefault(key, []).append(index)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generations", disable=disable_tqdm) as progress:
            for group in groups.values():
                group.sort(key=lambda index: -len(prompts[index]))
                for first in range(0, len(group), self.batch_size):
                    batch = group[first : first + self.batch_size]
                    found = self._generate([prompts[index] for index in batch], settings[batch[0]], batch)
                    texts |= dict(zip(batch, found, strict=True))
                    progress.update(len(batch))
        return [texts[index] for index in range(len(requests))]

    def _generate(self, prompts: list[list[int]], arguments: dict[str, Any], seeds: list[int]) -> list[str]:
        """The texts that follow prompts (longest first), each row with a random generator of its own."""
        model = self.model
        sampling = SamplingConfig(
            max_new_tokens=arguments["max_gen_toks"],
            temperature=arguments.get("temperature", 0.0) if arguments["do_sample"] else 0.0,
            top_p=arguments.get("top_p", 1.0),
        )
        until = [stop for stop in arguments["until"] if stop]
        generators = [torch.Generator(model.device).manual_seed(self.seed + index) for index in seeds]
        longest = len(prompts[0])
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[model.begin] * number + prompt for number, prompt in zip(padding, prompts, strict=True)]
        tokens_BT = torch.tensor(rows, device=model.device)
        padding_B = torch.tensor(padding, device=model.device) if any(padding) else None
        logits_BV, state = model.next_logits(tokens_BT, padding_B=padding_B)
        decoders = [model.tokenizer.decoder() for _ in prompts]
        texts = [""] * len(prompts)
        running = set(range(len(prompts)))
        for _ in range(sampling.max_new_tokens):
            chosen = []
            for row, logits_V in enumerate(logits_BV):
                token = self.eot_token_id
                if row in running:
                    token = sample(logits_V, sampling, generators[row])
                    if token != self.eot_token_id:
                        texts[row] += decoders[row].push(token)
                    if token == self.eot_token_id or any(stop in texts[row] for stop in until):
                        running.remove(row)
                chosen.append(token)
            if not running:
                break
            logits_BV, state = model.next_logits(torch.tensor(chosen, device=model.device).unsqueeze(1), state)
        texts = [text + decoder.finish() for text, decoder in zip(texts, decoders, strict=True)]
        return [postprocess_generated_text(text, until, None) for text in texts]
