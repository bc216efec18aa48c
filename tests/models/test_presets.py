"""Presets: exact sizes, sizes that match within a class, and names that do not exist."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_accounting import mlstm_total, paper_total
from xlstm_lm.models import build_model
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.models.presets import PRESETS, preset, preset_fields, preset_names, with_preset_fields

PARAMETERS = {
    "xlstm-165m": 164_073_312,
    "xlstm-400m": 406_856_896,
    "xlstm-830m": 841_496_256,
    "xlstm-1.3b": 1_420_839_104,
    "xlstm-2.7b": 2_780_449_600,
    "xlstm-7b": 6_865_424_896,
    "xlstm-paper-125m-1-0": 163_806_144,
    "xlstm-paper-125m-7-1": 163_690_928,
    "xlstm-paper-350m-1-0": 409_290_112,
    "xlstm-paper-350m-7-1": 408_436_048,
    "xlstm-paper-760m-1-0": 840_427_392,
    "xlstm-paper-760m-7-1": 839_736_144,
    "xlstm-paper-1.3b-1-0": 1_422_559_616,
    "xlstm-paper-1.3b-7-1": 1_420_065_104,
    "xlstm-cpu-0.7m": 710_800,
    "xlstm-cpu-1m": 1_033_240,
    "xlstm-cpu-3m": 2_969_368,
    "xlstm-paper-cpu-1m-1-0": 1_037_320,
    "xlstm-paper-cpu-1m-1-1": 1_021_952,
    "xlstm-paper-cpu-3m-1-0": 2_979_796,
    "mlstm-cpu-0.7m": 714_656,
    "mlstm-cpu-1m": 1_034_144,
    "slstm-cpu-0.7m": 714_112,
    "slstm-cpu-1m": 1_023_960,
    "xlstm-cpu-8.5m": 8_542_528,
    "xlstm-conv-165m": 164_174_688,
    "xlstm-conv-400m": 407_127_232,
    "xlstm-conv-1.3b": 1_421_379_776,
    "xlstm-conv-7b": 6_866_866_688,
    "xlstm-conv-cpu-0.7m": 713_616,
    "xlstm-conv-cpu-1m": 1_037_464,
    "xlstm-conv-cpu-3m": 2_976_760,
    "mlstm-conv-cpu-0.7m": 708_000,
    "mlstm-conv-cpu-1m": 1_033_632,
    "transformer-165m": 163_990_272,
    "transformer-400m": 406_635_520,
    "transformer-830m": 841_164_288,
    "transformer-1.3b": 1_420_396_544,
    "transformer-2.7b": 2_779_548_160,
    "transformer-7b": 6_863_196_160,
    "transformer-cpu-0.7m": 710_016,
    "transformer-cpu-1m": 1_032_064,
    "transformer-cpu-3m": 2_977_344,
    "transformer-cpu-8.5m": 8_524_032,
    "mamba1-165m": 164_015_616,
    "mamba1-400m": 409_717_760,
    "mamba1-830m": 840_675_840,
    "mamba1-1.3b": 1_422_366_720,
    "mamba1-2.7b": 2_773_452_800,
    "mamba1-7b": 6_836_142_080,
    "mamba2-165m": 163_870_072,
    "mamba2-400m": 406_672_192,
    "mamba2-830m": 842_808_688,
    "mamba2-1.3b": 1_420_963_392,
    "mamba2-2.7b": 2_791_202_320,
    "mamba2-7b": 6_856_432_000,
    "mamba1-cpu-0.7m": 712_320,
    "mamba1-cpu-1m": 1_023_360,
    "mamba1-cpu-3m": 2_943_744,
    "mamba2-cpu-0.7m": 710_822,
    "mamba2-cpu-1m": 1_023_072,
    "mamba2-cpu-3m": 2_953_622,
    "mamba1-cpu-8.5m": 8_553_720,
    "mamba2-cpu-8.5m": 8_613_456,
    "lstm-cpu-0.7m": 713_680,
    "lstm-cpu-1m": 1_038_736,
    "gru-cpu-0.7m": 706_576,
    "gru-cpu-1m": 1_031_272,
    "rnn-cpu-0.7m": 710_968,
    "rnn-cpu-1m": 1_033_984,
    "lstm-cpu-8.5m": 8_547_648,
    "gru-cpu-8.5m": 8_504_416,
    "gated-delta-165m": 164_253_144,
    "gated-delta-400m": 405_763_504,
    "gated-delta-1.3b": 1_424_943_536,
    "gated-delta-cpu-0.7m": 712_368,
    "gated-delta-cpu-1m": 1_035_260,
}
"""Parameters of every preset: a preset that changes is another model under the same name."""


def test_every_preset_has_the_parameters_that_it_always_had():
    assert {name: count_parameters(preset(name)) for name in preset_names()} == PARAMETERS


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_built(name):
    with torch.device("meta"):
        model = build_model(preset(name))
    assert model.config.vocab_size in (257, 4096, 50304)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("xlstm-165m", (768, 12, 4)),
        ("xlstm-400m", (1024, 24, 4)),
        ("xlstm-1.3b", (2048, 24, 4)),
        ("xlstm-2.7b", (2560, 32, 5)),
        ("xlstm-7b", (4096, 32, 8)),
    ],
)
def test_presets_of_xlstm_7b_style(name, sizes):
    assert count_parameters(preset(name)) == mlstm_total(*sizes)


@pytest.mark.parametrize(
    ("size", "d", "blocks"), [("125m", 768, 24), ("350m", 1024, 48), ("760m", 1536, 48), ("1.3b", 2048, 48)]
)
def test_presets_of_the_first_paper(size, d, blocks):
    num_slstm = 2 if size == "125m" else 6
    assert count_parameters(preset(f"xlstm-paper-{size}-1-0")) == paper_total(d, blocks, 0)
    assert count_parameters(preset(f"xlstm-paper-{size}-7-1")) == paper_total(d, blocks, num_slstm)


@pytest.mark.parametrize(
    "size", ["165m", "400m", "830m", "1.3b", "2.7b", "7b", "cpu-0.7m", "cpu-1m", "cpu-3m", "cpu-8.5m"]
)
def test_presets_of_a_size_match_within_one_percent(size):
    names = [name for name in preset_names() if name.endswith(f"-{size}")]
    assert {name.split("-")[0] for name in names} >= {"xlstm", "transformer", "mamba1", "mamba2"}
    reference = count_parameters(preset(f"xlstm-{size}"))
    for name in names:
        assert abs(count_parameters(preset(name)) / reference - 1) < 0.01, name


def test_names_say_the_kind_of_block():
    for name in preset_names():
        config = preset(name)
        if config.family == "xlstm":
            papers = "mlstm_paper" in config.block_kinds()
            assert name.startswith("xlstm-paper-") == papers, name
            assert name.startswith("slstm-") == (set(config.block_kinds()) == {"slstm"}), name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("xlstm-4000m", r"Did you mean xlstm-400m\?"),
        ("XLSTM-400M", r"Did you mean xlstm-400m\?"),
        ("?", "There are xlstm-165m, .*gru-cpu-8.5m"),
        (3, "There are xlstm-165m"),
    ],
)
def test_a_name_that_is_no_preset_is_refused_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=rf"{name!r} is no preset\. {hint}".replace("'?'", r"'\?'")):
        preset_fields(name)


def test_the_tables_stay_what_they_are():
    preset_fields("xlstm-cpu-1m")["slstm_positions"].append(5)
    preset("xlstm-cpu-1m").slstm_positions.append(5)
    with_preset_fields({"preset": "xlstm-cpu-1m"})["slstm_positions"].append(5)
    assert PRESETS["xlstm-cpu-1m"]["slstm_positions"] == [0, 2, 4]


def test_fields_beside_a_preset_win():
    section = {"num_heads": 8, "preset": "xlstm-400m"}
    assert with_preset_fields(section) == preset_fields("xlstm-400m") | {"num_heads": 8}
    assert with_preset_fields({"num_heads": 8}) == {"num_heads": 8}
    whole = preset_fields("xlstm-400m")
    assert with_preset_fields(whole | {"preset": "xlstm-400m"}) == whole


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"family": "xlstm"}, "is of the family transformer, but model.family is 'xlstm': remove one of the two"),
        (preset_fields("transformer-165m"), "has no effect, because a recipe or flag sets every field of it"),
    ],
)
def test_fields_that_leave_nothing_of_a_preset_are_refused(own, message):
    with pytest.raises(ValueError, match=f"model.preset = 'transformer-400m' {message}"):
        with_preset_fields(own | {"preset": "transformer-400m", "feedforward_dim": 64, "num_heads": 4})
