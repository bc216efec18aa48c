"""The baselines as functions: documents, states, steps, initialisation; and the same function as transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xlstm_lm.models import LSTMConfig, MambaConfig, TransformerConfig, build_model
from xlstm_lm.ops import attention
from xlstm_lm.ops.backend import make_call
from xlstm_lm.ops.operation import verify

CONFIGS = {
    "transformer": TransformerConfig(num_heads=4),
    "transformer_grouped": TransformerConfig(num_heads=4, num_key_value_heads=2, tie_embeddings=True),
    "mamba1": MambaConfig(version=1, state_dim=5, logit_soft_cap=30.0),
    "mamba2": MambaConfig(head_dim=12, num_groups=2, state_dim=9),
    "lstm": LSTMConfig(layer_norm=True),
    "lstm_peepholes": LSTMConfig(peepholes=True, hidden_dim=20),
    "gru": LSTMConfig(cell="gru"),
    "rnn": LSTMConfig(cell="rnn"),
}


def make_model(name: str):
    """A small model in float64, moved away from its initialisation."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    config = type(config)(**(vars(config) | {"vocab_size": 29, "embedding_dim": 24, "num_blocks": 2}))
    model = build_model(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return make_model(request.param)


def test_peepholes_look_at_the_cell_as_published():
    """Gates i and f see the cell before the step, o the one after it (Gers and Schmidhuber 2000)."""
    cell = next(module for module in make_model("lstm_peepholes").modules() if hasattr(module, "peephole"))
    x_BTD, y_BH, c_BH = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 24), (2, 20), (2, 20)))
    found_BTH, (last_y_BH, last_c_BH) = cell._with_peepholes(x_BTD, None, (y_BH, c_BH))
    peek_i, peek_f, peek_o = cell.peephole
    for t in range(5):
        i, f, z, o = (cell.input_weight @ x_BTD[:, t].T + cell.recurrent_weight @ y_BH.T).T.add(cell.bias).chunk(4, -1)
        c_BH = (f + peek_f * c_BH).sigmoid() * c_BH + (i + peek_i * c_BH).sigmoid() * z.tanh()
        y_BH = (o + peek_o * c_BH).sigmoid() * c_BH.tanh()
        torch.testing.assert_close(found_BTH[:, t], y_BH, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((last_y_BH, last_c_BH), (y_BH, c_BH), rtol=1e-12, atol=1e-12)


def test_packed_documents_equal_each_document_alone(model):
    lengths = [[5, 1, 8, 19, 2], [30, 5]]
    rows = [[torch.randint(0, 29, (1, length)) for length in row] for row in lengths]
    tokens_BT = torch.cat([torch.cat(row, dim=1) for row in rows])
    resets_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, sizes in enumerate(lengths):
        resets_BT[row, torch.tensor([0, *sizes[:-1]]).cumsum(0)] = True
    targets_BT = torch.randint(0, 29, tokens_BT.shape)

    packed_BTD = model(tokens_BT, resets_BT)
    model.loss(packed_BTD, targets_BT).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone_BTD = torch.cat([torch.cat([model(document) for document in row], dim=1) for row in rows])
    model.loss(alone_BTD, targets_BT).backward()

    torch.testing.assert_close(packed_BTD, alone_BTD, rtol=1e-10, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("cut", [1, 8, 22])
def test_a_row_in_pieces_equals_the_whole_row(model, cut, with_resets):
    tokens_BT = torch.randint(0, 29, (3, 23))
    resets_BT = torch.rand(3, 23) < 0.15 if with_resets else torch.zeros(3, 23, dtype=torch.bool)
    pieces, state = [], None
    for part in (slice(0, cut), slice(cut, 22), slice(22, 23)):
        if tokens_BT[:, part].shape[1]:
            resets = resets_BT[:, part] if with_resets else None
            hidden_BTD, state = model(tokens_BT[:, part], resets, state, return_state=True)
            pieces.append(hidden_BTD)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens_BT, resets_BT), rtol=1e-10, atol=1e-10)


def test_activation_checkpointing_changes_no_gradient(model):
    tokens_BT, resets_BT = torch.randint(0, 29, (2, 12)), torch.rand(2, 12) < 0.2
    gradients = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model.loss(model(tokens_BT, resets_BT), tokens_BT).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_only_matrices_decay(model):
    no_decay = model.no_decay_parameter_names()
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith(("log_decay", "peephole")) and name != "embedding.weight"
        assert (name not in no_decay) == is_matrix, name


@pytest.mark.parametrize("backend", ["sdpa", "by_document"])
def test_attention_backends_agree(backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 50, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    packing = attention.pack(2, 50, q.device, torch.rand(2, 50) < 0.1)
    weight_BHTS = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, 2)) / 8**0.5
    weight_BHTS = weight_BHTS.masked_fill(~packing.mask_B1TS, float("-inf")).softmax(-1)
    expected = torch.einsum("bhts,bshk->bthk", weight_BHTS, v.repeat_interleave(2, 2))
    found = attention.attention(q, k, v, packing, backend=backend)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream)
    )


def test_attention_that_does_not_run_is_found():
    """torch has no causal attention over jagged tensors on a CPU."""
    with torch.inference_mode():
        reason = verify(attention.ATTENTION, "jagged", make_call(torch.device("cpu"), torch.float32, {}, "long"))
    assert "it does not run" in reason


def test_lstm_layer_is_torchs():
    model = make_model("lstm")
    ours, theirs = model.blocks[0], nn.LSTM(24, 24, batch_first=True).double()
    with torch.no_grad():
        for name, value in (
            ("weight_ih", ours.input_weight),
            ("weight_hh", ours.recurrent_weight),
            ("bias_ih", ours.bias),
        ):
            getattr(theirs, f"{name}_l0").copy_(value)
        theirs.bias_hh_l0.zero_()
    x_BTD = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x_BTD, ours.make_context(x_BTD, None, None))[0], ours.norm(theirs(x_BTD)[0]))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_padded_documents_are_packed_ones(cell):
    model = build_model(LSTMConfig(cell=cell, vocab_size=29, embedding_dim=12, num_blocks=1)).double()
    layer, x_BTD = model.blocks[0], torch.randn(3, 40, 12, dtype=torch.float64, requires_grad=True)
    resets_BT = torch.zeros(3, 40, dtype=torch.bool)
    resets_BT[0, [0, 25]] = resets_BT[2, 13] = True
    context = layer.make_context(x_BTD, resets_BT, None)
    assert context.padded_MS.shape == (5, 40)
    state = tuple(torch.randn(3, 12, dtype=torch.float64) for _ in range(2 if cell == "lstm" else 1))
    padded, _ = layer(x_BTD, context, state)
    packed, _ = layer(x_BTD, context._replace(padded_MS=None), state)
    torch.testing.assert_close(padded, packed)
    upstream = torch.randn_like(padded)
    inputs = [x_BTD, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(padded, inputs, upstream), torch.autograd.grad(packed, inputs, upstream)
    )
    resets_BT[0, ::2] = True
    assert layer.make_context(x_BTD, resets_BT, None).padded_MS is None


def test_lstm_starts_with_open_forget_gates_and_orthogonal_recurrence():
    torch.manual_seed(0)
    model = build_model(LSTMConfig(vocab_size=29, embedding_dim=24))
    for layer in model.blocks:
        assert torch.equal(layer.bias, torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(24))
        for gate in layer.recurrent_weight.detach().chunk(4):
            torch.testing.assert_close(gate @ gate.T, torch.eye(24), rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_mamba_starts_with_the_published_steps(version):
    torch.manual_seed(0)
    model = build_model(MambaConfig(vocab_size=29, embedding_dim=64, num_blocks=2, version=version))
    for block in model.blocks:
        bias = block.mixer.step.bias if version == 1 else block.mixer.step_bias
        step = nn.functional.softplus(bias)
        assert step.min() >= 0.0009 and step.max() <= 0.101
        assert block.mixer.log_decay.exp().min() >= 0.99 and block.mixer.log_decay.exp().max() <= 16.01


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (TransformerConfig, {"embedding_dim": 30, "num_heads": 4}, "num_heads 4 .* choose a divisor of 15"),
        (TransformerConfig, {"num_heads": 12, "num_key_value_heads": 5}, "num_key_value_heads 5 does not divide"),
        (MambaConfig, {"embedding_dim": 40}, "head_dim 64"),
        (LSTMConfig, {"cell": "gru", "peepholes": True}, "peepholes belong to an LSTM"),
        (LSTMConfig, {"hidden_dim": 5, "tie_embeddings": True}, "tie_embeddings needs"),
        (LSTMConfig, {"dropout": 1.0}, "dropout is 1.0"),
        (MambaConfig, {"num_groups": 0}, "num_groups is 0; it must be a whole number from 1"),
        (TransformerConfig, {"logit_soft_cap": 0.0}, "logit_soft_cap is 0.0; it must be a number above 0 .* or null"),
    ],
)
def test_impossible_configurations_are_refused(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)
