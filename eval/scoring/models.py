"""One interface to any causal language model: the loss of given tokens, logits of the next, and a carried state.

A run, a checkpoint, an export of xlstm_lm or a transformers `xlstm` folder is computed by our own modules; every other
folder or hub id by transformers. A model's abilities (a state of constant size, left padding) are found by a trial on a
few tokens, not from its name.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.bench import measure
from xlstm_lm.base.finite import check_finite
from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.run_layout import tokenizer_folder
from xlstm_lm.data import IGNORED_TARGET, Tokenizer, TokenizerConfig, build_tokenizer
from xlstm_lm.data.tokenizer import CONFIG_FILE
from xlstm_lm.hub import load
from xlstm_lm.hub.layouts import LAYOUTS, MODEL_TYPE
from xlstm_lm.hub.load import load_tokenizer_of
from xlstm_lm.runs.folder import read_config

OWN_MODEL_TYPES = (MODEL_TYPE, "xlstm")
LOGIT_ELEMENTS = 1 << 26  # logits that are formed at once, at most
DTYPES = {"float32": torch.float32, "float64": torch.float64} | measure.DTYPES
CACHE_NAMES = ("cache", "cache_params", "past_key_values")
"""The argument for the cache of a transformers model: the first for all models from 5.24 on, the second before for
recurrent models, the last for the others."""
Library = Literal["auto", "xlstm_lm", "transformers"]


class CausalModel(ABC):
    """A causal language model with its tokenizer, ready to score and to generate."""

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        tokenizer: Tokenizer,
        begin: int,
        always_begins: bool,
        trained_context: int | None,
        position_limit: int | None = None,
    ) -> None:
        """Wrap a module; `load_model` finds the arguments.

        Raises:
            ValueError: the tokenizer has more tokens than the model.
        """
        self.module = module
        self.name = name
        self.tokenizer = tokenizer
        self.begin = begin
        """The token in front of a document: the end of the one before, or the tokenizer's own beginning of text."""
        self.always_begins = always_begins
        """Whether every text starts with `begin`; otherwise only where there is nothing else to predict from."""
        self.trained_context = trained_context
        """Tokens of a training row; None where the folder does not name it."""
        self.position_limit = position_limit
        """Longest input: the rows of a learned position embedding; None for no limit."""
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.num_parameters = sum(each.numel() for each in module.parameters())
        if tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"The tokenizer of {name} has {tokenizer.vocab_size} tokens, but its model knows {self.vocab_size}: "
                "they do not belong together; put the tokenizer that the model was trained with into its folder."
            )
        self.carries_state, self.pads_left = self._try_out()

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Rows of the head."""

    @abstractmethod
    def forward(
        self, tokens_BT: Tensor, state: Any = None, return_state: bool = False, padding_B: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """The input of `logits` (B, T, D), and on request the state after the last token.

        `padding_B` tokens at the left of each row are ignored; a returned state remembers them.
        """

    @abstractmethod
    def logits(self, outputs_BTD: Tensor) -> Tensor:
        """Logits (B, T, V), in float32 at least."""

    def piece_length(self, rows: int, wanted: int) -> int:
        """Inputs a row, at most `wanted`, to compute at once for so many rows, with the state carried on."""
        return wanted

    @torch.inference_mode()
    def score(
        self, tokens_BT: Tensor, targets_BT: Tensor, state: Any = None, return_state: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
        """Nats of each target (B, T), 0 for a target of -100; whether it is the likeliest token (B, T); the state."""
        outputs_BTD, state = self.forward(tokens_BT, state, return_state)
        step = max(1, LOGIT_ELEMENTS // (len(tokens_BT) * self.vocab_size))
        nats, greedy = [], []
        for outputs, targets in zip(outputs_BTD.split(step, 1), targets_BT.split(step, 1), strict=True):
            logits_BTV = self.logits(outputs)
            flat = F.cross_entropy(
                logits_BTV.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="none"
            )
            nats.append(flat.view_as(targets))
            greedy.append(logits_BTV.argmax(-1) == targets)
        nats_BT = torch.cat(nats, 1)
        check_finite(nats_BT, self.module, f"The losses of {self.name}")
        return nats_BT, torch.cat(greedy, 1), state

    @torch.inference_mode()
    def next_logits(self, tokens_BT: Tensor, state: Any = None, padding_B: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits (B, V) of what follows the last token, of the tokenizer's tokens only, and the state."""
        outputs_BTD, state = self.forward(tokens_BT, state, True, padding_B)
        logits_BV = self.logits(outputs_BTD[:, -1:])[:, 0, : self.tokenizer.vocab_size]
        # An entry of -inf rules a token out.
        check_finite(logits_BV.logsumexp(-1), self.module, f"The logits of {self.name}")
        return logits_BV, state

    @torch.inference_mode()
    def _try_out(self) -> tuple[bool, bool]:
        """Whether pieces with a state of constant size equal the whole, and whether left padding changes nothing."""
        length = min(24, self.position_limit or 24)
        cut = length // 3 + 1
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(self.tokenizer.vocab_size, (1, length), generator=generator).to(self.device)
        whole_BTV = self.logits(self.forward(tokens_BT)[0])
        check_finite(whole_BTV.logsumexp(-1), self.module, f"The logits of {self.name}")
        tolerance = (1e-4 if self.dtype in (torch.float32, torch.float64) else 0.05) * float(whole_BTV.std())

        def same(first: Tensor, second: Tensor) -> bool:
            return bool((first - second).abs().max() <= tolerance)

        first, state = self.forward(tokens_BT[:, :cut], return_state=True)
        size = state_bytes(state)
        second, state = self.forward(tokens_BT[:, cut:], state, return_state=True)
        carries = state_bytes(state) == size and same(self.logits(torch.cat((first, second), 1)), whole_BTV)
        padded_BT = torch.cat((torch.full_like(tokens_BT[:, cut:], self.begin), tokens_BT[:, :cut]), 1)
        padding_B = torch.tensor([length - cut], device=self.device)
        first, state = self.forward(padded_BT, return_state=True, padding_B=padding_B)
        second, _ = self.forward(tokens_BT[:, cut : cut + 1], state, return_state=True)
        padded_BTV = self.logits(torch.cat((first[:, length - cut :], second), 1))
        return carries, same(padded_BTV, whole_BTV[:, : cut + 1])


class OwnModel(CausalModel):
    """A model of xlstm_lm's own families: a document's start empties the state, and so all padding before it."""

    @property
    def vocab_size(self) -> int:
        return self.module.config.vocab_size

    def forward(self, tokens_BT, state=None, return_state=False, padding_B=None):
        resets_BT = None
        if padding_B is not None:
            resets_BT = torch.arange(tokens_BT.shape[1], device=self.device) == padding_B.unsqueeze(1)
        if not return_state:
            return self.module(tokens_BT, resets_BT, state), None
        return self.module(tokens_BT, resets_BT, state, return_state=True)

    def logits(self, outputs_BTD):
        return self.module.logits(outputs_BTD)


class TransformersModel(CausalModel):
    """A causal model of transformers. Its state is its cache and, after left padding, the mask of all tokens so far."""

    @property
    def vocab_size(self) -> int:
        return self.module.get_output_embeddings().weight.shape[0]

    def forward(self, tokens_BT, state=None, return_state=False, padding_B=None):
        known = inspect.signature(self.module.forward).parameters
        cache_name = next(name for name in CACHE_NAMES if name in known or name == CACHE_NAMES[-1])
        cache, mask_BT = state or (None, None)
        if padding_B is not None:
            mask_BT = (torch.arange(tokens_BT.shape[1], device=self.device) >= padding_B.unsqueeze(1)).long()
        elif mask_BT is not None:
            mask_BT = torch.cat((mask_BT, torch.ones_like(tokens_BT)), 1)
        arguments: dict[str, Any] = {}
        if mask_BT is not None:
            # A recurrent model needs the mask of the tokens given, attention that of all it can see.
            recurrent = cache is not None and all(getattr(cache, "is_linear", (cache_name == "cache_params",)))
            arguments["attention_mask"] = mask_BT[:, -tokens_BT.shape[1] :] if recurrent else mask_BT
            if "position_ids" in known:
                arguments["position_ids"] = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -tokens_BT.shape[1] :]
        if cache is not None:
            arguments[cache_name] = cache
        output = self.module(tokens_BT, use_cache=return_state, **arguments)
        return output.logits, (getattr(output, cache_name), mask_BT) if return_state else None

    def piece_length(self, rows, wanted):
        # All logits of a piece are there at once.
        return min(wanted, max(64, LOGIT_ELEMENTS // (rows * self.vocab_size)))

    def logits(self, outputs_BTD):
        return outputs_BTD.to(torch.promote_types(outputs_BTD.dtype, torch.float32))


def load_model(
    path: str,
    *,
    library: Library = "auto",
    device: str | None = None,
    dtype: str = "float32",
    trained_context: int | None = None,
) -> CausalModel:
    """The model of a run, a checkpoint, an export, a transformers folder or (through transformers) a hub id.

    Args:
        path: folder, or id on the hub.
        library: who computes it; auto takes ours for runs, checkpoints and the model types xlstm_lm and xlstm.
        device: by default cuda where there is one.
        dtype: of the weights.
        trained_context: tokens of a training row, where the folder does not say or says otherwise.

    Raises:
        ValueError: there is no model or no tokenizer, files are missing or damaged, or tokenizer and model do not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: {', '.join(DTYPES)} are.")
    place = pick_device(device)
    # Gates let states fade through numbers that a CPU computes with a hundred times more slowly.
    torch.set_flush_denormal(True)
    folder = Path(path)
    model_type = _model_type(folder)
    if library == "auto":
        # Of other model types that we can read (llama, mamba), a folder may use what our modules do not have.
        other = model_type is not None and model_type not in OWN_MODEL_TYPES
        ours = not other and any(layout.recognises(folder) for layout in LAYOUTS.values())
        library = "xlstm_lm" if ours else "transformers"
    if library == "xlstm_lm":
        trained = load(folder)
        module, tokenizer, folder = trained.model, trained.tokenizer, trained.folder
        context, limit = None, None
    else:
        module, context, limit = _load_transformers(path)
        tokenizer = _load_tokenizer(path)
    begin, always = tokenizer.end_of_document, True
    of_ours = any((where / CONFIG_FILE).is_file() for where in (folder, tokenizer_folder(folder)))
    if not of_ours and model_type != MODEL_TYPE:
        begin, always = _beginning(str(folder), tokenizer)
    kind = OwnModel if library == "xlstm_lm" else TransformersModel
    module = module.to(device=place, dtype=DTYPES[dtype]).eval()
    return kind(
        module,
        name=path,
        tokenizer=tokenizer,
        begin=begin,
        always_begins=always,
        trained_context=trained_context or _trained_context(folder) or context,
        position_limit=limit,
    )


def pick_device(name: str | None) -> torch.device:
    """The device of that name, by default cuda where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"There is no device {name!r} here ({reason}); give cpu or cuda.") from error


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a state, however nested."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)
        elif type(value).__module__.startswith("transformers") and hasattr(value, "__dict__"):
            visit(vars(value))

    visit(state)
    return sum(seen.values())


def _model_type(folder: Path) -> str | None:
    file = folder / "config.json"
    return read_json(file, repeated_keys=True).get("model_type") if file.is_file() else None


def _trained_context(folder: Path) -> int | None:
    """The row length in the recipe beside the weights of a checkpoint or an export; None without a recipe."""
    recipes = [folder / name for name in ("config.yaml", "recipe.yaml") if (folder / name).is_file()]
    return read_config(recipes[0]).get("data", {}).get("context_length") if recipes else None


def _load_transformers(path: str) -> tuple[nn.Module, int | None, int | None]:
    """A transformers model, the context its configuration names, and the rows of its learned positions, if any."""
    from transformers import AutoModelForCausalLM

    try:
        module, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} holds no model that can be loaded ({reason}); give a run, a checkpoint, an export, or a folder or "
            "hub id of a causal model that transformers knows."
        ) from error
    problems = {name: sorted(found[name]) for name in ("missing_keys", "mismatched_keys") if found.get(name)}
    if problems:
        raise ValueError(f"The tensors of {path} do not fit its configuration: {problems}.")
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    context = next((value for name in names if (value := getattr(module.config, name, None))), None)
    inputs = module.get_input_embeddings()
    learned = [
        each.num_embeddings
        for each in module.modules()
        if isinstance(each, nn.Embedding) and each is not inputs and context and 0 <= each.num_embeddings - context <= 2
    ]
    return module, context, context if learned else None


def _load_tokenizer(path: str) -> Tokenizer:
    folder = Path(path)
    if folder.is_dir():
        return load_tokenizer_of(folder)
    return build_tokenizer(TokenizerConfig(kind="huggingface", name=path))


def _beginning(path: str, tokenizer: Tokenizer) -> tuple[int, bool]:
    """The token that begins a text for this tokenizer, and whether the tokenizer adds it itself."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer_folder(Path(path))))
    begin = tokenizer.end_of_document if loaded.bos_token_id is None else loaded.bos_token_id
    return begin, loaded("a")["input_ids"][:1] == [begin]
