"""The model as a function: resets, states, initialisation, what the configuration refuses."""

from __future__ import annotations

import pytest
import torch

from xlstm_lm.models import XLSTMConfig, build_model

PATTERNS = {
    "mlstm": {"pattern": "mlstm"},
    "mlstm_sigmoid_gate": {"pattern": "mlstm", "input_gate": "sigmoid", "cell_norm": "rms"},
    "mlstm_paper": {
        "pattern": "mlstm_paper",
        "num_heads": 2,
        "norm": "layer",
        "gate_soft_cap": None,
        "logit_soft_cap": None,
    },
    "slstm": {"pattern": "slstm", "norm": "layer"},
    "mixed": {"pattern": ["mlstm", "slstm", "mlstm_paper"], "num_blocks": 3, "num_heads": 2, "tie_embeddings": True},
}


def make_model(name: str, seed: int = 0, **changes):
    """A small model of each pattern in float64, moved away from its initialisation, where whole paths are 0."""
    torch.manual_seed(seed)
    settings = {"vocab_size": 29, "embedding_dim": 24, "num_blocks": 2, "num_heads": 3, "chunk_length": 8} | PATTERNS[
        name
    ]
    model = build_model(XLSTMConfig(**(settings | changes))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def pack(lengths: list[int], vocab_size: int = 29) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Documents of the given lengths, the row that they make together, and where each starts in it."""
    documents = [torch.randint(0, vocab_size, (1, length)) for length in lengths]
    starts = torch.tensor([sum(lengths[:index]) for index in range(len(lengths))])
    resets_BT = torch.zeros(1, sum(lengths), dtype=torch.bool)
    resets_BT[0, starts] = True
    return documents, torch.cat(documents, dim=1), resets_BT


@pytest.mark.parametrize("name", PATTERNS)
def test_packed_documents_with_resets_equal_each_document_alone(name):
    model = make_model(name)
    documents, tokens_BT, resets_BT = pack([5, 1, 8, 19, 2, 16])
    targets = [torch.randint(0, 29, document.shape) for document in documents]

    model.loss(model(tokens_BT, resets_BT), torch.cat(targets, dim=1)).backward()
    packed_gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    hidden_alone = [model(document) for document in documents]
    sum(model.loss(hidden, target) for hidden, target in zip(hidden_alone, targets)).backward()

    torch.testing.assert_close(model(tokens_BT, resets_BT), torch.cat(hidden_alone, dim=1), rtol=1e-10, atol=1e-10)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            packed_gradients[key], parameter.grad, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("cut", [1, 2, 8, 21])
def test_a_row_in_two_pieces_equals_the_whole_row(name, cut):
    model = make_model(name)
    tokens_BT = torch.randint(0, 29, (2, 23))
    resets_BT = torch.rand(2, 23) < 0.1
    whole_BTD = model(tokens_BT, resets_BT)
    first_BTD, state = model(tokens_BT[:, :cut], resets_BT[:, :cut], return_state=True)
    second_BTD = model(tokens_BT[:, cut:], resets_BT[:, cut:], state=state)
    torch.testing.assert_close(torch.cat((first_BTD, second_BTD), dim=1), whole_BTD, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PATTERNS)
def test_token_by_token_equals_the_whole_row(name):
    model = make_model(name)
    tokens_BT = torch.randint(0, 29, (2, 11))
    state, steps = None, []
    with torch.no_grad():
        for token_B in tokens_BT.unbind(1):
            hidden_BTD, state = model(token_B.unsqueeze(1), state=state, return_state=True)
            steps.append(hidden_BTD)
        torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens_BT), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PATTERNS)
def test_activation_checkpointing_changes_no_gradient(name):
    model = make_model(name)
    tokens_BT, resets_BT = torch.randint(0, 29, (2, 12)), torch.rand(2, 12) < 0.2
    gradients = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model.loss(model(tokens_BT, resets_BT), tokens_BT).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_loss_is_the_cross_entropy_of_the_logits():
    model = make_model("mixed")
    tokens_BT, targets_BT = torch.randint(0, 29, (2, 12)), torch.randint(0, 29, (2, 12))
    targets_BT[0, 3] = -100
    hidden_BTD = model(tokens_BT)
    expected = torch.nn.functional.cross_entropy(
        model.logits(hidden_BTD).flatten(0, 1), targets_BT.flatten(), reduction="sum"
    )
    torch.testing.assert_close(model.loss(hidden_BTD, targets_BT), expected)


def test_gate_statistics_are_those_of_the_biases_at_the_start():
    torch.manual_seed(0)
    model = build_model(XLSTMConfig(vocab_size=29, embedding_dim=24, num_blocks=2, num_heads=3))
    statistics = model.gate_statistics(torch.randint(0, 29, (2, 12)))
    cap = model.config.gate_soft_cap
    forget_H = cap * torch.tanh(torch.linspace(3, 6, 3) / cap)
    torch.testing.assert_close(statistics["forget_gate"], torch.sigmoid(forget_H).mean())
    torch.testing.assert_close(statistics["input_gate_preactivation"], cap * torch.tanh(torch.tensor(-10 / cap)))
    assert statistics["share_at_soft_cap"] == 0


@pytest.mark.parametrize("name", ["slstm", "mixed"])
def test_gate_statistics_of_the_slstm_see_the_recurrence(name):
    model = make_model(name)
    tokens_BT = torch.randint(0, 29, (2, 12))
    before = model.gate_statistics(tokens_BT)["forget_gate"]
    slstm = next(block.mixer for block in model.blocks if hasattr(block.mixer, "recurrent_weight"))
    with torch.no_grad():
        slstm.recurrent_weight[1] += 1.0
    assert model.gate_statistics(tokens_BT)["forget_gate"] != before


def assert_normal(tensor: torch.Tensor, std: float) -> None:
    count = tensor.numel()
    tensor = tensor.detach()
    assert abs(float(tensor.mean())) < 5 * std / count**0.5
    assert abs(float(tensor.std()) / std - 1) < 5 / (2 * count) ** 0.5


def test_initialisation_of_mlstm_blocks():
    torch.manual_seed(0)
    config = XLSTMConfig(vocab_size=500, embedding_dim=128, num_blocks=3, num_heads=4)
    model = build_model(config)
    small, down = (2 / (5 * 128)) ** 0.5, 2 / (3 * 128**0.5)
    assert_normal(model.embedding.weight, small)
    assert_normal(model.head.weight, small)
    assert torch.equal(model.final_norm.weight, torch.ones(128))
    for block in model.blocks:
        q, k, v, o = block.mixer.qkvo.weight.split(block.mixer.widths)
        for weight in (q, k, v, *block.feedforward.gate_up.weight.chunk(2)):
            assert_normal(weight, small)
        assert_normal(block.mixer.out.weight, down)
        assert_normal(block.feedforward.down.weight, down)
        assert not o.any()
        assert not block.mixer.gates.weight.any()
        assert torch.equal(block.mixer.gates.bias, torch.cat((torch.full((4,), -10.0), torch.linspace(3, 6, 4))))


def test_initialisation_of_paper_blocks():
    torch.manual_seed(0)
    config = XLSTMConfig(
        vocab_size=50, embedding_dim=128, num_blocks=4, num_heads=4, pattern="xlstm[1:1]", mlstm_block="mlstm_paper"
    )
    model = build_model(config)
    small, down = (2 / (5 * 128)) ** 0.5, 2 / (4 * 128**0.5)
    for block in model.blocks[::2]:
        for weight in (
            block.mixer.up.weight,
            block.mixer.query.weight,
            block.mixer.key.weight,
            block.mixer.value.weight,
        ):
            assert_normal(weight, small)
        assert_normal(block.mixer.down.weight, down)
        assert torch.equal(block.mixer.skip, torch.ones(256))
        assert not block.mixer.gates.weight.any()
        assert torch.equal(block.mixer.gates.bias[4:], torch.linspace(3, 6, 4))
        assert 0 < block.mixer.gates.bias[:4].abs().max() < 0.6
    for index in (1, 3):
        mixer = model.blocks[index].mixer
        assert_normal(mixer.input_weight, small)
        assert not mixer.recurrent_weight.any()
        assert not mixer.bias[[0, 2, 3]].any()
        unit = torch.arange(32) / 31
        torch.testing.assert_close(mixer.bias[1], (5 - 12 * unit ** (0.3 + 1.3 * index / 3)).expand(4, 32))
        assert 0.4 < mixer.conv.weight.abs().max() <= 0.5
        assert_normal(model.blocks[index].feedforward.gate_up.weight, small)
        assert_normal(model.blocks[index].feedforward.down.weight, down)


def test_weight_decay_is_for_matrices_but_the_embedding():
    model = make_model("mixed", tie_embeddings=False)
    no_decay = model.no_decay_parameter_names()
    decayed = {
        name.split(".", 2)[-1] if "blocks" in name else name
        for name, _ in model.named_parameters()
        if name not in no_decay
    }
    assert decayed == {
        "head.weight",
        *("mixer.qkvo.weight", "mixer.gates.weight", "mixer.out.weight"),
        *("mixer.up.weight", "mixer.query.weight", "mixer.key.weight", "mixer.value.weight", "mixer.down.weight"),
        *("mixer.conv.weight", "mixer.input_weight", "mixer.recurrent_weight"),
        *("feedforward.gate_up.weight", "feedforward.down.weight"),
    }


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"pattern": "xlstm[7:1]", "num_blocks": 8}, ["mlstm"] * 7 + ["slstm"]),
        ({"pattern": "xlstm[1:1]", "num_blocks": 4, "mlstm_block": "mlstm_paper"}, ["mlstm_paper", "slstm"] * 2),
        ({"pattern": "xlstm[1:0]", "num_blocks": 2}, ["mlstm"] * 2),
        ({"pattern": "xlstm[0:1]", "num_blocks": 2}, ["slstm"] * 2),
        ({"pattern": "xlstm[7:1]", "num_blocks": 4, "slstm_positions": [1]}, ["mlstm", "slstm", "mlstm", "mlstm"]),
        ({"pattern": ["slstm", "mlstm"], "num_blocks": 2}, ["slstm", "mlstm"]),
    ],
)
def test_patterns(settings, kinds):
    assert XLSTMConfig(**settings).block_kinds() == kinds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 5}, "num_heads 5 does not divide .* = 384.*for example 4"),
        ({"pattern": "lstm"}, r"pattern 'lstm' is none of mlstm, mlstm_conv, mlstm_paper, slstm, .*xlstm\[a:b\]"),
        ({"pattern": "xlstm[0:0]"}, r"pattern 'xlstm\[0:0\]'"),
        ({"pattern": ["mlstm", "gru"], "num_blocks": 2}, "pattern names 'gru'; the blocks are mlstm"),
        ({"pattern": ["mlstm"], "num_blocks": 2}, "pattern lists 1 blocks, but num_blocks is 2"),
        ({"pattern": "xlstm[7:1]", "num_blocks": 12}, "repeats every 8 blocks.*choose a multiple of 8"),
        (
            {"pattern": "xlstm[7:1]", "slstm_positions": [12]},
            "slstm_positions .12. must lie between 0 and num_blocks - 1 = 11",
        ),
        (
            {"pattern": "mlstm_paper", "paper_qkv_block_size": 5},
            "paper_qkv_block_size 5 does not divide the inner width 1536",
        ),
        ({"num_blocks": 0}, "num_blocks is 0; it must be a whole number from 1"),
        ({"gate_soft_cap": -15.0}, "gate_soft_cap is -15.0; it must be a number above 0 .* or null"),
    ],
)
def test_impossible_sizes_are_refused_with_the_mend(settings, message):
    with pytest.raises(ValueError, match=message):
        XLSTMConfig(**settings)
