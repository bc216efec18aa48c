"""Two faults of tokenizers, found in the content of tokenizer.json: ends of documents in text, and lost characters."""

from __future__ import annotations

import copy
import json
from typing import Any, Literal

from xlstm_lm.data.byte_tokenizer import byte_characters

UNWRITTEN = "\U0010fffeend of document\U0010fffe"
"""Stands for the end of a document in an encoder; noncharacters are in no text."""


def never_writes(parts: dict[str, Any], token: str) -> bool:
    """Whether no text is encoded as `token`, where special tokens are encoded as plain text."""
    model = parts["model"]
    if not any(added["content"] == token and added["special"] for added in parts["added_tokens"]):
        return False
    if model["type"] != "BPE":
        return token not in _tokens(model)
    if token not in model["vocab"]:
        return True
    if len(token) == 1 or model["ignore_merges"] or model["unk_token"] == token:
        return False
    prefix = model["continuing_subword_prefix"] or ""
    return not any(left + right.removeprefix(prefix) == token for left, right in map(merge_pair, model["merges"]))


def encoder_without(parts: dict[str, Any], token: str, name: str) -> Any:
    """A tokenizer of the `tokenizers` library with the same ids but for `token`, whose id no text gets.

    Raises:
        ValueError: `token` stands for unknown text.
    """
    from tokenizers import Tokenizer

    parts = copy.deepcopy(parts)
    parts["post_processor"] = None  # it may name the token, and is not used
    model = parts["model"]
    if unknown_token(model) == token:
        model["unk_token"] = None
        if model["type"] != "BPE" or fallback(parts) != "bytes":
            raise ValueError(
                f"the end-of-document token {token!r} of tokenizer {name!r} is its unknown token as well, so documents "
                "could hold it: set tokenizer.end_of_document to another token"
            )
    for added in parts["added_tokens"]:
        if added["content"] == token:
            added |= {"content": UNWRITTEN, "special": True}
    if model["type"] == "Unigram":
        model["vocab"] = [[UNWRITTEN if piece == token else piece, score] for piece, score in model["vocab"]]
    elif token in model["vocab"]:
        model["vocab"][UNWRITTEN] = model["vocab"].pop(token)
    if "merges" in model:
        prefix = model["continuing_subword_prefix"] or ""
        model["merges"] = [
            [left, right]
            for left, right in map(merge_pair, model["merges"])
            if token not in (left, right, left + right.removeprefix(prefix))
        ]
    return Tokenizer.from_str(json.dumps(parts))


def fallback(parts: dict[str, Any]) -> Literal["bytes", "unknown", "nothing", "error"]:
    """The result for characters without a token: tokens of their bytes, an unknown token, no token, or an error."""
    model, tokens = parts["model"], _tokens(parts["model"])
    unknown = unknown_token(model)
    by_byte = {f"<0x{byte:02X}>" for byte in range(256)}
    steps = json.dumps([parts["normalizer"], parts["pre_tokenizer"]])
    byte_level = '"type": "ByteLevel"' in steps and set(byte_characters().values()) <= tokens
    from_characters = model["type"] in ("BPE", "Unigram")
    byte_fallback = model.get("byte_fallback") and by_byte <= tokens
    if (from_characters and byte_level) or (byte_fallback and (model["type"] == "BPE" or unknown is not None)):
        return "bytes"
    if unknown is None and model["type"] == "BPE":
        return "nothing"
    return "unknown" if unknown in tokens else "error"


def _tokens(model: dict[str, Any]) -> set[str]:
    return {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else set(model["vocab"])


def unknown_token(model: dict[str, Any]) -> str | None:
    """The token that a model puts in the place of text without a token; it may be missing from the vocabulary."""
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model["unk_token"]


def merge_pair(merge: str | list[str]) -> list[str]:
    """The two tokens that a merge of a BPE joins."""
    return merge.split(" ") if isinstance(merge, str) else merge
