"""The tokenizers of the `tokenizers` library."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.paths import user_path
from xlstm_lm.data.byte_tokenizer import ByteDecoder, byte_characters
from xlstm_lm.data.chat import ChatTemplate
from xlstm_lm.data.cuts import Cuts
from xlstm_lm.data.encoder import encoder_without, fallback, never_writes, unknown_token
from xlstm_lm.data.match_boundaries import UnknownBoundariesError
from xlstm_lm.data.tokenizer_files import TokenizerConfig, is_fault_of_library, save_tokenizer, unreadable

PIECE_CHARACTERS = 1 << 16  # a text is encoded in pieces of so many characters, or as few more as it can
LONG_PIECE = 1 << 22
BYTES_PER_CHARACTER = 250  # of memory, while the library encodes
NO_LIMIT = 10**18  # transformers' model_max_length where there is none is about 10**30


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library, as `transformers.AutoTokenizer` finds it.

    Text that looks like a special token is encoded as plain text: a document cannot contain an end of document.
    `bytes_per_token` is exact for byte-level BPE. For other kinds (SentencePiece, WordPiece) it counts the bytes of the
    token's written form, with the word mark counted as one space; normalisation may make the text's own count differ.
    An unknown token stands for no bytes.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        """Load it.

        Raises:
            ValueError: nothing to load under that name, no fast version, or no such end-of-document token.
        """
        from transformers import AutoTokenizer

        assert config.kind == "huggingface" and config.name is not None
        try:
            name = str(user_path(config.name)) if config.name.startswith("~") else config.name
            loaded = AutoTokenizer.from_pretrained(name, revision=config.revision or "main")
        except BaseException as error:
            if not is_fault_of_library(error):
                raise
            raise unreadable(config.name, error) from None
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
        parts = json.loads(backend.to_str())
        self._backend = backend
        self._settings = _settings(loaded)
        self._encoder = backend if never_writes(parts, end) else encoder_without(parts, end, str(config.name))
        self._backend.encode_special_tokens = self._encoder.encode_special_tokens = True
        self._fallback = fallback(parts)
        self._leaves_out = self._fallback == "nothing"
        self._config = TokenizerConfig(kind="huggingface", name=str(config.name), end_of_document=end)
        self.name = str(config.name)
        self.end_of_document: int = end_id
        self.chat = _chat_template(loaded, backend, self._encoder, end_id)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._token_bytes, self._byte_level = _bytes_of_tokens(backend, parts["decoder"], self.vocab_size)
        self.bytes_per_token = torch.tensor([len(token) for token in self._token_bytes], dtype=torch.int64)
        self.bytes_per_token[end_id] = 0
        self._unknown_id: int | None = None
        if self._fallback == "unknown":
            self._unknown_id = backend.token_to_id(unknown_token(parts["model"]))
            self.bytes_per_token[self._unknown_id] = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cuts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = self._encoder.encode_special_tokens = True  # its pickle forgets that

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end of document.

        Raises:
            ValueError: the tokenizer has no way to write `text`.
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as int32 array."""
        return np.concatenate(list(self.encode_pieces(text)))

    def encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        """`encode_array` in pieces, each encoded on demand. Raises the errors of `encode`."""
        for piece in self._pieces(text):
            encoding = self._encode(piece)
            ids = np.asarray(encoding.ids, dtype=np.int32)
            if self._leaves_out and (missing := self._missing_bytes(piece, encoding)):
                announce_once(
                    f"tokenizer {self._config.name} has neither a token nor an unknown token for some characters: they "
                    f"are left out of the training data, and of bits per byte ({missing} bytes in the first such text)"
                )
                self._leaves_out = False
            yield ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode_array` of each text, by as many threads as the library may use. Raises the errors of `encode`."""
        if self._leaves_out or self._fallback == "error":  # needs a look at each text
            return [self.encode_array(text) for text in texts]
        pieces = [list(self._pieces(text)) for text in texts]
        encodings = iter(
            self._encoder.encode_batch_fast([each for text in pieces for each in text], add_special_tokens=False)
        )
        ids = [[np.asarray(next(encodings).ids, dtype=np.int32) for _ in text] for text in pieces]
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in ids]

    def missing_bytes(self, text: str) -> int:
        """UTF-8 bytes of `text` missing from its ids; white space is never counted. Raises the errors of `encode`."""
        if self._fallback == "bytes":
            return 0
        return sum(self._missing_bytes(piece, self._encode(piece)) for piece in self._pieces(text))

    def problem(self, text: str) -> str | None:
        """The reason why `text` cannot be encoded; None if it can."""
        if self._fallback != "error":
            return None  # without the cost of encoding
        try:
            for piece in self._pieces(text):
                self._encode(piece)
        except ValueError as error:
            return str(error)
        return None

    def _encode(self, piece: str) -> Any:
        try:
            return self._encoder.encode(piece, add_special_tokens=False)
        except BaseException as error:
            if not is_fault_of_library(error):
                raise
            raise ValueError(
                f"tokenizer {self._config.name} cannot encode a text ({error}): choose a tokenizer that can write any "
                "text, or give this one an unknown token"
            ) from None

    def _pieces(self, text: str) -> Iterator[str]:
        """Parts of `text` whose ids, one after another, are those of the whole."""
        begin = 0
        while begin < len(text) or begin == 0:
            end = len(text)
            if end - begin > PIECE_CHARACTERS:
                end = self._cuts.after(text, begin + PIECE_CHARACTERS) if self._cuts else end
                if end - begin > LONG_PIECE:
                    announce_once(
                        f"tokenizer {self._config.name} gets {end - begin:,} characters of one document at once, as it "
                        "has no boundary in them that is certain: this may take minutes, and about "
                        f"{(end - begin) * BYTES_PER_CHARACTER / 1e9:.1f} GB of memory"
                    )
            skipped = begin > 0 and self._cuts is not None and self._cuts.leading_space
            yield text[begin + skipped : end]
            begin = max(end, 1)

    @functools.cached_property
    def _cuts(self) -> Cuts | None:
        normalizer = self._encoder.normalizer
        normalize = normalizer.normalize_str if normalizer is not None else str
        try:
            return Cuts(json.loads(self._encoder.to_str()), normalize)
        except UnknownBoundariesError as reason:
            announce_once(f"tokenizer {self._config.name} encodes a long document as a whole: {reason}")
            return None

    def _missing_bytes(self, piece: str, encoding: Any) -> int:
        if self._byte_level:
            return max(0, len(piece.encode()) - int(self.bytes_per_token[encoding.ids].sum()))
        changes = np.zeros(len(piece) + 1, dtype=np.int64)
        # An unknown token outweighs others at a character: a word mark has the offsets of the character after it.
        weights = [-len(encoding.ids) if token == self._unknown_id else 1 for token in encoding.ids]
        for end, sign in enumerate((1, -1)):
            np.add.at(changes, [offsets[end] for offsets in encoding.offsets], np.multiply(sign, weights))
        uncovered = np.flatnonzero(changes.cumsum()[:-1] <= 0)
        return sum(len(piece[index].encode()) for index in uncovered if not piece[index].isspace())

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def decoder(self) -> ByteDecoder | _BackendDecoder:
        return ByteDecoder(self._token_bytes) if self._byte_level else _BackendDecoder(self._backend)

    def fingerprint(self) -> str:
        parts = json.loads(self._backend.to_str())
        del parts["post_processor"]  # adds special tokens, which `encode` never asks for
        written = json.dumps([parts, self.end_of_document], sort_keys=True)
        return hashlib.sha256(written.encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        end = self._config.end_of_document
        assert end is not None
        save_tokenizer(self._backend, self._config, end, Path(folder), self._settings)


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


def _some_special_tokens(backend: Any) -> str:
    tokens = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    return ", ".join(repr(token) for token in tokens[:8]) or "(it has no special tokens)"


def _settings(loaded: Any) -> dict[str, Any]:
    """The entries of tokenizer_config.json that training does not need, but whoever uses the model later does."""
    settings: dict[str, Any] = {
        name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)
    }
    known = set(settings.values())
    more = [str(token) for token in loaded.all_special_tokens if str(token) not in known]
    if more:
        settings["additional_special_tokens"] = more
    settings["padding_side"], settings["truncation_side"] = loaded.padding_side, loaded.truncation_side
    if loaded.model_max_length < NO_LIMIT:
        settings["model_max_length"] = loaded.model_max_length
    template = loaded.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": each} for name, each in template.items()]
    return settings | ({"chat_template": template} if template else {})


def _chat_template(loaded: Any, backend: Any, encoder: Any, end_of_document: int) -> ChatTemplate | None:
    """The chat template of a tokenizer of transformers; of several, the one called default."""
    template = loaded.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        return None
    names = {name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    added = backend.get_added_tokens_decoder()
    special = {index: token.content for index, token in added.items() if token.special}
    return ChatTemplate(template, names, special, encoder, end_of_document)


def _bytes_of_tokens(backend: Any, decoder: Any, vocab_size: int) -> tuple[list[bytes], bool]:
    """The bytes each id stands for (ids without a token: none), and whether they are exact (byte-level BPE)."""
    byte_level = '"type": "ByteLevel"' in json.dumps(decoder)
    byte_of = {character: byte for byte, character in byte_characters().items()}
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
