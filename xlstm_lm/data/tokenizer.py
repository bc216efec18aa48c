"""Text to token ids and back: bytes, or any Hugging Face tokenizer."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from xlstm_lm.base.fields import check_fields

END_OF_DOCUMENT = "<|endoftext|>"
CONFIG_FILE = "xlstm_lm_tokenizer.json"


@dataclass(kw_only=True)
class TokenizerConfig:
    """How text becomes tokens."""

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


class IncrementalDecoder(Protocol):
    """Turns ids into text one at a time, holding back the bytes of a character until it is complete."""

    def push(self, token: int) -> str:
        """The text that has become certain with `token`, possibly empty."""

    def finish(self) -> str:
        """The text of what was held back; incomplete characters become U+FFFD."""


class Tokenizer(Protocol):
    """What the rest of the program asks of a tokenizer."""

    vocab_size: int
    """Number of ids; every id is below it."""
    end_of_document: int
    """Id of the token between documents."""
    bytes_per_token: torch.Tensor
    """Bytes of text each id stands for, int64 (V,); 0 for the end of a document."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end of document."""

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as int32 array."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def decoder(self) -> IncrementalDecoder:
        """A fresh incremental decoder."""

    def fingerprint(self) -> str:
        """Changes when the ids of some text would."""

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer so that `load_tokenizer` and `transformers.AutoTokenizer` can read it."""


class ByteDecoder:
    """Incremental decoder over the bytes that each id stands for."""

    def __init__(self, token_bytes: list[bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._token_bytes[token])

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteTokenizer:
    """A token for each byte of the UTF-8 text, and one for the end of a document."""

    vocab_size = 257
    end_of_document = 256

    def __init__(self) -> None:
        self.bytes_per_token = torch.ones(self.vocab_size, dtype=torch.int64)
        self.bytes_per_token[self.end_of_document] = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """As `Tokenizer.decode`; an end of document is shown as its token."""
        return b"".join(self._token_bytes()[token] for token in ids).decode(errors="replace")

    def decoder(self) -> IncrementalDecoder:
        return ByteDecoder(self._token_bytes())

    def fingerprint(self) -> str:
        return "bytes"

    def save(self, folder: str | Path) -> None:
        """Write it as a byte-level BPE without merges, which is the same mapping in Hugging Face's terms."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in _byte_characters().items()}
        backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_DOCUMENT])
        save_tokenizer(backend, TokenizerConfig(kind="bytes"), END_OF_DOCUMENT, Path(folder))

    @staticmethod
    def _token_bytes() -> list[bytes]:
        return [bytes([byte]) for byte in range(256)] + [END_OF_DOCUMENT.encode()]


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library, as `transformers.AutoTokenizer` finds it.

    Text that looks like a special token is encoded as plain text: a document cannot contain an end of document.
    `bytes_per_token` is exact for byte-level BPE. For other kinds (SentencePiece, WordPiece) it counts the bytes of the
    token's written form, with the word mark counted as one space; normalisation may make the text's own count differ.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        """Load it.

        Raises:
            ValueError: nothing to load under that name, no fast version, or no such end-of-document token.
        """
        from transformers import AutoTokenizer

        assert config.kind == "huggingface"
        try:
            loaded = AutoTokenizer.from_pretrained(config.name, revision=config.revision or "main")
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"no tokenizer could be loaded from {config.name!r} ({reason}): name a folder with a tokenizer.json or "
                "an id on the Hugging Face hub, or set tokenizer.kind: bytes"
            ) from None
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"tokenizer {config.name!r} exists only in slow Python ({type(loaded).__name__}): choose one with a "
                "tokenizer.json"
            )
        end = config.end_of_document or loaded.eos_token
        if end is None:
            raise ValueError(
                f"tokenizer {config.name!r} has no end-of-sequence token: set tokenizer.end_of_document to one of its "
                f"tokens, such as {_some_special_tokens(backend)}"
            )
        end_id = backend.token_to_id(end)
        if end_id is None:
            raise ValueError(
                f"tokenizer.end_of_document {end!r} is not a token of {config.name!r}; its special tokens: "
                f"{_some_special_tokens(backend)}"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._config = TokenizerConfig(kind="huggingface", name=str(config.name), end_of_document=end)
        self.end_of_document: int = end_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._token_bytes, self._byte_level = _bytes_of_tokens(backend, self.vocab_size)
        self.bytes_per_token = torch.tensor([len(token) for token in self._token_bytes], dtype=torch.int64)
        self.bytes_per_token[end_id] = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # the library's pickle forgets it

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.asarray(self.encode(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def decoder(self) -> IncrementalDecoder:
        return ByteDecoder(self._token_bytes) if self._byte_level else _BackendDecoder(self._backend)

    def fingerprint(self) -> str:
        parts = json.loads(self._backend.to_str())
        del parts["post_processor"]  # adds special tokens, which `encode` never asks for
        written = json.dumps([parts, self.end_of_document], sort_keys=True)
        return hashlib.sha256(written.encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        end = self._config.end_of_document
        assert end is not None
        save_tokenizer(self._backend, self._config, end, Path(folder))


class _BackendDecoder:
    """Incremental decoder for tokenizers whose ids do not stand for fixed bytes."""

    def __init__(self, backend: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=False)

    def push(self, token: int) -> str:
        return self._stream.step(self._backend, token) or ""

    def finish(self) -> str:
        return ""


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` describes.

    Raises:
        ValueError: it cannot be loaded, or has no end-of-document token.
    """
    return ByteTokenizer() if config.kind == "bytes" else HuggingFaceTokenizer(config)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that was written to `folder` by its `save` or by `train_bpe`, or any in Hugging Face's layout.

    Raises:
        ValueError: the folder holds no tokenizer.
    """
    written = Path(folder) / CONFIG_FILE
    config = TokenizerConfig(**json.loads(written.read_text())) if written.exists() else None
    if config is not None and config.kind == "bytes":
        return ByteTokenizer()
    end = None if config is None else config.end_of_document
    return HuggingFaceTokenizer(TokenizerConfig(kind="huggingface", name=str(folder), end_of_document=end))


def save_tokenizer(backend: Any, config: TokenizerConfig, end_of_document: str, folder: Path) -> None:
    """Write a tokenizer of the `tokenizers` library in Hugging Face's layout, and `config` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    # This class name is known to every version of transformers that has fast tokenizers.
    layout = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_document,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(layout, indent=2) + "\n")
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n")


def _some_special_tokens(backend: Any) -> str:
    tokens = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    return ", ".join(repr(token) for token in tokens[:8]) or "(it has no special tokens)"


def _byte_characters() -> dict[int, str]:
    """The printable character by which byte-level BPE writes each byte (the alphabet of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _bytes_of_tokens(backend: Any, vocab_size: int) -> tuple[list[bytes], bool]:
    """The bytes each id stands for (ids without a token: none), and whether they are exact (byte-level BPE)."""
    byte_level = '"type":"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"], separators=(",", ":"))
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    added = backend.get_added_tokens_decoder()
    token_bytes = [b""] * vocab_size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index in added:
            token_bytes[index] = added[index].content.encode()
        elif byte_level and all(character in byte_of for character in token):
            token_bytes[index] = bytes(byte_of[character] for character in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            token_bytes[index] = bytes([int(token[3:5], 16)])
        else:
            token_bytes[index] = token.removeprefix("##").replace("▁", " ").encode()
    return token_bytes, byte_level
