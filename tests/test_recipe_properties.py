"""Recipes: merging, dotted fields, and what is written reads back equal."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_lm.base.recipe import dotted_items, merge, merge_origins, parse_yaml, to_yaml
from xlstm_lm.training.run_config import as_dict, as_recipe, check_run_config, load_run_config

keys = st.text(st.characters(codec="utf-8", exclude_characters=".\0"), min_size=1, max_size=6)
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=20)
)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))
recipes = st.dictionaries(keys, values, max_size=5)
few = st.sampled_from("abc")
sections = st.recursive(st.integers(), lambda inner: st.dictionaries(few, inner, max_size=3), max_leaves=12)
mappings = st.dictionaries(few, sections, max_size=3)


def nested(items: dict) -> dict:
    """The mapping whose `dotted_items` these are."""
    found: dict = {}
    for name, value in items.items():
        for key in reversed(name.split(".")):
            value = {key: value}
        found = merge(found, value)
    return found


@settings(max_examples=75, deadline=None)
@given(recipe=recipes)
def test_yaml_reads_back_equal_and_of_the_same_type(recipe):
    again = parse_yaml(to_yaml(recipe))
    assert again == recipe and repr(again) == repr(recipe)


@settings(max_examples=75, deadline=None)
@given(recipe=recipes)
def test_dotted_items_hold_the_whole_recipe(recipe):
    assert nested(dotted_items(recipe)) == recipe


@settings(max_examples=200, deadline=None)
@given(a=mappings, b=mappings)
def test_merging_keeps_what_is_not_overridden(a, b):
    merged, before = dotted_items(merge(a, b)), dotted_items(a)
    changes_nothing = {name for name in dotted_items(b) if any(each.startswith(f"{name}.") for each in before)}
    over = {name: value for name, value in dotted_items(b).items() if value != {} or name not in changes_nothing}
    assert merge(a, {}) == merge({}, a) == a and merge(a, a) == a
    assert all(merged[name] == value for name, value in over.items())
    for name, value in before.items():
        if not any(f"{name}.".startswith(f"{each}.") or f"{each}.".startswith(f"{name}.") for each in over):
            assert merged[name] == value
    origins = merge_origins(merge(a, b), dict.fromkeys(before, "a"), dict.fromkeys(dotted_items(b), "b"))
    assert origins == {name: "b" if name in over else "a" for name in merged}


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(1, 48),
    heads=st.sampled_from([1, 2, 4, 8]),
    rate=st.floats(1e-7, 1.0),
    steps=st.integers(2, 10**6),
    warmup=st.floats(0.0, 0.5),
    folder=st.text(st.characters(codec="utf-8", exclude_characters="\0/~"), min_size=1, max_size=12),
    stage=st.integers(0, 3),
)
def test_a_run_written_as_a_recipe_or_as_flags_reads_back_equal(blocks, heads, rate, steps, warmup, folder, stage):
    flags = {
        "model.num_blocks": blocks,
        "model.num_heads": heads,
        "data.context_length": 64,
        "optimizer.learning_rate": rate,
        "training.steps": steps,
        "training.run_dir": f"runs/{folder}",
        "schedule.warmup": warmup,
        "deepspeed.zero_optimization.stage": stage,
    }
    run = load_run_config([], flags)
    assert check_run_config(parse_yaml(as_recipe(run)), {}) == run
    assert load_run_config([], dotted_items(as_dict(run))) == run
    assert math.isclose(run.optimizer.learning_rate, rate, rel_tol=0)
