"""Each format's renaming is a bijection over the parameters of its models, whatever the number of blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_lm.hub.formats import baseline_formats, own_format, package_layout, transformers_layout
from xlstm_lm.hub.formats.name_map import NameMap, joined
from xlstm_lm.models import FAMILIES, MambaConfig, TransformerConfig, XLSTMConfig

SIZES = {"vocab_size": 32, "embedding_dim": 64}
FORMATS = {
    "llama": (baseline_formats.LLAMA.names, TransformerConfig, {"num_heads": 2}, {"": ""}),
    "mamba": (baseline_formats.MAMBA1.names, MambaConfig, {"version": 1}, {"": ""}),
    "mamba2": (baseline_formats.MAMBA2.names, MambaConfig, {"version": 2}, {"": ""}),
    "xlstm": (transformers_layout.NAMES, XLSTMConfig, {"num_heads": 2}, {"mlstm": "single"}),
    "xlstm, fused": (transformers_layout.NAMES, XLSTMConfig, {"num_heads": 2}, {"mlstm": "fused"}),
    "xLSTMLarge": (transformers_layout.LARGE_NAMES, XLSTMConfig, {"num_heads": 2}, {"mlstm": "single"}),
    "xLSTMLMModel": (
        package_layout.PAPER_NAMES,
        XLSTMConfig,
        {"num_heads": 2, "norm": "layer"},
        {"mlstm_paper": "mlstm_paper", "slstm": "slstm"},
    ),
}
"""Format -> its map, the configuration of its models, and kinds of blocks, ours -> the map's."""


def make_model(config_class, blocks, values):
    if config_class is XLSTMConfig:
        values = values | {"pattern": blocks}
    config = config_class(**SIZES, num_blocks=len(blocks), **values)
    with torch.device("meta"):
        return FAMILIES[config.family][1](config)


def kind_of(name: str, kinds: list[str], prefix: str) -> str:
    """The kind of the block that a name lies in, by the number behind a prefix; empty outside the blocks."""
    return kinds[int(name.removeprefix(prefix).split(".")[0])] if name.startswith(prefix) else ""


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_format_renames_one_to_one(name, data):
    names, config_class, values, kinds_of = FORMATS[name]
    blocks = data.draw(st.lists(st.sampled_from(sorted(kinds_of)), min_size=1, max_size=12))
    kinds = [kinds_of[block] for block in blocks]
    ours = [each for each, _ in make_model(config_class, blocks, values).named_parameters()]
    table = names.names(kinds)
    assert sorted(table) == sorted(ours)
    theirs = [part for parts in table.values() for part in parts]
    assert len(set(theirs)) == len(theirs) and names.count_blocks(theirs) == len(blocks)
    for each, parts in table.items():
        assert names.to(each, kind_of(each, kinds, "blocks.")) == parts
        for place, part in enumerate(parts):
            assert names.from_(part, kind_of(part, kinds, names.prefix)) == (each, place)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "xLSTMLMModel"])
def test_splitting_and_joining_gives_the_tensors_back(name):
    names, config_class, values, kinds_of = FORMATS[name]
    ((block, kind),) = kinds_of.items()
    model = make_model(config_class, [block] * 2, values)
    weights = {each: torch.rand(parameter.shape) for each, parameter in model.named_parameters()}
    theirs = dict(names.split(weights.items(), lambda _: None, kind))
    back = joined(names.select(theirs, [kind] * 2, tied=False, what="a model"))
    assert back.keys() == weights.keys() and all(torch.equal(back[each], weights[each]) for each in weights)


@settings(max_examples=15, deadline=None)
@given(blocks=st.lists(st.sampled_from(["mlstm", "slstm", "mlstm_paper"]), min_size=1, max_size=12))
def test_our_own_format_renames_one_to_one(blocks):
    ours = [name for name, _ in make_model(XLSTMConfig, blocks, {"num_heads": 2}).named_parameters()]
    theirs = [own_format.NAMES.to(name) for name in ours]
    assert len(set(theirs)) == len(theirs) and [own_format.NAMES.from_(name) for name in theirs] == ours


def test_a_head_that_equals_the_embedding_is_tied_where_the_flag_says_so():
    names = NameMap({"embedding.weight": ("e",), "head.weight": ("h",)}, "b.", {})
    embedding, other = torch.ones(2, 2), torch.zeros(2, 2)
    for flag, tensors, tied in (
        (True, {"e": embedding}, True),
        (True, {"e": embedding, "h": embedding.clone()}, True),
        (True, {"e": embedding, "h": other}, False),
        (False, {"e": embedding, "h": embedding.clone()}, False),
    ):
        assert names.is_tied(flag, tensors) is tied
        (head,) = names.select(tensors, [], flag, "a model")["head.weight"]
        assert torch.equal(head, embedding if tied else tensors["h"])
    with pytest.raises(ValueError, match="not those of a model: missing h; left over x"):
        names.select({"e": embedding, "x": other}, [], False, "a model")
    with pytest.raises(KeyError):
        names.from_("x")
