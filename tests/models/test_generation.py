"""Generation: the recurrent state is the memory, draws are reproducible, the nucleus is exact."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from xlstm_lm.base.finite import NotFiniteError
from xlstm_lm.data import TokenizerConfig, build_tokenizer
from xlstm_lm.models import XLSTMConfig, build_model, generation
from xlstm_lm.models.generation import SamplingConfig, continue_text, generate, sample


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = {"vocab_size": 257, "embedding_dim": 32, "num_blocks": 3, "num_heads": 2}
    model = build_model(XLSTMConfig(**settings, pattern=["mlstm", "slstm", "mlstm_paper"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def test_greedy_generation_equals_the_argmax_of_the_whole_row(model):
    prompt = [256, 1, 2, 3]
    tokens = list(generate(model, prompt, SamplingConfig(max_new_tokens=20, temperature=0)))
    row = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            row.append(int(model.logits(model(torch.tensor([row])))[0, -1].argmax()))
    assert tokens == row[4:]


def test_a_long_prompt_in_pieces_gives_the_same(model, monkeypatch):
    prompt = torch.randint(0, 256, (50,)).tolist()
    whole = list(generate(model, prompt, SamplingConfig(max_new_tokens=10, temperature=0)))
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 7)
    assert list(generate(model, prompt, SamplingConfig(max_new_tokens=10, temperature=0))) == whole


def test_the_state_does_not_grow(model):
    with torch.no_grad():
        _, short = model(torch.zeros(1, 1, dtype=torch.long), return_state=True)
        _, long = model(torch.zeros(1, 500, dtype=torch.long), return_state=True)
    assert [[tensor.shape for tensor in each] for each in short] == [[tensor.shape for tensor in each] for each in long]


def test_the_model_runs_once_for_each_token_but_the_last_in_the_memory_of_one_state(model, monkeypatch):
    decode_step, matrices = model.decode_step, []

    def recorded(token_B1, state):
        hidden_BTD, state = decode_step(token_B1, state)
        matrices.append([state[0][0].data_ptr(), state[2][1].data_ptr()])
        return hidden_BTD, state

    monkeypatch.setattr(model, "decode_step", recorded)
    assert len(list(generate(model, [256, 1, 2], SamplingConfig(max_new_tokens=5)))) == 5
    assert len(matrices) == 4
    assert all(each == matrices[0] for each in matrices)


def test_a_state_that_is_not_given_up_stays_as_it_was(model):
    with torch.no_grad():
        _, state = model(torch.tensor([[1, 2, 3]]), return_state=True)
        kept = [[tensor.clone() for tensor in each] for each in state]
        first, _ = model(torch.tensor([[4]]), state=state, return_state=True)
        assert all(torch.equal(a, b) for x, y in zip(state, kept) for a, b in zip(x, y))
        second, _ = model.decode_step(torch.tensor([[4]]), state)
    assert torch.equal(first, second)


def test_the_seed_decides_the_draw(model):
    def draw(seed: int) -> list[int]:
        return list(generate(model, [256], SamplingConfig(max_new_tokens=30, seed=seed)))

    assert draw(1) == draw(1) != draw(2)


def test_generation_stops_at_the_end_of_a_document(model):
    tokens = list(generate(model, [256], SamplingConfig(max_new_tokens=30, temperature=0)))
    stop = tokens[10]
    stopped = list(generate(model, [256], SamplingConfig(max_new_tokens=30, temperature=0), stop_token=stop))
    assert stopped == tokens[: tokens.index(stop)]


def test_the_nucleus_holds_the_likeliest_tokens_that_reach_top_p():
    logits_V = torch.log(torch.tensor([0.05, 0.5, 0.3, 0.15]))
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits_V, SamplingConfig(temperature=1.0, top_p=0.75), generator) for _ in range(2000)]
    assert set(drawn) == {1, 2}
    assert abs(drawn.count(1) / 2000 - 0.5 / 0.8) < 0.05
    assert {sample(logits_V, SamplingConfig(temperature=1.0, top_p=1.0), generator) for _ in range(500)} == {0, 1, 2, 3}


def test_text_is_continued_as_the_beginning_of_a_document(model):
    tokenizer = build_tokenizer(TokenizerConfig())
    sampling = SamplingConfig(max_new_tokens=12, temperature=0)
    text = "".join(continue_text(model, tokenizer, "def ", sampling))
    tokens = list(generate(model, [256, *b"def "], sampling, stop_token=256))
    assert text == bytes(tokens).decode("utf-8", errors="replace")


def test_only_tokens_of_the_tokenizer_are_drawn(model):
    tokens = list(generate(model, [256], SamplingConfig(max_new_tokens=200, temperature=5.0), num_tokens=5))
    assert set(tokens) == set(range(5))


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, r"its weights are not finite \(final_norm.weight\)"), (3e38, "its weights are too large, or wrong")],
)
def test_logits_that_are_not_finite_end_with_one_message(temperature, value, message, model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.final_norm.weight[:] = value
        broken.config = dataclasses.replace(broken.config, logit_soft_cap=None)
        broken.head.weight[:] = 1e5
    with pytest.raises(NotFiniteError, match=rf"The model's logits are not finite: {message}"):
        list(generate(broken, [256, 1], SamplingConfig(temperature=temperature)))


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt is empty; give at least one character"):
        next(continue_text(model, build_tokenizer(TokenizerConfig()), "", SamplingConfig()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature is -1; it must be a number from 0"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number from 1"),
    ],
)
def test_impossible_sampling_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


@pytest.mark.parametrize("settings", [{"temperature": 1e-45}, {"temperature": 1e-6}, {"top_p": 1e-300}])
def test_the_smallest_settings_draw_the_likeliest_token(settings):
    logits_V = 1e4 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert sample(logits_V, SamplingConfig(**settings), torch.Generator()) == int(logits_V.argmax())
