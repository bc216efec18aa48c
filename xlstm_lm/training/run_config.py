"""Configuration of a run: the sections of a recipe, checked strictly, and a flag for each field."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from xlstm_lm.base.mistakes import explain, origin_of, shown
from xlstm_lm.base.recipe import (
    RENAMED,
    dotted_items,
    merge,
    merge_origins,
    parse_yaml,
    read_recipe,
    read_recipes,
    to_yaml,
    with_current_names,
)
from xlstm_lm.data import DataConfig
from xlstm_lm.models import FAMILIES
from xlstm_lm.models.presets import preset_names, with_preset_fields
from xlstm_lm.runs.same_run import run_of_recipe
from xlstm_lm.training.config import TrainingConfig
from xlstm_lm.training.deepspeed_section import CheckedSection
from xlstm_lm.training.optimizer import OPTIMIZERS, AdamWConfig
from xlstm_lm.training.profile import ProfileConfig
from xlstm_lm.training.safeguards import SafeguardsConfig
from xlstm_lm.training.schedule import ScheduleConfig
from xlstm_lm.training.wandb_run import WandbConfig

logger = logging.getLogger("xlstm_lm")


def _one_of(classes: Mapping[str, type], tag: str, default: str) -> Any:
    """Type of a section that is one of several classes, chosen by its field `tag` or else by `default`."""

    def name_of(section: Any) -> str | None:
        if isinstance(section, dict):
            name = section.get(tag, default)
            return name if isinstance(name, str) else shown(name)
        return getattr(section, tag, None)

    union = reduce(or_, (Annotated[each, Tag(name)] for name, each in classes.items()))
    return Annotated[union, Discriminator(name_of)]


_MODEL = _one_of({family: config for family, (config, _) in FAMILIES.items()}, "family", "xlstm")
_OPTIMIZER = _one_of(OPTIMIZERS, "kind", "adamw")


@dataclass(kw_only=True)
class RunConfig:
    """A training run."""

    # Sections are plain dataclasses beside the code that uses them; pydantic checks them under this configuration.
    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    model: _MODEL
    """The model."""
    data: DataConfig
    """Sources of documents, tokenizer, and rows."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length and folder of the run, saving and logging."""
    optimizer: _OPTIMIZER = field(default_factory=AdamWConfig)
    """Update rule of the weights."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the steps."""
    safeguards: SafeguardsConfig = field(default_factory=SafeguardsConfig)
    """Steps whose loss or gradient is not finite."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Traces of steps, and a record of memory."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    deepspeed: CheckedSection = field(default_factory=dict)
    """DeepSpeed's own JSON: zero_optimization, offload and the like."""


_RUN = TypeAdapter(RunConfig)


@dataclass(frozen=True)
class Field:
    """Description of one field of RunConfig for the command line."""

    name: str
    type_name: str
    default: str
    description: str
    takes_text: bool
    """Whether its values are text."""
    takes_null: bool
    """Whether null is allowed as well."""
    tag: str = ""
    """Field that names the section's class, such as model.family; empty in a section of one class."""
    alternatives: tuple[str, ...] = ()
    """Values of `tag` with which the section has this field, such as the model families."""


def fields() -> list[Field]:
    """Every field of a run in order, those of sections one by one."""
    schema = _RUN.json_schema()

    def definition(node: dict[str, Any]) -> dict[str, Any]:
        return schema["$defs"][node["$ref"].split("/")[-1]] if "$ref" in node else node

    def walk(node: dict[str, Any], prefix: str, tag: str = "", alternatives: tuple[str, ...] = ()) -> list[Field]:
        found = []
        for key, value in node["properties"].items():
            target = definition(value)
            if "properties" in target and key != "deepspeed":
                found += walk(target, f"{prefix}{key}.")
                continue
            if "oneOf" in target:
                options = map(definition, target["oneOf"])
                found += _join([walk(each, f"{prefix}{key}.", *_tag_of(each)) for each in options])
                continue
            default = yaml.safe_dump(value["default"], default_flow_style=True) if "default" in value else "none"
            found.append(
                Field(
                    name=f"{prefix}{key}",
                    type_name=_type_name(target),
                    default=default.replace("\n...\n", "").strip(),
                    description=value.get("description", ""),
                    takes_text=_takes_text(target),
                    takes_null=any(each.get("type") == "null" for each in target.get("anyOf", ())),
                    tag=f"{prefix}{tag}" if tag else "",
                    alternatives=alternatives,
                )
            )
        return found

    return walk(schema, "")


def _tag_of(node: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Name and value of the field by which the schema of an alternative is chosen."""
    return next((name, (value["const"],)) for name, value in node["properties"].items() if "const" in value)


def _join(alternatives: list[list[Field]]) -> list[Field]:
    """Join the fields of all alternatives of a section; descriptions and defaults name the alternatives that differ."""
    by_name: dict[str, list[Field]] = {}
    for each in (each for alternative in alternatives for each in alternative):
        by_name.setdefault(each.name, []).append(each)
    joined = []
    for name, same in by_name.items():
        names = tuple(other for each in same for other in each.alternatives)
        type_names = dict.fromkeys(part for each in same for part in each.type_name.split("|"))
        defaults: dict[str, list[str]] = {}
        for each in same:
            defaults.setdefault(each.default, []).extend(each.alternatives)
        description = same[0].description
        if len(names) < len(alternatives):
            description = f"{description.removesuffix('.')} ({', '.join(names)})."
        joined.append(
            Field(
                name=name,
                type_name="|".join(type_names),
                default=same[0].default
                if name == same[0].tag
                else "; ".join(
                    default if len(defaults) == 1 else f"{default} ({', '.join(having)})"
                    for default, having in defaults.items()
                ),
                description=description,
                takes_text=all(each.takes_text for each in same),
                takes_null=any(each.takes_null for each in same),
                tag=same[0].tag,
                alternatives=names,
            )
        )
    return joined


def _takes_text(node: dict[str, Any]) -> bool:
    options = [each for each in node.get("anyOf", [node]) if each.get("type") != "null"]
    return all(each.get("type") == "string" for each in options)


def _type_name(node: dict[str, Any]) -> str:
    if "enum" in node:
        return "|".join(map(str, node["enum"]))
    if "const" in node:
        return str(node["const"])
    if "anyOf" in node:
        return "|".join(_type_name(option) for option in node["anyOf"])
    return {"string": "TEXT", "integer": "INT", "number": "NUMBER", "boolean": "true|false", "null": "null"}.get(
        node.get("type", ""), "YAML"
    )


def add_field_flags(parser: argparse.ArgumentParser) -> None:
    """Give the parser `--section.field` for every field of a run, and its former name where it has one; and `--model`
    for a preset."""
    former = {name: old for old, name in RENAMED.items()}
    groups: dict[str, Any] = {"model": parser.add_argument_group("model")}
    groups["model"].add_argument(
        "--model",
        "--model.preset",
        action=_Once,
        metavar="PRESET",
        default=argparse.SUPPRESS,
        help="A model by name, in place of a recipe's preset; recipes and flags that set fields of the model win. "
        f"One of {', '.join(preset_names())}.",
    )
    for each in fields():
        section = each.name.split(".")[0]
        group = groups.setdefault(section, parser.add_argument_group(section))
        group.add_argument(
            *(f"--{name}" for name in (each.name, former.get(each.name)) if name),
            action=_Once,
            metavar=each.type_name,
            default=argparse.SUPPRESS,
            type=_reader(each),
            help=f"{each.description} Default: {each.default}.".replace("%", "%%"),
        )


class _Once(argparse.Action):
    """Action that stores a flag's value and refuses a flag given twice, like a repeated key of a recipe."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            raise argparse.ArgumentError(self, f"it is there twice, first as {shown(getattr(namespace, self.dest))}")
        setattr(namespace, self.dest, values)


def _reader(field_: Field) -> Callable[[str], Any]:
    """Return the parser of a flag's value: text as it is, null where that is allowed, anything else as YAML."""

    def read(text: str) -> Any:
        if field_.takes_text:
            return None if text == "null" and field_.takes_null else text
        try:
            return parse_yaml(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not valid YAML: {error}") from None

    return read


def load_run_config(paths: list[str | Path], overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read the run that recipes describe. Later recipes win, and `overrides` (`{"training.steps": 200}`) over all.

    Raises:
        ValueError: a recipe cannot be read, or a key or a value is not allowed; the message names the file or flag, the
            value and, for a key or a preset, the nearest one there is. All mistakes are named at once.
    """
    values, origins = read_recipes(paths)
    for name, value in (overrides or {}).items():
        for key in reversed(name.split(".")):
            value = {key: value}
        value = with_current_names(value)
        values = merge(values, value)
        origins = merge_origins(values, origins, dict.fromkeys(dotted_items(value), f"flag --{name}"))
    run = check_run_config(values, origins)
    _point_at_the_run_of_its_recipe(run, origins.get("training.run_dir"))
    return run


def load_data_config(paths: list[str | Path]) -> tuple[DataConfig, bool]:
    """Read the data section of recipes, and whether they describe a model as well. Raises as `load_run_config`."""
    has_model = any("model" in read_recipe(path)[0] for path in paths)
    unused = None if has_model else {"model.vocab_size": 1}
    return load_run_config(paths, unused).data, has_model


def _point_at_the_run_of_its_recipe(run: RunConfig, origin: str | None) -> None:
    """Replace a training.run_dir that comes from a run's own config.yaml by the folder that holds that file now."""
    folder = run_of_recipe(run.training.run_dir, origin) if origin else None
    if folder is None:
        return
    if os.environ.get("RANK", "0") == "0":
        logger.warning(
            "%s belongs to the run in %s, which is continued; its training.run_dir is %s",
            origin,
            folder,
            run.training.run_dir,
        )
    run.training.run_dir = str(folder)


def check_run_config(values: dict[str, Any], origins: dict[str, str]) -> RunConfig:
    """Check sections and return the run they describe. `origins` names the file or flag of each dotted key.

    Raises:
        ValueError: a key or a value is not allowed, as in `load_run_config`.
    """
    values = with_current_names(values)
    for name, value in dotted_items(values).items():
        for text in _texts(value):
            if "\0" in text or text.encode(errors="replace").decode() != text:
                raise ValueError(f"{origin_of(name, origins)}{name} = {text!a}: must be UTF-8 text without null bytes.")
    values, origins = _with_preset_fields(values, origins)
    try:
        return _RUN.validate_python(values)
    except ValidationError as error:
        raise ValueError(explain(error, RunConfig, values, origins)) from None


def _with_preset_fields(values: dict[str, Any], origins: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The sections with the fields of `model.preset` in its place; they come from the file or flag that names it.

    Raises:
        ValueError: There is no such preset, or it cannot be joined with the fields beside it.
    """
    model = values.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return values, origins
    origin = origin_of("model.preset", origins)
    try:
        fields = with_preset_fields(model)
    except ValueError as error:
        raise ValueError(f"{origin}{error}") from None
    of_preset = dict.fromkeys((f"model.{name}" for name in fields), origin.removesuffix(": ")) if origin else {}
    return values | {"model": fields}, of_preset | origins


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        for each in inner:
            yield from _texts(each)


def as_recipe(run: RunConfig) -> str:
    """Write the resolved run as a recipe, which `load_run_config` reads back to an equal run."""
    return to_yaml(as_dict(run))


def as_dict(run: RunConfig) -> dict[str, Any]:
    """Convert the run to nested mappings of plain values, as in JSON and YAML."""
    return _RUN.dump_python(run, mode="json")


def with_defaults(run: RunConfig, older: dict[str, Any]) -> dict[str, Any]:
    """The sections of an older configuration with today's defaults for the fields that they lack.

    They stay as they are where this version of xlstm-lm does not allow one of them.

    Args:
        run: a run of today, whose sections stand in while the older ones are checked.
        older: values of a run's config.yaml, or of some of its sections.
    """
    try:
        full = as_dict(_RUN.validate_python(as_dict(run) | with_current_names(older)))
    except ValidationError:
        return older
    return {section: full[section] for section in older}
