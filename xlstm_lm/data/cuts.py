"""Positions at which a text can be cut into parts that give exactly the tokens of the whole.

The characters around a position are followed through every step of the tokenizer: added tokens, normalizers,
pre-tokenizers and, where none of these parts the text, the merges of a BPE. One unfamiliar step rules all cuts out.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Callable, Iterable
from itertools import pairwise, product
from typing import Any

from xlstm_lm.data.byte_tokenizer import byte_characters
from xlstm_lm.data.encoder import merge_pair
from xlstm_lm.data.match_boundaries import Pattern, UnknownBoundariesError, is_stable

Sides = tuple[set[str], set[str]]
"""Characters that may stand before and after a position, as far as normalizing has got."""
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"\w+|[^\w\s]+"


class Cuts:
    """Finds positions between two characters of which the first is no white space."""

    def __init__(self, parts: dict[str, Any], normalize: Callable[[str], str]) -> None:
        """Look at a tokenizer.

        Args:
            parts: the content of its tokenizer.json.
            normalize: its normalizer, for the contents of added tokens.

        Raises:
            UnknownBoundariesError: it has a step that does not say where it parts a text.
        """
        normalizers = _flat(parts["normalizer"], "normalizers")
        self.leading_space: bool = any(step["type"] == "Prepend" for step in normalizers)
        """Whether a part is encoded without the space that it begins with, because a normalizer puts one there."""
        if self.leading_space:
            normalizers = _without_prepend(normalizers)
        pre_tokenizers = _flat(parts["pre_tokenizer"], "pretokenizers")
        self._only_before_space = self.leading_space or any(
            step.get("add_prefix_space") or step.get("prepend_scheme", "never") != "never" for step in pre_tokenizers
        )
        self._normalizers = [_normalizer(step) for step in normalizers]
        self._ascii_only = any(step["type"] == "Precompiled" for step in normalizers)
        self._pre_tokenizers = [_pre_tokenizer(step) for step in pre_tokenizers]
        self._merges = _Merges(parts["model"])
        forms = {form for token in parts["added_tokens"] for form in (token["content"], normalize(token["content"]))}
        self._inside = {pair for form in forms for pair in pairwise(form)}
        self._heads = {form[:2] for form in forms}
        self._tails = {form[-2:] for form in forms}
        self._safe_pairs: dict[str, bool] = {}
        self._safe: dict[str, bool] = {}

    def after(self, text: str, position: int) -> int:
        """The first position to cut `text` at, not before `position` (at least 2); its length if there is none."""
        for cut in range(position, len(text) - 1):
            pair = text[cut - 1 : cut + 1]
            safe = self._safe_pairs.get(pair)
            if safe is None:
                safe = self._safe_pairs[pair] = self._is_safe_pair(*pair)
            if safe:
                around = text[cut - 2 : cut + 2]
                if around not in self._safe:
                    self._safe[around] = self._is_clear_of_added_tokens(around)
                if self._safe[around]:
                    return cut
        return len(text)

    def _is_safe_pair(self, left: str, right: str) -> bool:
        if left.isspace() or not (is_stable(left) and is_stable(right)) or (self._only_before_space and right != " "):
            return False
        if self._ascii_only and not (left + right).isascii():
            return False
        sides = self._normalized(left, right)
        if sides is None or any(pair in self._inside for pair in (*product(*sides), (left, right))):
            return False
        parted = False
        for step in self._pre_tokenizers:
            here = step(sides)
            if here is None:
                return False
            parted, sides = here
            if parted:
                return True
        return self._merges.never_join(sides)

    def _is_clear_of_added_tokens(self, around: str) -> bool:
        """Whether no added token begins or ends at the middle of four characters, for which the inner two are safe."""
        before, left, right, after = tuple(around)
        if not (is_stable(before) and is_stable(after)) or (self._ascii_only and not around.isascii()):
            return False
        if self.leading_space and (not after.isalnum() or any(head[0] == after for head in self._heads)):
            return False
        ending, beginning = self._normalized(before, left), self._normalized(right, after)
        if ending is None or beginning is None:
            return False
        tails = {a + b for a, b in product(ending[0] | {before}, ending[1] | {left})}
        heads = {a + b for a, b in product(beginning[0] | {right}, beginning[1] | {after})}
        tails |= {tail[1] for tail in tails}
        heads |= {head[0] for head in heads}
        return not (tails & self._tails or heads & self._heads)

    def _normalized(self, left: str, right: str) -> Sides | None:
        sides: Sides | None = ({left}, {right})
        for step in self._normalizers:
            sides = step(sides) if sides is not None else None
        return sides


def _flat(step: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """The steps of a possibly nested sequence."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [each for member in step[members] for each in _flat(member, members)]


def _without_prepend(normalizers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps after a Prepend, where they write a space as what it puts in front."""
    first, *rest = normalizers
    space = {"type": "Replace", "pattern": {"String": " "}, "content": first.get("prepend")}
    if rest != [space]:
        raise UnknownBoundariesError("its normalizer puts a prefix in front of every text")
    return rest


def _normalizer(step: dict[str, Any]) -> Callable[[Sides], Sides | None]:
    """A function from the sides of a position to those after the step; None where cutting may change them."""
    match step["type"]:
        case "NFC" | "NFD" | "NFKC" | "NFKD" as form:
            return lambda sides: sides if all(_is_inert(form, side) for side in sides) else None
        case "StripAccents":
            return lambda sides: sides  # marks are not stable
        case "Lowercase":
            return lambda sides: _each(sides, lambda character: {character.lower()})
        case "Strip":
            sides_stripped = [index for index, name in enumerate(("strip_right", "strip_left")) if step[name]]
            return lambda sides: None if any(c.isspace() for index in sides_stripped for c in sides[index]) else sides
        case "Nmt":
            return lambda sides: _each(sides, lambda character: {" " if character.isspace() else character})
        case "ByteLevel":
            return _as_bytes
        case "Replace":
            pattern, content = _pattern(step["pattern"]), step["content"]
            return lambda sides: _replaced(sides, pattern, content)
        case "BertNormalizer":
            accents = step["lowercase"] if step["strip_accents"] is None else step["strip_accents"]
            return lambda sides: _as_bert(sides, accents, step["lowercase"])
        case "Precompiled":
            from tokenizers.normalizers import Precompiled

            table = Precompiled(base64.b64decode(step["precompiled_charsmap"]))
            return lambda sides: _each(sides, lambda character: {table.normalize_str(character)})
    raise UnknownBoundariesError(f"its normalizer {step['type']} is not understood")


def _each(sides: Sides, change: Callable[[str], set[str]]) -> Sides | None:
    """The sides with every character changed; None where one does not stay a single character."""
    left, right = ({new for old in side for new in change(old)} for side in sides)
    return (left, right) if all(len(character) == 1 for character in left | right) else None


def _is_inert(form: Any, characters: Iterable[str]) -> bool:
    return all(unicodedata.normalize(form, character) == character for character in characters)


def _replaced(sides: Sides, pattern: Pattern, content: str) -> Sides | None:
    if any(pattern.may_join(left, right) for left, right in product(*sides)):
        return None

    def change(character: str, end: slice) -> set[str]:
        if not pattern.may_contain(character):
            return {character}
        return {content[end]} if pattern.is_exactly(character) else {content[end], character}

    left = {new for old in sides[0] for new in change(old, slice(-1, None))}
    right = {new for old in sides[1] for new in change(old, slice(0, 1))}
    return (left, right) if all(left | right) else None


def _as_bert(sides: Sides, accents: bool, lowercase: bool) -> Sides | None:
    if accents and not all(_is_inert("NFD", side) for side in sides):
        return None

    def change(character: str) -> set[str]:
        if character.isspace():
            return {" "}
        spaced = {character, " "} if unicodedata.category(character) == "Lo" else {character}  # Chinese is spaced out
        return {each.lower() for each in spaced} if lowercase else spaced

    return _each(sides, change)


def _as_bytes(sides: Sides) -> Sides:
    table = byte_characters()
    left, right = sides
    return {table[each.encode()[-1]] for each in left}, {table[each.encode()[0]] for each in right}


def _pattern(value: dict[str, str]) -> Pattern:
    ((kind, source),) = value.items()
    return Pattern(source, is_regex=kind == "Regex")


PreTokenizer = Callable[[Sides], tuple[bool, Sides] | None]
"""Whether the step certainly parts the text there, and the sides after it; None where cutting may change its parts."""


def _pre_tokenizer(step: dict[str, Any]) -> PreTokenizer:
    match step["type"]:
        case "ByteLevel":
            split = _split(Pattern(GPT2), "Isolated", False) if step["use_regex"] else lambda sides: (False, sides)

            def byte_level(sides: Sides) -> tuple[bool, Sides] | None:
                found = split(sides)
                return found and (found[0], _as_bytes(found[1]))

            return byte_level
        case "Split":
            return _split(_pattern(step["pattern"]), step["behavior"], step["invert"])
        case "Whitespace":
            return _split(Pattern(WORDS), "Removed", True)
        case "WhitespaceSplit":
            return _by_character("Removed", str.isspace)
        case "BertPreTokenizer":
            return _by_character("Isolated", lambda character: character.isspace() or _is_punctuation(character))
        case "Punctuation":
            return _by_character(step["behavior"], _is_punctuation)
        case "Digits":
            behavior = "Isolated" if step["individual_digits"] else "Contiguous"
            return _by_character(behavior, lambda character: unicodedata.category(character)[0] == "N")
        case "CharDelimiterSplit":
            return _by_character("Removed", lambda character: character == step["delimiter"])
        case "Metaspace":
            replacement = step["replacement"]

            def metaspace(sides: Sides) -> tuple[bool, Sides]:
                left, right = ({replacement if each == " " else each for each in side} for side in sides)
                return bool(step["split"]) and right == {replacement}, (left, right)

            return metaspace
    raise UnknownBoundariesError(f"its pre-tokenizer {step['type']} is not understood")


def _is_punctuation(character: str) -> bool:
    category = unicodedata.category(character)[0]
    return category == "P" or (category == "S" and character.isascii())


def _by_character(behavior: str, is_delimiter: Callable[[str], bool]) -> PreTokenizer:
    """A step that looks at every character by itself."""

    def part(sides: Sides) -> tuple[bool, Sides]:
        left, right = ({is_delimiter(each) for each in side} for side in sides)
        parted = {
            "Isolated": left == {True} or right == {True},
            "Removed": left == {True} or right == {True},
            "Contiguous": len(left) == len(right) == 1 and left != right,
            "MergedWithPrevious": left == {True},
            "MergedWithNext": right == {True},
        }
        return parted[behavior], sides

    return part


def _split(pattern: Pattern, behavior: str, invert: bool) -> PreTokenizer:
    """A step that parts a text at the matches of a pattern."""
    # Matches that are no delimiters (invert) are parts of their own as well, unless delimiters are joined to something.
    parts_at_matches = behavior in ("Isolated", "Removed") or (behavior == "MergedWithNext" and not invert)
    removes_gaps = behavior == "Removed" and invert

    def part(sides: Sides) -> tuple[bool, Sides] | None:
        if any(pattern.may_join(left, right) for left, right in product(*sides)):
            return None
        parted = parts_at_matches and all(map(pattern.always_begins, sides[1]))
        in_gap = removes_gaps and any(not any(map(pattern.may_contain, side)) for side in sides)
        return parted or in_gap, sides

    return part


class _Merges:
    """The characters that the merges of a BPE join, for texts that nothing parts before the model."""

    def __init__(self, model: dict[str, Any]) -> None:
        if model.get("dropout"):
            raise UnknownBoundariesError("its model drops merges at random")
        plain = model["type"] == "BPE" and not any(
            model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        )
        self._vocabulary = model["vocab"] if plain else {}
        self._joined = {(left[-1], right[0]) for left, right in map(merge_pair, model["merges"])} if plain else set()

    def never_join(self, sides: Sides) -> bool:
        """Whether a position between such characters stays one between two tokens."""
        left, right = sides
        # A character without a token of its own may become bytes, or one unknown token together with its neighbor.
        return left | right <= self._vocabulary.keys() and not any(pair in self._joined for pair in product(*sides))
