"""Read and write YAML recipes: version 1.2's rules for plain values, bounded in size, with the recipes they include."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from xlstm_lm.base.paths import user_path

MAX_BYTES, MAX_DEPTH, MAX_VALUES, MAX_FILES, MAX_DIGITS = 2**20, 40, 100_000, 100, 100
"""Limits: bytes of a recipe, how deep it nests, its values with aliases written out, the files of a recipe with all
that they include, and the characters of a number."""

RENAMED = {"schedule.warmup_steps": "schedule.warmup", "schedule.cooldown_steps": "schedule.cooldown"}
"""Former names of fields, as older recipes and run folders have them, and today's."""

PLAIN_VALUES = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
"""Kinds of plain scalars by YAML 1.2's core schema, with version 1.1's merge key: a pattern, and the characters that it
may begin with. Anything else is text. So 010 is ten, and 1:30, 1_000, yes and 2024-01-01 are text."""

TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Keys are text and occur once; aliases neither hold themselves nor multiply without bound; nesting is bounded."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- PyYAML's own name and type
    yaml_constructors: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._values_of: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Count what is composed, and refuse what exceeds a limit, before any of it becomes a Python value."""
        event, before = self.peek_event(), self._values
        is_alias = isinstance(event, yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(None, None, f"more than {MAX_DEPTH} levels of nesting", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and node not in self._values_of:
            raise ComposerError(None, None, f"the alias *{event.anchor} holds itself", event.start_mark)
        self._values += self._values_of[node] if is_alias else 1
        if self._values > MAX_VALUES:
            problem = f"more than {MAX_VALUES:,} values, aliases written out"
            raise ComposerError(None, None, problem, event.start_mark)
        if not is_alias:
            self._values_of[node] = self._values - before
            _check_keys(node)
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        try:
            if len(text) <= MAX_DIGITS:
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        except ValueError:
            pass
        raise ConstructorError(
            None, None, f"{text[:20]!r} is no whole number of at most {MAX_DIGITS} digits", node.start_mark
        )

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node)
        try:
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except ValueError:
            raise ConstructorError(None, None, f"{text[:20]!r} is no number", node.start_mark) from None

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        text = self.construct_scalar(node).lower()
        if text not in ("true", "false"):
            raise ConstructorError(None, None, f"{text[:20]!r} is neither true nor false", node.start_mark)
        return text == "true"


def _check_keys(node: yaml.Node) -> None:
    """Make the keys of a mapping text, as they are written, and refuse one that occurs twice."""
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ComposerError(None, None, "a key must be text", key.start_mark)
        if key.tag == f"{TAG}merge":
            continue
        key.tag = f"{TAG}str"
        if key.value in lines:
            problem = f"the key {key.value[:80]!r} occurs twice, first in line {lines[key.value]}, again"
            raise ComposerError(None, None, problem, key.start_mark)
        lines[key.value] = key.start_mark.line + 1


class _Dumper(yaml.SafeDumper):
    """Quotes every text that version 1.1 or 1.2 of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Only in double quotes does PyYAML escape the line separators of Unicode.
        return self.represent_scalar(f"{TAG}str", text, style=None if text.isprintable() else '"')


for _kind, (_pattern, _begins) in PLAIN_VALUES.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{TAG}{_kind}", re.compile(rf"(?:{_pattern})\Z"), _begins)
for _kind, _construct in {
    "null": _Loader.construct_yaml_null,
    "bool": _Loader.construct_bool,
    "int": _Loader.construct_int,
    "float": _Loader.construct_float,
    "str": _Loader.construct_yaml_str,
    "seq": _Loader.construct_yaml_seq,
    "map": _Loader.construct_yaml_map,
}.items():
    _Loader.add_constructor(f"{TAG}{_kind}", _construct)
_Loader.add_constructor(None, _Loader.construct_undefined)
_Dumper.add_representer(str, _Dumper.represent_text)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: The text is not valid YAML, has a key twice or exceeds a limit; names line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = f" ({error.context})" if error.context else ""
        hint = "; between values YAML has blanks, not tabs" if "'\\t'" in error.problem else ""
        raise ValueError(f"{error.problem}{where}{context}{hint}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def to_yaml(values: dict[str, Any]) -> str:
    """YAML that `parse_yaml` reads back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A new mapping with the keys of both; `over` wins, mappings are merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        both_are_mappings = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = merge(merged[key], value) if both_are_mappings else value
    return merged


def merge_origins(merged: dict[str, Any], before: dict[str, str], over: dict[str, str]) -> dict[str, str]:
    """Origins of the dotted keys of a mapping that `merge` made, from those of both its parts."""
    origins = before | over
    return {key: origins[key] for key in dotted_items(merged)}


def dotted_items(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model.num_blocks": 4, ...}`: every value that is no mapping, by the path of keys that leads to it."""
    items: dict[str, Any] = {}
    for key, value in values.items():
        items |= (
            dotted_items(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        )
    return items


def with_current_names(values: dict[str, Any]) -> dict[str, Any]:
    """The same sections with today's names for the fields of `RENAMED`, and `model: NAME` as `model: {preset: NAME}`.

    Raises:
        ValueError: A field is there by both of its names.
    """
    values = dict(values)
    for former, name in RENAMED.items():
        section, former_key = former.split(".")
        key = name.split(".")[1]
        if isinstance(values.get(section), dict) and former_key in values[section]:
            if key in values[section]:
                raise ValueError(f"{name} and {former} are two names of one field: give {name} alone.")
            values[section] = {key if each == former_key else each: value for each, value in values[section].items()}
    if isinstance(values.get("model"), str):
        values["model"] = {"preset": values["model"]}
    return values


Recipe = tuple[dict[str, Any], dict[str, str]]
"""Values of a recipe, and the file that each dotted key comes from."""


def read_recipes(paths: Iterable[str | Path]) -> Recipe:
    """The values of recipes together, of which later ones win, and their origins. Raises as `read_recipe`."""
    return _merged(map(read_recipe, paths))


def read_recipe(path: str | Path) -> Recipe:
    """The values of a recipe, and the file that each dotted key comes from.

    A recipe's key `include` lists further recipes, relative to it; they are read first, in order, and what the
    recipe says itself wins.

    Raises:
        ValueError: a file is missing or no regular file, too large, no YAML, or no mapping; two files include each
            other, or too many are included.
    """
    return _read(user_path(path), (), [])


def _read(path: Path, above: tuple[Path, ...], files: list[Path]) -> Recipe:
    wanted_by = f", which {above[-1]} includes," if above else ""
    text = _text_of(path, wanted_by)
    if path.resolve() in above:
        raise ValueError(f"{path} includes itself through {above[-1]}; take one of the two includes out.")
    files.append(path)
    if len(files) > MAX_FILES:
        raise ValueError(f"{above[0]} includes more than {MAX_FILES} recipes, counted as often as they are included.")
    try:
        own = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(own, dict):
        holds = "is empty" if own is None else f"holds {type(own).__name__}"
        raise ValueError(f"{path} {holds}, but a recipe is a mapping such as 'model: {{num_blocks: 4}}'.")
    includes = own.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(include, str) for include in includes):
        raise ValueError(
            f"{path}: include is {includes!r}, but must be a list of files relative to this one, such as [model.yaml]."
        )
    try:
        own = with_current_names(own)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    included = (_read(path.parent / user_path(include), (*above, path.resolve()), files) for include in includes)
    values, origins = _merged(included)
    values = merge(values, own)
    return values, merge_origins(values, origins, dict.fromkeys(dotted_items(own), str(path)))


def _merged(recipes: Iterable[Recipe]) -> Recipe:
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for recipe, its_origins in recipes:
        values = merge(values, recipe)
        origins = merge_origins(values, origins, its_origins)
    return values, origins


def _text_of(path: Path, wanted_by: str) -> str:
    """The text of a recipe.

    Raises:
        ValueError: it is missing, no regular file, too large, or no text.
    """
    try:
        mode, size = path.stat().st_mode, path.stat().st_size
        if stat.S_ISREG(mode) and size <= MAX_BYTES:
            return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        there = _recipes_in(path.parent)
        hint = f"that folder has {there}" if there else "there is no recipe in that folder"
        raise ValueError(f"The recipe {path}{wanted_by} does not exist; {hint}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not valid YAML: it is no UTF-8 text ({error.reason} at byte {error.start})."
        ) from None
    except OSError as error:
        raise ValueError(f"The recipe {path}{wanted_by} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # a name that no file can have
        raise ValueError(f"The recipe {str(path)!r}{wanted_by} cannot be read: {error}.") from None
    if stat.S_ISREG(mode):
        raise ValueError(f"{path}{wanted_by} has {size:,} bytes; a recipe has {MAX_BYTES:,} at most.")
    there = _recipes_in(path)
    kind = f"a folder{f' with {there}' if there else ''}" if stat.S_ISDIR(mode) else "no regular file"
    raise ValueError(f"{path}{wanted_by} is {kind}; give a recipe, a YAML file.")


def _recipes_in(folder: Path) -> str:
    """Names of up to twenty recipes in a folder."""
    names = sorted(other.name for other in folder.glob("*.y*ml")) if folder.is_dir() else []
    return ", ".join(names[:20]) + (" and more" if len(names) > 20 else "")
