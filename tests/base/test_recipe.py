"""YAML as recipes and flags hold it: what plain values mean, and what is refused with one message, and soon."""

from __future__ import annotations

import os

import pytest
import yaml

from xlstm_lm.base.recipe import (
    dotted_items,
    merge,
    merge_origins,
    parse_yaml,
    read_recipe,
    to_yaml,
    with_current_names,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+7", 7),
        ("1e3", 1000.0),
        ("1e-05", 1e-05),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -float("inf")),
        ("true", True),
        ("~", None),
        ("NULL", None),
        *(
            (text, text)
            for text in ("1:30", "1:30.5", "1_000", "0b1", "yes", "no", "on", "Off", "y", "2024-01-01", "=")
        ),
        *((text, text) for text in ("1,000", "e1", ".", "xlstm[7:1]", "tRue", "1e5.")),
    ],
)
def test_plain_values_are_those_of_version_1_2(text, value):
    assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join(f'*{before}' for _ in range(9))}]\n" for before, key in zip("abcdefgh", "bcdefghi")
)
MERGES = BOMB.replace("[x, x, x, x, x, x, x, x, x]", "{x: 1}").replace("[*", "{<<: [*").replace("]", "]}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' occurs twice, first in line 1, again in line 3"),
        ("m: {a: {k: 1, 'k': 2}}", "the key 'k' occurs twice"),
        ("- {1: a, 1: b}", "the key '1' occurs twice"),
        ("a: &a {b: *a}", r"the alias \*a holds itself in line 1"),
        ("a: &a [[*a]]", r"the alias \*a holds itself"),
        ("[" * 3000, "more than 40 levels of nesting"),
        ("x: " + "{a: " * 3000, "more than 40 levels of nesting"),
        (BOMB, "more than 100,000 values, aliases written out"),
        (MERGES, "more than 100,000 values, aliases written out"),
        (f"a: {'9' * 5000}", "no whole number of at most 100 digits"),
        (f"a: 0x{'f' * 5000}", "no whole number of at most 100 digits"),
        ("[1]: 2", "a key must be text"),
        ("!!python/object:os.system x", "could not determine a constructor"),
        ("!!timestamp x", "could not determine a constructor"),
        ("!!int x", "no whole number"),
        ("!!bool maybe", "neither true nor false"),
        ("!!float x", "is no number"),
        ("a\0", "unacceptable character"),
        ("[a", "expected ',' or ']'"),
        ("a: 1\n---\na: 2", "another document in line 2"),
    ],
)
def test_what_is_no_sound_yaml_ends_with_one_message(text, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_merged_keys_may_be_overridden():
    text = "a: {b: &x {k: 1, l: 2}}\nc: &y {<<: *x, k: 3}\nd: {<<: [*y], l: 4}"
    assert parse_yaml(text) == {"a": {"b": {"k": 1, "l": 2}}, "c": {"k": 3, "l": 2}, "d": {"k": 3, "l": 4}}


TEXTS = [
    *"010 1:30 yes no On y 2024-01-01 1e3 1E5 +1e3 0o17 0x1F 0b1 1_000 << null ~ true .5 .inf .NaN 12e03 1e5.".split(),
    *". = - ? [x] {a} #x !t %x @ ` * & > | --- ... é 🙂 ' \"".split(),
    *("", " a", "a ", "a: b", "run #2", "two\nlines", "\u2028", "\x85", "\ufeff", "tab\t", "a " * 200),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_looks_like_something_else_is_read_back_as_text(text):
    values = {"name": text, "list": [text]}
    written = to_yaml(values)
    assert parse_yaml(written) == values
    assert yaml.safe_load(written) == values, "readers of version 1.1 see the same"


@pytest.mark.parametrize("value", [1e-05, 1e16, 3e-10, 5e8, 0.1, 1.0, 10, -3, 10**20, True, None, float("inf")])
def test_what_runs_wrote_by_version_1_1_reads_the_same(value):
    for written in (yaml.safe_dump({"a": value}), to_yaml({"a": value})):
        read = parse_yaml(written)["a"]
        assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: path.write_bytes(b"\x80\x81" * 99), "no UTF-8 text"),
        (lambda path: path.write_text("a: 1 #" + "x" * 2**20), "has 1,048,582 bytes; a recipe has 1,048,576 at most"),
        (lambda path: path.write_text("# nothing"), "is empty, but a recipe is a mapping"),
    ],
)
def test_what_is_no_recipe_file_is_said_so(make, message, tmp_path):
    make(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "x.yaml")


def test_an_include_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.yaml").write_text("training: {steps: 3}\r\n")
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfinclude: [~/mine.yaml]\r\n")
    assert read_recipe(tmp_path / "x.yaml")[0] == {"training": {"steps": 3}}


def test_includes_that_multiply_are_bounded(tmp_path):
    for level in range(9):
        (tmp_path / f"{level}.yaml").write_text(f"include: [{', '.join([f'{level + 1}.yaml'] * 9)}]\n")
    (tmp_path / "9.yaml").write_text("training: {steps: 1}\n")
    with pytest.raises(ValueError, match="0.yaml includes more than 100 recipes"):
        read_recipe(tmp_path / "0.yaml")


def test_a_key_replaces_where_all_below_and_above_it_come_from():
    below = {"data": {"sources": [], "task": {"name": "parity"}}, "model": {"norm": "rms"}}
    over = {"data": {"sources": {"kind": "text"}, "task": None}}
    before, after = (dict.fromkeys(dotted_items(values), file) for values, file in ((below, "a"), (over, "b")))
    origins = merge_origins(merge(below, over), before, after)
    assert origins == {"model.norm": "a", "data.sources.kind": "b", "data.task": "b"}


def test_an_empty_section_leaves_the_fields_below_it_and_their_origins(tmp_path):
    (tmp_path / "below.yaml").write_text("model: {norm: rms}\n")
    (tmp_path / "above.yaml").write_text("include: [below.yaml]\nmodel: {}\nwandb: {}\n")
    values, origins = read_recipe(tmp_path / "above.yaml")
    assert values == {"model": {"norm": "rms"}, "wandb": {}}
    assert origins == {"model.norm": str(tmp_path / "below.yaml"), "wandb": str(tmp_path / "above.yaml")}


def test_former_names_become_todays():
    assert with_current_names({"schedule": {"warmup_steps": 3, "kind": "wsd"}, "model": 1}) == {
        "schedule": {"warmup": 3, "kind": "wsd"},
        "model": 1,
    }
    with pytest.raises(ValueError, match="two names of one field"):
        with_current_names({"schedule": {"warmup_steps": 3, "warmup": 3}})
