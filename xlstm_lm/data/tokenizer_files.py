"""A tokenizer's settings, and the files in which it is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from xlstm_lm.base.fields import check_fields

END_OF_DOCUMENT = "<|endoftext|>"
CONFIG_FILE = "xlstm_lm_tokenizer.json"


@dataclass(kw_only=True)
class TokenizerConfig:
    """A tokenizer: bytes, or one in Hugging Face's layout."""

    kind: Literal["bytes", "huggingface"] = "bytes"
    """bytes: 256 byte values and an end of document, nothing to download; huggingface: the tokenizer of `name`."""
    name: str | None = None
    """Folder, or id on the Hugging Face hub (kind huggingface), such as gpt2 or EleutherAI/gpt-neox-20b."""
    revision: str | None = None
    """Commit, tag or branch of a tokenizer on the hub."""
    end_of_document: str | None = None
    """Token that stands between documents (kind huggingface); by default the tokenizer's end-of-sequence token."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind == "huggingface" and not self.name:
            raise ValueError("tokenizer kind huggingface needs a name: a folder or an id on the hub, such as gpt2")
        if self.kind == "bytes" and (self.name or self.revision or self.end_of_document):
            raise ValueError(
                "tokenizer kind bytes takes no name, revision or end_of_document; for a tokenizer with a name set "
                "kind: huggingface"
            )


def is_fault_of_library(error: BaseException) -> bool:
    """Whether the `tokenizers` library raised it: a plain Exception, or a panic, which is not derived from that."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def unreadable(name: object, error: BaseException) -> ValueError:
    """The message for a tokenizer that is not there, or whose files cannot be read."""
    reason = str(error).strip().split("\n")[0]
    is_damaged = isinstance(error, json.JSONDecodeError)
    if isinstance(error, (OSError, ValueError, KeyError, ImportError)) and not is_damaged:
        return ValueError(
            f"no tokenizer could be loaded from {name!r} ({reason}): name a folder with a tokenizer.json or an id on "
            "the Hugging Face hub, or set tokenizer.kind: bytes"
        )
    return ValueError(
        f"the tokenizer files of {name!r} cannot be read ({reason}): they are damaged, or made by a newer version of "
        f"the tokenizers library than {version('tokenizers')}, which is installed; copy them again, or pip install -U "
        "tokenizers transformers"
    )


def save_tokenizer(
    backend: Any, config: TokenizerConfig, end_of_document: str, folder: Path, settings: Mapping[str, Any] | None = None
) -> None:
    """Write a tokenizer of the `tokenizers` library in Hugging Face's layout, and `config` beside it.

    `settings` are further entries of tokenizer_config.json, such as a chat template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    # This class name is known to every version of transformers that has fast tokenizers.
    layout = {
        "eos_token": end_of_document,
        **(settings or {}),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, values in (("tokenizer_config.json", layout), (CONFIG_FILE, asdict(config))):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
