"""Text to token ids and back: bytes, or any Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from xlstm_lm.base.read_files import read_json
from xlstm_lm.data.byte_tokenizer import ByteTokenizer
from xlstm_lm.data.chat import ChatTemplate
from xlstm_lm.data.huggingface_tokenizer import HuggingFaceTokenizer
from xlstm_lm.data.tokenizer_files import CONFIG_FILE, TokenizerConfig


class IncrementalDecoder(Protocol):
    """Turns ids into text one at a time, holding back the bytes of a character until it is complete."""

    def push(self, token: int) -> str:
        """The text that has become certain with `token`, possibly empty."""

    def finish(self) -> str:
        """The text of what was held back; incomplete characters become U+FFFD."""


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    vocab_size: int
    """Number of ids; every id is below it."""
    end_of_document: int
    """Id of the token between documents."""
    name: str
    """Name in messages."""
    chat: ChatTemplate | None
    """The chat template; None without one."""
    bytes_per_token: torch.Tensor
    """Bytes of text each id stands for, int64 (V,); 0 for the end of a document and an unknown token."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end of document."""

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as int32 array."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode_array` of each text, faster for many short ones. All of them can be encoded."""

    def encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        """`encode_array` in pieces, each encoded on demand, which bounds the memory that a long text needs."""

    def missing_bytes(self, text: str) -> int:
        """UTF-8 bytes of the characters of `text` that its ids leave out or write as an unknown token."""

    def problem(self, text: str) -> str | None:
        """The reason why `text` cannot be encoded; None if it can."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def decoder(self) -> IncrementalDecoder:
        """A fresh incremental decoder."""

    def fingerprint(self) -> str:
        """Changes when the ids of some text would."""

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer for `load_tokenizer` and `transformers.AutoTokenizer`."""


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` describes.

    Raises:
        ValueError: it cannot be loaded, or has no end-of-document token.
    """
    return ByteTokenizer() if config.kind == "bytes" else HuggingFaceTokenizer(config)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that was written to `folder` by its `save` or by `train_bpe`, or any in Hugging Face's layout.

    Raises:
        ValueError: the folder holds no tokenizer, or a file of it is damaged.
    """
    written = Path(folder) / CONFIG_FILE
    config = _read_config(written) if written.exists() else None
    if config is not None and config.kind == "bytes":
        return ByteTokenizer()
    end = None if config is None else config.end_of_document
    return HuggingFaceTokenizer(TokenizerConfig(kind="huggingface", name=str(folder), end_of_document=end))


def _read_config(path: Path) -> TokenizerConfig:
    values = read_json(path)
    try:
        return TokenizerConfig(**values)
    except TypeError as error:
        raise ValueError(f"{path} is not the description of a tokenizer that `save` writes: {error}.") from None
