"""Explains pydantic's errors in the words of recipes: file or flag, field, value, and what is allowed."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import Tag, ValidationError

from xlstm_lm.base.fields import NO_NUMBER, is_section, is_union, words

MOST_MISTAKES = 20
ELSEWHERE = {
    "lr": "learning_rate",
    **dict.fromkeys(("d_model", "dim", "hidden_size", "n_embd"), "embedding_dim"),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers"), "num_blocks"),
    **dict.fromkeys(("n_head", "n_heads", "num_attention_heads"), "num_heads"),
    **dict.fromkeys(("block_size", "max_seq_len", "seq_len", "seq_length", "sequence_length"), "context_length"),
    **dict.fromkeys(("epochs", "max_steps", "num_epochs"), "steps"),
    **dict.fromkeys(("grad_clip", "max_grad_norm"), "gradient_clip"),
    **dict.fromkeys(("batch_size", "train_batch_size"), "global_batch_size"),
    "output_dir": "run_dir",
}
"""Names that other programs have for fields."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 100, 60


def shown(value: Any) -> str:
    """A value as recipes write it, shortened where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _SHORT.repr(value)


def nearest(name: str, known: Iterable[str], otherwise: str = "See 'xlstm-lm train --help' for all fields.") -> str:
    """'Did you mean ...?' for a dotted name that is none of the known ones.

    Its last part, or what that is called here, is compared with names in the same section, then in all; the whole name
    where there is no such section. Where nothing is near, `otherwise`, in which {known} becomes the list of all.
    """
    known = list(known)
    name = name.lower()
    section, _, last = name.rpartition(".")
    siblings = {each.rpartition(".")[2]: each for each in known if each.rpartition(".")[0] == section}
    everywhere = {each.rpartition(".")[2]: each for each in reversed(known)}  # the first section of several
    whole = {} if siblings else {each: each for each in known}  # names in one section are alike by that alone
    here = ELSEWHERE.get(last, last)
    wanted_in = ((here, siblings, 1.0), (here, everywhere, 1.0), (last, siblings, 0.6), (last, everywhere, 0.75))
    for wanted, pool, cutoff in (*wanted_in, (name, whole, 0.6)):
        if close := difflib.get_close_matches(wanted, list(pool), n=1, cutoff=cutoff):
            return f"Did you mean {pool[close[0]]}?"
    return otherwise.format(known=", ".join(known))


def origin_of(name: str, origins: dict[str, str], message: str = "") -> str:
    """The file or flag that set a field, as 'FILE: '; empty where that is unknown.

    Args:
        name: The dotted name of a field or section.
        origins: The file or flag that set each dotted key; of the empty key, all that no other key is above of.
        message: Of a section's fields, only those that the message names count, if it names any.
    """
    above = [key for key in origins if not key or f"{name}.".startswith(f"{key}.")]
    if above:
        return f"{origins[max(above, key=len)]}: "
    below = [key for key in origins if key.startswith(f"{name}.")]
    mentioned = set(re.findall(r"\w+", message))
    fields = [key for key in below if key.rpartition(".")[2] in mentioned]
    sections = [key for key in below if mentioned.intersection(key[len(name) :].split("."))]
    sources = [origins[key] for key in fields or sections or below]
    return f"{', '.join(dict.fromkeys(sources))}: " if sources else ""


def explain(
    error: ValidationError,
    config_class: Any,
    values: dict[str, Any],
    origins: dict[str, str],
    *,
    section: str = "",
) -> str:
    """One line for each mistake that pydantic found.

    Args:
        error: What pydantic raised.
        config_class: The type that was validated: a dataclass or a TypedDict.
        values: What was validated.
        origins: The file or flag that set each dotted key, `section` included.
        section: Name of the section that `values` is; empty for a whole recipe.
    """
    lines = []
    errors = error.errors(include_url=False)
    places = [_Place(config_class, values, each["loc"]) for each in errors]
    for each, place in list(zip(errors, places))[:MOST_MISTAKES]:
        if any(place.is_below(other) for other in places):
            continue  # another alternative of a union, or a list that is as wrong as its item
        name = ".".join([*([section] if section else []), *place.keys])
        message = _message(dict(each), name, place)
        lines.append(f"{origin_of(name, origins, message)}{message}")
    more = [f"... and {len(errors) - MOST_MISTAKES} more."] if len(errors) > MOST_MISTAKES else []
    return "\n".join(dict.fromkeys(lines + more))


def _message(error: dict[str, Any], name: str, place: _Place) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        problem = f"{name} = {shown(error['input'])}: there is no such field"
        if place.tags and place.is_of_another_tag():
            return f"{problem} in the {place.tag_field} {', '.join(place.tags)}: remove it."
        if "." in place.keys[-1]:
            inner = place.keys[-1].replace(".", ": {") + ": ..." + "}" * place.keys[-1].count(".")
            return f"{problem}. Only flags join names by dots; write '{inner}'."
        return f"{problem}. {place.nearest_field(name.removesuffix('.'.join(place.keys)))}"
    if kind in ("missing", "missing_argument") and not isinstance(error["loc"][-1], int):
        return f"{name} is missing; add it."
    if kind == "union_tag_invalid":
        expected = context["expected_tags"].replace("'", "")
        tag_field = _tag_field(_alternatives(place.hint)[0])
        return f"{name}.{tag_field} = {shown(context['tag'])}: must be one of {expected}."
    if kind == "value_error" and str(context["error"]) != NO_NUMBER:
        text = str(context["error"])
        if is_section(place.hint):
            return text if not name or text.startswith(f"{name}.") else f"{name}: {text}"
        return f"{name} = {shown(error['input'])}: {text}"
    allowed = words(place.hint)
    is_number = isinstance(error["input"], (int, float)) and str in map(_bare, _alternatives(place.hint))
    allowed = allowed.replace("text", "text in quotes", 1) if is_number else allowed
    return f"{name} = {shown(error['input'])}: must be {allowed}."


class _Place:
    """A place in a configuration, found by walking along one of pydantic's locations."""

    def __init__(self, config_class: Any, values: Any, location: Iterable[str | int] = ()) -> None:
        self.keys: list[str] = []
        """The keys that lead there."""
        self.hint: Any = config_class
        """The type of what is there."""
        self.tags: list[str] = []
        """The alternatives that were chosen on the way."""
        self.tag_field = ""
        """Field that names the last of them, such as family."""
        self._top, self._values = config_class, values
        self._wildcards: list[bool] = []
        for part in location:
            self.enter(part)

    def is_below(self, other: _Place) -> bool:
        """Whether the other place holds this one."""
        return len(other.keys) < len(self.keys) and self.keys[: len(other.keys)] == other.keys

    def enter(self, part: str | int) -> None:
        """Go on by a part of the location: a key, an index, or the name that a union gives an alternative."""
        chosen = [each for each in _alternatives(self.hint) if part in _tags(each)]
        if chosen:
            self.hint = chosen[0]
            self.tags.append(str(part))
            self.tag_field = _tag_field(self.hint)
            return
        is_there = part in (self._values if isinstance(self._values, dict) else range(_length(self._values)))
        inner = next(filter(None, (_inner(each, part) for each in _alternatives(self.hint))), None)
        if not is_there and (inner is None or isinstance(part, int)):
            return  # the name of an alternative, or an item that a list lacks
        self._values = self._values[part] if is_there else None
        self._wildcards.append(
            isinstance(part, int) or any(get_origin(each) is dict for each in _alternatives(self.hint))
        )
        self.keys.append(str(part))
        self.hint = inner or Any

    def nearest_field(self, prefix: str) -> str:
        """Hint for a place that is no field: the nearest one, or all of its section. `prefix` goes before all names."""
        own = prefix + ".".join(self.keys)
        names = [prefix + self._with_own_keys(name) for name in _names(self._top, tuple(self.tags))]
        siblings = [name for name in names if name.rpartition(".")[0] == own.rpartition(".")[0]]
        all_there = f"There are {', '.join(name.rpartition('.')[2] for name in siblings)}." if siblings else ""
        return nearest(own, [name for name in names if not own.startswith(f"{name}.")], otherwise=all_there)

    def is_of_another_tag(self) -> bool:
        """Whether another alternative has a field of this name."""
        return ".".join(self.keys) in map(self._with_own_keys, _names(self._top, ()))

    def _with_own_keys(self, name: str) -> str:
        parts = name.split(".")
        for index, (key, is_free) in enumerate(zip(self.keys, self._wildcards)):
            if index < len(parts) and parts[index] == "*" and is_free:
                parts[index] = key
        return ".".join(parts)


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, each with its annotations, or the type itself."""
    if get_origin(hint) is Annotated and is_union(get_args(hint)[0]):
        hint = get_args(hint)[0]
    return list(get_args(hint)) if is_union(hint) else [hint]


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (list, tuple)) else 0


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _tags(hint: Any) -> list[str]:
    """The name that pydantic gives an alternative of a discriminated union."""
    return [each.tag for each in get_args(hint)[1:] if isinstance(each, Tag)] if get_origin(hint) is Annotated else []


def _tag_field(hint: Any) -> str:
    """The field whose default is the tag of an alternative."""
    return next(name for name, value in vars(_bare(hint)).items() if value in _tags(hint))


def _inner(hint: Any, part: str | int) -> Any:
    """The type of what a key or an index leads to; None where it leads nowhere."""
    hint = _bare(hint)
    if get_origin(hint) is list and isinstance(part, int):
        return get_args(hint)[0]
    if get_origin(hint) is tuple and isinstance(part, int):
        return get_args(hint)[min(part, len(get_args(hint)) - 1)]
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    return get_type_hints(hint, include_extras=True).get(str(part)) if is_section(hint) else None


def _names(hint: Any, tags: tuple[str, ...], prefix: str = "") -> list[str]:
    """Dotted names of all sections and fields below a type, * for an index or a free key.

    Of a union with tags only the alternatives that `tags` names count, if it names any.
    """
    found = []
    alternatives = _alternatives(hint)
    for each in [each for each in alternatives if set(_tags(each)) & set(tags)] or alternatives:
        each = _bare(each)
        if is_section(each):
            for key, inner in get_type_hints(each, include_extras=True).items():
                if ClassVar not in (inner, get_origin(inner)):
                    found += [f"{prefix}{key}", *_names(inner, tags, f"{prefix}{key}.")]
        elif get_origin(each) in (list, dict):
            found += _names(get_args(each)[-1], tags, f"{prefix}*.")
    return list(dict.fromkeys(found))
