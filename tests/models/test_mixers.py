"""Every mixer against its own description: FLOPs, state, documents, initialization."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch

from xlstm_lm.base.fields import Range
from xlstm_lm.models import FAMILIES, HybridConfig, ModelConfig, TransformerConfig, build_model
from xlstm_lm.models.accounting import count_parameters, state_bytes, training_flops_per_token
from xlstm_lm.models.mixers import MIXERS
from xlstm_lm.models.mixers.attention import AttentionConfig, AttentionMixer
from xlstm_lm.ops import attention
from xlstm_lm.ops.operation import choose, recorded_choices

SECTIONS = {
    "mamba1": {"state_dim": 5},
    "mamba2": {"head_dim": 12, "num_groups": 2, "state_dim": 9},
    "attention": {"num_key_value_heads": 1},
    "attention window 1": {"window": 1},
    "attention window 5": {"num_key_value_heads": 1, "window": 5},
}
KINDS = [*MIXERS, "attention window 1", "attention window 5"]
T, L = 48, 8
CELL_FLOPS = {
    "mlstm": lambda c: 2 * (L * (6 + 12) + 4 * 6 * 12 + 4 * 6 + 4 * L),
    "mlstm_conv": lambda c: 2 * (L * (6 + 12) + 4 * 6 * 12 + 4 * 6 + 4 * L),
    "mlstm_paper": lambda c: 2 * (L * 64 + 4 * 32 * 32 + 4 * 32 + 4 * L),
    "slstm": lambda c: 20 * 24,
    "attention": lambda c: 4 * 24 * T / 2,
    "mamba1": lambda c: 9 * 48 * 5,
    "gated_delta": lambda c: 2 * (L * (3 * 9 + 2 * 18) + 6 * 9 * 18 + 6 * L),
    "mamba2": lambda c: 4 * (T * (9 + 12) + 4 * 9 * 12 + 4 * T),
}


def configure(kind: str, **changes) -> HybridConfig:
    name = kind.split()[0]
    sizes = {"vocab_size": 29, "embedding_dim": 24, "num_blocks": 2, "num_heads": 2, "chunk_length": L}
    sections = [{"kind": name} | SECTIONS[kind]] if kind in SECTIONS else None
    return HybridConfig(**sizes | {"pattern": name, "mixers": sections} | changes)


def make_model(config):
    """A model in float64, moved away from its initialization."""
    torch.manual_seed(0)
    model = build_model(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_every_mixer_has_its_kind_and_cell_flops():
    assert all(config.kind == kind for kind, config in MIXERS.items())
    assert CELL_FLOPS.keys() == MIXERS.keys()


@pytest.mark.parametrize("kind", MIXERS)
def test_every_mixer_has_papers_and_one_line_of_description(kind):
    papers = configure(kind).mixer(kind).papers()
    assert papers and all(re.fullmatch(r"\d{4}\.\d{5}", paper) for paper in papers)
    assert re.fullmatch(r"Settings of [^\n]+\.", MIXERS[kind].__doc__)


@pytest.mark.parametrize("kind", MIXERS)
def test_flops_are_two_for_each_weight_and_the_cells(kind):
    config = configure(kind)
    model = build_model(config)
    mixer = model.blocks[0].mixer
    weights = sum(
        parameter.numel()
        for name, parameter in mixer.named_parameters()
        if parameter.ndim > 1 and name not in mixer.no_decay
    )
    assert sum(mixer.config.flops_by_part(T).values()) == 2 * weights + CELL_FLOPS[kind](mixer.config)
    feedforward = config.mixer(kind).feedforward()
    hidden = sum(each.numel() for each in model.blocks[0].feedforward.parameters()) if feedforward else 0
    blocks = 2 * (2 * weights + CELL_FLOPS[kind](mixer.config) + 2 * hidden)
    assert training_flops_per_token(config, T) == 3 * (blocks + 2 * 24 * 29)


def test_a_windows_flops_are_those_of_the_keys_that_are_seen():
    whole = TransformerConfig(embedding_dim=64, num_heads=4, num_blocks=1)
    near = TransformerConfig(embedding_dim=64, num_heads=4, num_blocks=1, window=100)
    saved = (training_flops_per_token(whole, 1000) - training_flops_per_token(near, 1000)) / 3
    hidden_keys = sum(max(t + 1 - 100, 0) for t in range(1000)) / 1000
    assert saved == pytest.approx(4 * 64 * hidden_keys, rel=2e-3)
    assert training_flops_per_token(whole, 100) == training_flops_per_token(near, 100)


@pytest.mark.parametrize("length", [3, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_state_bytes_are_those_of_the_state(kind, length):
    config = configure(kind)
    _, state = build_model(config)(torch.zeros(1, length, dtype=torch.long), return_state=True)
    counted = sum(tensor.nbytes for each in state for tensor in (each[:2] if "attention" in kind else each))
    assert state_bytes(config, bytes_per_activation=4, context_length=length) == counted


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_and_pieces_equal_each_document_alone(kind):
    model = make_model(configure(kind))
    lengths = [[5, 1, 8, 19, 2], [30, 5]]
    rows = [[torch.randint(0, 29, (1, length)) for length in row] for row in lengths]
    tokens_BT = torch.cat([torch.cat(row, dim=1) for row in rows])
    resets_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, sizes in enumerate(lengths):
        resets_BT[row, torch.tensor([0, *sizes[:-1]]).cumsum(0)] = True
    alone_BTD = torch.cat([torch.cat([model(document) for document in row], dim=1) for row in rows])
    model.loss(alone_BTD, tokens_BT).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        packed_BTD = model(tokens_BT, resets_BT)
        model.loss(packed_BTD, tokens_BT).backward()
        torch.testing.assert_close(packed_BTD, alone_BTD, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close([each.grad for each in model.parameters()], expected, rtol=1e-8, atol=1e-9)
    pieces, state = [], None
    with torch.no_grad():
        for cut in (slice(0, 17), slice(17, 18), slice(18, 20), slice(20, 35)):
            hidden_BTD, state = model(tokens_BT[:, cut], resets_BT[:, cut], state, return_state=True)
            pieces.append(hidden_BTD)
    torch.testing.assert_close(torch.cat(pieces, dim=1), alone_BTD, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", MIXERS)
def test_initialization_reaches_every_parameter_and_no_decay_names_exist(kind):
    model = build_model(configure(kind))
    names = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert model.no_decay_parameter_names() <= names


@pytest.mark.parametrize("kind", MIXERS)
def test_operations_are_those_of_a_training_step(kind):
    config = configure(kind)
    model = build_model(config)
    tokens_BT = torch.randint(0, config.vocab_size, (3, 20))
    resets_BT = torch.rand(3, 20) < 0.2
    device, dtype = tokens_BT.device, torch.float32
    with recorded_choices() as taken:
        model.loss(model(tokens_BT, resets_BT), tokens_BT).backward()
    described = {use.operation.name for use in config.operations(micro_rows=3)}
    described |= {"mlstm"} if "ssd" in described else set()  # whose kernels compute it
    assert described == taken.keys() - {"loss"}
    for use in config.operations(micro_rows=3):
        assert use.backend == "auto" and choose(use.operation, use.call(device, dtype)).backend


@pytest.mark.parametrize("window", [1, 3, 16, 49, 50, 200])
@pytest.mark.parametrize("earlier", [0, 2, 70])
@pytest.mark.parametrize("T", [1, 33, 50])
def test_windowed_attention_is_the_dense_mask(window, earlier, T):
    torch.manual_seed(0)
    q = torch.randn(2, T, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, earlier + T, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    resets_BT, seen_BS = torch.rand(2, T) < 0.1, (torch.rand(2, earlier) < 0.7).cummax(1).values
    packing = attention.pack(2, T, q.device, resets_BT, seen_BS, window)
    # The definition, pair by pair.
    document = torch.cat((torch.where(seen_BS, 0, -1), resets_BT.cumsum(1)), dim=1)
    query, key = torch.arange(earlier, earlier + T)[:, None], torch.arange(earlier + T)
    mask_BTS = (document[:, earlier:, None] == document[:, None]) & (key <= query) & (query - key < window)
    weight_BHTS = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, 2)) / 8**0.5
    weight_BHTS = weight_BHTS.masked_fill(~mask_BTS[:, None], float("-inf")).softmax(-1)
    expected = torch.einsum("bhts,bshk->bthk", weight_BHTS, v.repeat_interleave(2, 2))
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), upstream)
    for backend in ("auto", "sdpa", *(["banded"] if window < earlier + T else [])):
        found = attention.attention(q, k, v, packing, backend=backend)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, (q, k, v), upstream), gradients)


def test_positions_are_counted_from_the_start_of_each_document():
    config = AttentionConfig(embedding_dim=8, num_heads=2, rope_theta=1.0, feedforward_factor=2.0, feedforward_dim=None)
    mixer, x_BTD = AttentionMixer(config), torch.zeros(3, 4, 8)
    resets_BT = torch.zeros(3, 4, dtype=torch.bool)
    resets_BT[0, 0] = resets_BT[1, 2] = True

    def positions(resets_BT, state):
        context = mixer.make_context(x_BTD, resets_BT, state)  # every angle is the position, as rope_theta is 1
        angle_BT = torch.atan2(context.sine_BT1K, context.cosine_BT1K)[:, :, 0, 0]
        return angle_BT.round().long().tolist(), context

    started, context = positions(resets_BT, None)
    assert started == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert context.position_B.tolist() == [4, 2, 4]
    state = (None, None, torch.ones(3, 5, dtype=torch.bool), torch.tensor([3, -1, -2]))
    continued, context = positions(resets_BT, state)
    assert continued == [[0, 1, 2, 3], [-1, 0, 0, 1], [-2, -1, 0, 1]]
    assert context.position_B.tolist() == [4, 2, 2]
    assert context.seen_BS.int().sum(1).tolist() == [4, 2, 9]


def test_a_hybrid_mixes_every_kind():
    kinds = list(MIXERS)
    sections = [{"kind": kind} | SECTIONS[kind] for kind in kinds if kind in SECTIONS]
    config = configure("mlstm", pattern=kinds, num_blocks=len(kinds), mixers=sections)
    model = make_model(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    tokens_BT, resets_BT = torch.randint(0, 29, (2, 21)), torch.rand(2, 21) < 0.1
    whole_BTD = model(tokens_BT, resets_BT)
    first_BTD, state = model(tokens_BT[:, :13], resets_BT[:, :13], return_state=True)
    second_BTD = model(tokens_BT[:, 13:], resets_BT[:, 13:], state=state)
    torch.testing.assert_close(torch.cat((first_BTD, second_BTD), dim=1), whole_BTD, rtol=1e-9, atol=1e-9)
    assert set(model.gate_statistics(tokens_BT)) == {"forget_gate", "input_gate_preactivation", "share_at_soft_cap"}


def test_ratio_patterns_name_any_kind():
    config = configure("mlstm", pattern="xlstm[3:1]", num_blocks=4, mlstm_block="mamba1", slstm_block="attention")
    assert config.block_kinds() == ["mamba1"] * 3 + ["attention"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([{"kind": "gru"}], r"mixers\[0\] is .*whose kind is one of mlstm, mlstm_conv, mlstm_paper"),
        ([{"num_heads": 2}], r"mixers\[0\] is"),
        ([{"kind": "attention", "num_haeds": 2}], "section attention has no field 'num_haeds'; did you mean num_heads"),
        ([{"kind": "attention", "embedding_dim": 2}], "section attention has no field 'embedding_dim'"),
        ([{"kind": "attention"}, {"kind": "attention"}], "two sections of kind attention; join them"),
        ([{"kind": "mamba1"}], "section of kind mamba1, but the pattern has only mlstm, attention"),
        ([{"kind": "attention", "num_heads": 5}], "section attention: num_heads 5 does not give heads"),
        ([{"kind": "attention", "window": 0}], "section attention: window is 0; it must be a whole number from 1"),
    ],
)
def test_sections_that_fit_no_block_are_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        configure("mlstm", pattern=["mlstm", "attention"], mixers=sections)


def test_gated_delta_starts_with_the_published_decays_and_steps():
    torch.manual_seed(0)
    mixer = configure("gated_delta", embedding_dim=2048, num_heads=512, num_blocks=1).mixer("gated_delta").build()
    for _ in mixer.initialize_in_turn(0, 1):
        pass
    decays, steps = mixer.log_decay.detach().exp(), torch.nn.functional.softplus(mixer.gates.bias.detach()[512:])
    assert 0 < decays.min() < 0.2 and 15.8 < decays.max() < 16
    assert 1e-3 < steps.min() < 1.1e-3 and 0.09 < steps.max() < 0.1
    assert steps.log().mean() == pytest.approx(math.log(1e-2), abs=0.2), "even in their logarithm"


def lowest_numbers(config_class: type) -> dict[str, int]:
    """The lowest value of each field that is a whole number."""
    hints = get_type_hints(config_class, include_extras=True)
    found = {field.name: [hints[field.name], *get_args(hints[field.name])] for field in fields(config_class)}
    return {
        name: each.low
        for name, parts in found.items()
        for hint in parts
        for each in get_args(hint)[1:]
        if isinstance(each, Range) and get_args(hint)[0] is int
    }


def check_that_it_runs_or_names(field: str, configure_model: Callable[[], ModelConfig]) -> None:
    """Compute with a model, unless its configuration is refused with the field's name."""
    try:
        config = configure_model()
    except ValueError as refused:
        assert field in str(refused)
    else:
        assert build_model(config)(torch.zeros(1, 5, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "field", "lowest"),
    [(kind, *each) for kind, config_class in MIXERS.items() for each in lowest_numbers(config_class).items()],
)
def test_a_mixer_runs_with_the_lowest_number_of_any_field(kind, field, lowest):
    section = {"kind": kind} | SECTIONS.get(kind, {}) | {field: lowest}
    check_that_it_runs_or_names(field, lambda: configure(kind, mixers=[section]))


@pytest.mark.parametrize(
    ("family", "field", "lowest"),
    [(family, *each) for family, (config, _) in FAMILIES.items() for each in lowest_numbers(config).items()],
)
def test_a_model_runs_with_the_lowest_number_of_any_field(family, field, lowest):
    heads = {"mamba": {"head_dim": 16}, "lstm": {}}.get(family, {"num_heads": 2})
    sizes = {"vocab_size": 29, "embedding_dim": 32, "num_blocks": 1} | heads
    check_that_it_runs_or_names(field, lambda: FAMILIES[family][0](**sizes | {field: lowest}))
