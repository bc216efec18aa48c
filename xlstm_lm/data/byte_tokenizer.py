"""Text as the bytes of its UTF-8."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from xlstm_lm.data.chat import ChatTemplate
from xlstm_lm.data.tokenizer_files import END_OF_DOCUMENT, TokenizerConfig, save_tokenizer

PIECE_CHARACTERS = 1 << 18


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
    name = "bytes"
    chat: ChatTemplate | None = None

    def __init__(self) -> None:
        self.bytes_per_token = torch.ones(self.vocab_size, dtype=torch.int64)
        self.bytes_per_token[self.end_of_document] = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode_array(text) for text in texts]

    def encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        for begin in range(0, len(text), PIECE_CHARACTERS):
            yield self.encode_array(text[begin : begin + PIECE_CHARACTERS])

    def missing_bytes(self, text: str) -> int:
        return 0

    def problem(self, text: str) -> str | None:
        return None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, with the end of a document as its token."""
        return b"".join(self._token_bytes()[token] for token in ids).decode(errors="replace")

    def decoder(self) -> ByteDecoder:
        return ByteDecoder(self._token_bytes())

    def fingerprint(self) -> str:
        return "bytes"

    def save(self, folder: str | Path) -> None:
        """Write it as a byte-level BPE without merges, which is the same mapping in Hugging Face's terms."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in byte_characters().items()}
        backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_DOCUMENT])
        save_tokenizer(backend, TokenizerConfig(kind="bytes"), END_OF_DOCUMENT, Path(folder))

    @staticmethod
    def _token_bytes() -> list[bytes]:
        return [bytes([byte]) for byte in range(256)] + [END_OF_DOCUMENT.encode()]


def byte_characters() -> dict[int, str]:
    """The printable character by which byte-level BPE writes each byte (the alphabet of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
