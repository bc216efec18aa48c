"""Chats as documents: messages rendered by a tokenizer's chat template, and the token ids of the result.

Special tokens that the template writes become their ids. Text of a message that looks like one stays plain text: it is
held back while the template is rendered, and the encoder of chats knows special tokens only by marks that no message
can hold.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from xlstm_lm.data.tokenizer_files import is_fault_of_library

MARK = "\U0010fffe"
"""Encloses the id of a special token that the template has written. Noncharacters are in no text."""
HELD = "\U000ffffe"
"""Encloses the number of a special token that a message holds as text."""
EDGE = "\U0010ffff"
"""Parts the edge of a message from text around it, where both together could read as a special token."""
RESERVED = re.compile(f"[{MARK}{HELD}{EDGE}]")
DATE = "26 Jul 2024"
FIXED_DATE = f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro %}}"
"""Precedes templates, some of which write today's date: a restart on another day reads the same tokens."""


class ChatTemplate:
    """A tokenizer's chat template, with the encoder of what it renders."""

    def __init__(
        self,
        template: str,
        names: Mapping[str, str],
        special_tokens: Mapping[int, str],
        encoder: Any,
        end_of_document: int,
    ) -> None:
        """Keep the template.

        Args:
            template: Jinja template, as in tokenizer_config.json.
            names: Special tokens that the template may name, such as bos_token.
            special_tokens: Text of each special token, by its id.
            encoder: Tokenizer of the `tokenizers` library for text without special tokens.
            end_of_document: Id of the token between documents.
        """
        self._template = template
        self._names = dict(names)
        self._texts = list(special_tokens.values())
        self._ids = {text: token for token, text in special_tokens.items()}
        longest_first = sorted(self._texts, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        parts = [(text[:at], text[at:]) for text in self._texts for at in range(1, len(text))]
        self._begins = tuple({begin for begin, _ in parts})
        self._ends = tuple({end for _, end in parts})
        self._encoder = encoder
        self._end_of_document = end_of_document

    def encode(self, messages: str) -> tuple[str, np.ndarray]:
        """Render and encode a chat.

        Args:
            messages: JSON array of messages, objects with `role` and `content`.

        Returns:
            the rendered text, and its token ids as int32 array. An end of document that the template writes at the very
            end is not among the ids, because packing inserts it.

        Raises:
            ValueError: the template or the tokenizer cannot write these messages.
        """
        if RESERVED.search(messages):
            raise ValueError("a message holds U+FFFFE, U+10FFFE or U+10FFFF, which are no characters of text")
        rendered = self._render(self._held_back(json.loads(messages)))
        marked = self._special.sub(lambda found: f"{MARK}{self._ids[found[0]]}{MARK}", rendered)
        encoder, final_ids = self._marking_encoder
        try:
            ids = final_ids[encoder.encode(self._restored(marked), add_special_tokens=False).ids]
        except BaseException as error:
            if not is_fault_of_library(error):
                raise
            raise ValueError(f"the tokenizer cannot encode the rendered chat ({error})") from None
        ends = len(ids) > 0 and ids[-1] == self._end_of_document
        return self._restored(rendered), ids[:-1] if ends else ids

    def fingerprint(self) -> str:
        """Changes when the text of some chat would, 16 hexadecimal digits."""
        written = json.dumps([self._template, self._names], sort_keys=True)
        return hashlib.sha256(written.encode()).hexdigest()[:16]

    def _render(self, messages: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        template = FIXED_DATE + self._template
        try:
            (rendered,), _ = render_jinja_template(conversations=[messages], chat_template=template, **self._names)
        except Exception as error:  # the template is a program of its own
            raise ValueError(f"the tokenizer's chat template cannot render it ({error})") from None
        return str(rendered)

    def _held_back(self, value: Any) -> Any:
        """A value of a message in which no string can be read as a special token, alone or with text around it."""
        if isinstance(value, dict):
            return {self._held_back(name): self._held_back(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._held_back(each) for each in value]
        if not isinstance(value, str):
            return value
        text = self._special.sub(lambda found: f"{HELD}{self._texts.index(found[0])}{HELD}", value)
        # Inside of white space, which templates may strip.
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if text.startswith(self._ends, begin):
            text, end = text[:begin] + EDGE + text[begin:], end + 1
        return text[:end] + EDGE + text[end:] if text.endswith(self._begins, 0, end) else text

    def _restored(self, text: str) -> str:
        """The text with what `_held_back` has changed as it was."""
        return re.sub(f"{HELD}(\\d+){HELD}", lambda found: self._texts[int(found[1])], text).replace(EDGE, "")

    @functools.cached_property
    def _marking_encoder(self) -> tuple[Any, np.ndarray]:
        """An encoder that knows special tokens by their marks only, and the tokenizer's id for each of its ids."""
        from tokenizers import Tokenizer

        parts = json.loads(self._encoder.to_str())
        parts["post_processor"] = None  # it may name special tokens, and is not used
        for added in parts["added_tokens"]:
            if added["special"]:
                added |= {"content": f"{MARK}{added['id']}{MARK}", "normalized": False}
        encoder = Tokenizer.from_str(json.dumps(parts))
        final_ids = np.arange(max(encoder.get_vocab(with_added_tokens=True).values()) + 1, dtype=np.int32)
        for added in parts["added_tokens"]:
            final_ids[encoder.token_to_id(added["content"])] = added["id"]
        return encoder, final_ids
