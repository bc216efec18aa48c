"""The model as transformers takes one, held to ours: padding, cache, precisions, and what people do with a model."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from lively import SMALL, logits, make_pair, random_tokens

from xlstm_lm.hub import modeling_xlstm_lm
from xlstm_lm.hub.configuration_xlstm_lm import XLSTMLMConfig
from xlstm_lm.hub.modeling_xlstm_lm import XLSTMLMForCausalLM, XLSTMLMModel

CLOSE = {"atol": 1e-10, "rtol": 1e-8}  # in float64: nothing hides behind rounding
KINDS = [["mlstm"] * 3, ["slstm"] * 3, ["mlstm_paper"] * 3]


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"input_gate": "sigmoid", "gate_soft_cap": None}])
def test_logits_are_those_of_our_model(changes):
    wrapped, model = make_pair(torch.float64, **changes)
    tokens_BT = random_tokens(2, 70)
    torch.testing.assert_close(wrapped(tokens_BT).logits, logits(model, tokens_BT), **CLOSE)


@pytest.mark.parametrize("pattern", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "both and between"])
def test_padding_changes_nothing(pattern, side):
    wrapped, model = make_pair(torch.float64, pattern=pattern)
    lengths, width = (9, 4, 70, 1), 75
    tokens_BT = random_tokens(4, width)
    places = [
        {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "both and between": torch.arange(length) + torch.randint(0, width - length + 1, (length,)).sort().values,
        }[side]
        for length in lengths
    ]
    mask_BT = torch.zeros(4, width, dtype=torch.long)
    for mask_T, place in zip(mask_BT, places, strict=True):
        mask_T[place] = 1
    found_BTV = wrapped(tokens_BT, attention_mask=mask_BT).logits
    for tokens_T, found_TV, place in zip(tokens_BT, found_BTV, places, strict=True):
        torch.testing.assert_close(found_TV[place], logits(model, tokens_T[place][None])[0], **CLOSE)
    assert torch.isfinite(found_BTV).all()


@pytest.mark.parametrize("pattern", KINDS)
def test_padding_has_no_part_in_gradients(pattern):
    wrapped, model = make_pair(torch.float64, pattern=pattern)
    tokens_BT = random_tokens(1, 12)
    mask_BT = torch.tensor([[0] * 5 + [1] * 7])
    wrapped(tokens_BT, attention_mask=mask_BT).logits[:, 5:].square().sum().backward()
    logits(model, tokens_BT[:, 5:]).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in wrapped.named_parameters():
        ours = name.replace("lm_head", "head").removeprefix("model.")
        torch.testing.assert_close(parameter.grad, expected[ours], **CLOSE)


@pytest.mark.parametrize("pattern", KINDS)
@torch.no_grad()
def test_prefill_and_steps_agree_with_the_whole_at_every_length(pattern):
    wrapped, model = make_pair(torch.float64, pattern=pattern)
    tokens_BT = random_tokens(2, 70)
    whole_BTV = logits(model, tokens_BT)
    for length in range(1, 70, 3):
        cache = wrapped(tokens_BT[:, :length], use_cache=True).cache_params
        step = wrapped(tokens_BT[:, length : length + 1], cache_params=cache, use_cache=True)
        torch.testing.assert_close(step.logits[:, 0], whole_BTV[:, length], **CLOSE)
        assert step.cache_params.get_seq_length() == length + 1


@torch.no_grad()
def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    wrapped, model = make_pair(torch.float64)
    tokens_BT = random_tokens(2, 50)
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[0, :33] = 0
    monkeypatch.setattr(modeling_xlstm_lm, "PIECE_TOKENS", 16)
    output = wrapped(tokens_BT, attention_mask=mask_BT, use_cache=True)
    torch.testing.assert_close(output.logits[1:], logits(model, tokens_BT[1:]), **CLOSE)
    torch.testing.assert_close(output.logits[:1, 33:], logits(model, tokens_BT[:1, 33:]), **CLOSE)
    after = wrapped(random_tokens(2, 1), cache_params=output.cache_params).logits
    expected_V = logits(model, torch.cat((tokens_BT[:1, 33:], random_tokens(2, 1)[:1]), dim=1))[0, -1]
    torch.testing.assert_close(after[0, 0], expected_V, **CLOSE)


@torch.no_grad()
def test_the_cache_does_not_grow_and_a_copy_of_it_stays_as_it_was():
    wrapped, _ = make_pair(torch.float64)
    cache = wrapped(random_tokens(2, 5), use_cache=True).cache_params
    sizes = [tensor.shape for state in cache.states for tensor in state]
    kept = copy.deepcopy(cache)
    first = wrapped(random_tokens(2, 1), cache_params=copy.deepcopy(kept)).logits
    for _ in range(3):
        wrapped(random_tokens(2, 1), cache_params=cache)
    assert [tensor.shape for state in cache.states for tensor in state] == sizes
    assert torch.equal(wrapped(random_tokens(2, 1), cache_params=kept).logits, first)


@torch.no_grad()
def test_padding_with_a_cache():
    wrapped, model = make_pair(torch.float64)
    tokens_BT = random_tokens(2, 12)
    mask_BT = torch.ones(2, 12, dtype=torch.long)
    mask_BT[0, :8] = 0  # the first piece of the row is padding alone, and so is the beginning of the second
    cache = wrapped(tokens_BT[:, :6], attention_mask=mask_BT[:, :6], use_cache=True).cache_params
    found_BTV = wrapped(tokens_BT[:, 6:], attention_mask=mask_BT, cache_params=cache).logits
    torch.testing.assert_close(found_BTV[0, 2:], logits(model, tokens_BT[:1, 8:])[0], **CLOSE)
    torch.testing.assert_close(found_BTV[1], logits(model, tokens_BT[1:])[0, 6:], **CLOSE)
    with pytest.raises(ValueError, match="padding behind tokens that the cache holds"):
        wrapped(tokens_BT[:, :2], attention_mask=torch.tensor([[1, 1], [0, 1]]), cache_params=cache)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 5\); it must be \(B, 3\) to go with the tokens"):
        wrapped(tokens_BT[:, :3], attention_mask=mask_BT[:, :5])


def test_documents_in_a_row_do_not_see_each_other():
    wrapped, model = make_pair(torch.float64)
    tokens_BT = random_tokens(1, 20)
    resets_BT = torch.zeros(1, 20, dtype=torch.bool)
    resets_BT[0, 7] = True
    found_BTV = wrapped(tokens_BT, resets=resets_BT).logits
    torch.testing.assert_close(found_BTV[:, 7:], logits(model, tokens_BT[:, 7:]), **CLOSE)
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[0, :3] = 0
    padded_BTV = wrapped(tokens_BT, resets=resets_BT, attention_mask=mask_BT).logits
    torch.testing.assert_close(padded_BTV[:, 7:], found_BTV[:, 7:], **CLOSE)


def test_labels_give_the_loss_of_the_next_token():
    wrapped, model = make_pair(torch.float64)
    tokens_BT = random_tokens(2, 11)
    labels_BT = tokens_BT.clone()
    labels_BT[0, 4:6] = -100
    output = wrapped(tokens_BT, labels=labels_BT)
    expected = F.cross_entropy(logits(model, tokens_BT)[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected.float())
    assert wrapped(tokens_BT, logits_to_keep=2).logits.shape[1] == 2
    hidden = wrapped(tokens_BT, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    torch.testing.assert_close(hidden[-1], model(tokens_BT), **CLOSE)


@pytest.mark.parametrize("length", [1, 5, 67])
def test_it_trains_at_any_length_with_and_without_checkpointing(length):
    gradients = []
    for checkpointing in (False, True):
        wrapped, _ = make_pair(embedding_dim=40)
        if checkpointing:
            wrapped.activation_checkpointing_enable()
        wrapped.train()
        tokens_BT = random_tokens(2, length)
        wrapped(tokens_BT).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in wrapped.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(gradient is not None for gradient in gradients[0])


@torch.no_grad()
def test_bf16_with_and_without_a_cache():
    wrapped, model = make_pair(torch.bfloat16)
    tokens_BT = random_tokens(2, 30)
    whole = wrapped(tokens_BT, use_cache=False)
    assert whole.logits.dtype == torch.float32
    torch.testing.assert_close(whole.logits, logits(model, tokens_BT))
    exact_BTV = logits(model.float(), tokens_BT)
    assert (whole.logits - exact_BTV).norm() < 0.05 * exact_BTV.norm()
    cache = wrapped(tokens_BT[:, :-1], use_cache=True).cache_params
    step_BTV = wrapped(tokens_BT[:, -1:], cache_params=cache).logits
    assert (step_BTV[:, 0] - exact_BTV[:, -1]).norm() < 0.1 * exact_BTV[:, -1].norm()


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    wrapped, model = make_pair()
    compiled = torch.compile(wrapped, backend="aot_eager")
    for length in (9, 21):
        tokens_BT = random_tokens(2, length)
        torch.testing.assert_close(compiled(tokens_BT).logits, logits(model, tokens_BT), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_save_load_and_resize(tmp_path, tied):
    wrapped, _ = make_pair(tie_embeddings=tied)
    wrapped.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = XLSTMLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    tokens_BT = random_tokens(2, 9)
    assert torch.equal(loaded(tokens_BT).logits, wrapped(tokens_BT).logits)
    assert (loaded.lm_head.weight is loaded.model.embedding.weight) is tied
    torch.testing.assert_close(
        XLSTMLMModel.from_pretrained(tmp_path)(tokens_BT).last_hidden_state, wrapped.model(tokens_BT).last_hidden_state
    )
    loaded.resize_token_embeddings(300)
    assert (loaded.lm_head.weight is loaded.model.embedding.weight) is tied
    assert loaded.config.vocab_size == 300
    torch.testing.assert_close(loaded(tokens_BT).logits[..., :261], wrapped(tokens_BT).logits)
    loaded.save_pretrained(tmp_path / "resized")
    again = XLSTMLMForCausalLM.from_pretrained(tmp_path / "resized")
    assert torch.equal(again(tokens_BT).logits, loaded(tokens_BT).logits)


def test_device_map(tmp_path):
    wrapped, _ = make_pair(torch.float64)
    wrapped.save_pretrained(tmp_path)
    tokens_BT = random_tokens(2, 9)
    on_disk = {"model.embedding": "cpu", "model.blocks": "disk", "model.final_norm": "cpu", "lm_head": "disk"}
    for device_map in ("auto", on_disk):
        loaded = XLSTMLMForCausalLM.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens_BT).logits, wrapped(tokens_BT).logits)


def test_weights_without_a_file_start_as_in_training(tmp_path):
    torch.manual_seed(0)
    fresh = XLSTMLMForCausalLM(XLSTMLMConfig(**SMALL))
    mlstm, slstm, _ = fresh.model.blocks
    torch.testing.assert_close(mlstm.mixer.gates.bias, torch.tensor([-10.0, -10.0, 3.0, 6.0]))
    assert not slstm.mixer.recurrent_weight.any()
    assert slstm.mixer.bias[1, :, 0].eq(5).all()
    fresh.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.blocks.0.mixer.gates.bias"
    tensors[name.replace("bias", "weight")] += 1
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = XLSTMLMForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.model.blocks[0].mixer.gates.bias, mlstm.mixer.gates.bias)
    torch.testing.assert_close(loaded.model.blocks[0].mixer.gates.weight, mlstm.mixer.gates.weight + 1)
    torch.testing.assert_close(loaded.model.embedding.weight, fresh.model.embedding.weight)


@pytest.mark.parametrize("targets", [["qkvo", "out"], "all-linear"])
def test_lora(targets):
    wrapped, model = make_pair(torch.float64)
    tokens_BT = random_tokens(4, 24)
    adapted = peft.get_peft_model(wrapped, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    adapted.train()
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), labels=tokens_BT).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trainable)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    adapted.eval()
    with torch.no_grad():
        tuned_BTV = adapted(input_ids=tokens_BT).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(tokens_BT).logits, tuned_BTV, atol=1e-4, rtol=1e-4)
        assert (tuned_BTV - logits(model, tokens_BT)).abs().max() > 0.01
