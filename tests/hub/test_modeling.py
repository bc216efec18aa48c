"""The model as transformers takes one, held to ours: padding, cache, precisions, and what people do with a model."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from tests.hub.lively import SMALL, logits, make_pair, random_tokens
from xlstm_lm.hub import modeling_xlstm_lm
from xlstm_lm.hub.configuration_xlstm_lm import XLSTMLMConfig
from xlstm_lm.hub.modeling_xlstm_lm import XLSTMLMCache, XLSTMLMForCausalLM, XLSTMLMModel

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
            wrapped.gradient_checkpointing_enable()
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


def packed(*lengths):
    """A row of documents, and the same documents apart."""
    row_BT = random_tokens(1, sum(lengths))
    return row_BT, row_BT.split(lengths, dim=1)


@pytest.mark.parametrize("pattern", KINDS)
@pytest.mark.parametrize("options", [{}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True}])
def test_rows_of_transformers_own_collator_keep_documents_apart(pattern, options):
    wrapped, model = make_pair(torch.float64, pattern=pattern)
    row_BT, documents = packed(9, 1, 17, 5)
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
    batch = collate([{"input_ids": document[0].tolist()} for document in documents])
    assert torch.equal(batch["input_ids"], row_BT)
    output = wrapped(**batch)
    apart_BTV = torch.cat([logits(model, document) for document in documents], dim=1)
    torch.testing.assert_close(output.logits, apart_BTV, **CLOSE)
    targets = torch.cat([F.pad(document[0, 1:], (0, 1), value=-100) for document in documents])
    torch.testing.assert_close(output.loss, F.cross_entropy(apart_BTV[0], targets).float())


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
DESCRIPTIONS = {
    "resets": torch.tensor([[0, 0, 0, 1, 0, 0, 0]]),  # as a data set's column: integers
    "position_ids": PACKED,
    "seq_idx": torch.tensor([[4, 4, 4, 2, 2, 2, 2]]),
    "cu_seq_lens_q": torch.tensor([0, 3, 7]),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_each_description_of_documents_parts_them(name):
    wrapped, model = make_pair(torch.float64)
    row_BT, (_, second_BT) = packed(3, 4)
    found_BTV = wrapped(row_BT, **{name: DESCRIPTIONS[name]}).logits
    torch.testing.assert_close(found_BTV[:, 3:], logits(model, second_BT), **CLOSE)
    both_BTV = wrapped(row_BT, **DESCRIPTIONS).logits
    assert torch.equal(both_BTV, found_BTV)
    plain = torch.arange(7)[None]
    assert torch.equal(wrapped(row_BT, **(DESCRIPTIONS | {"position_ids": plain})).logits, found_BTV)


@torch.no_grad()
def test_positions_that_go_on_start_no_document():
    wrapped, model = make_pair(torch.float64)
    tokens_BT = random_tokens(2, 12)
    whole_BTV = logits(model, tokens_BT)
    torch.testing.assert_close(wrapped(tokens_BT, position_ids=torch.arange(5, 17)[None]).logits, whole_BTV, **CLOSE)
    cache = wrapped(tokens_BT[:, :7], position_ids=torch.arange(7)[None], use_cache=True).cache
    step = wrapped(tokens_BT[:, 7:8], position_ids=torch.full((2, 1), 7), cache=cache)
    torch.testing.assert_close(step.logits[:, 0], whole_BTV[:, 7], **CLOSE)
    fresh = wrapped(tokens_BT[:, 8:9], position_ids=torch.zeros(2, 1).long(), cache=cache)
    torch.testing.assert_close(fresh.logits, logits(model, tokens_BT[:, 8:9]), **CLOSE)


@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize("mask", [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1, 0]])
def test_positions_counted_from_the_mask_start_no_document(mask, masked):
    wrapped, _ = make_pair(torch.float64)
    tokens_BT, mask_BT = random_tokens(2, 7), torch.tensor([mask, [1] * 7])
    position_BT = (mask_BT.cumsum(1) - 1).masked_fill(mask_BT == 0, masked)
    found_BTV = wrapped(tokens_BT, attention_mask=mask_BT, position_ids=position_BT).logits
    expected_BTV = wrapped(tokens_BT, attention_mask=mask_BT).logits
    torch.testing.assert_close(found_BTV[mask_BT == 1], expected_BTV[mask_BT == 1], **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": PACKED, "resets": torch.zeros(1, 7).bool()}, "position_ids starts .* token 3 of row 0"),
        ({"seq_idx": DESCRIPTIONS["seq_idx"], "cu_seq_lens_q": torch.tensor([0, 4, 7])}, "make them agree"),
        ({"position_ids": PACKED[None]}, r"position_ids is \(1, 1, 7\); it must be \(1, 7\)"),
        ({"seq_idx": PACKED[:, :3]}, r"seq_idx is \(1, 3\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, r"cu_seq_lens_q is \[0, 3\]; it must rise from 0 to the 7"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 9])}, "must rise from 0 to the 7"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 7]), "cu_seq_lens_k": torch.tensor([0, 7])}, "cu_seq_lens_k is"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 7]), "max_length_q": 3}, "max_length_q is 3, but .* of 4 tokens"),
        ({"cu_seq_lens_k": torch.tensor([0, 3, 7])}, "cu_seq_lens_q, their boundaries, is missing"),
        ({"past_key_values": transformers.DynamicCache()}, "is a DynamicCache; a recurrent model"),
        ({"cache_params": XLSTMLMCache(), "cache": XLSTMLMCache()}, "three names of one thing"),
        ({"output_attentions": True}, "no attention"),
        ({"is_causal": False}, "no attention"),
    ],
)
def test_what_contradicts_itself_or_belongs_to_another_model_is_refused(arguments, message):
    wrapped, _ = make_pair()
    with pytest.raises(ValueError, match=message):
        wrapped(random_tokens(1, 7), **arguments)


def test_boundaries_belong_to_a_single_row_without_a_cache():
    wrapped, _ = make_pair()
    with pytest.raises(ValueError, match="the batch has 2 rows"):
        wrapped(random_tokens(2, 7), cu_seq_lens_q=torch.tensor([0, 7]))


@pytest.mark.parametrize("name", ["attention_maks", "token_type_ids", "labels_weight"])
def test_an_unknown_argument_is_refused_by_name(name):
    wrapped, _ = make_pair()
    for model in (wrapped, wrapped.model):
        with pytest.raises(TypeError, match=f"no use for the argument '{name}'"):
            model(random_tokens(1, 4), **{name: torch.ones(1, 4)})


def test_what_transformers_gives_every_model_is_taken():
    wrapped, _ = make_pair()
    tokens_BT = random_tokens(1, 6)
    everywhere = {
        "output_attentions": False,
        "cache_position": torch.arange(6),
        "token_type_ids": None,
        "past_key_values": None,
        "return_dict": True,
        "num_items_in_batch": torch.tensor(10),
    }
    loss = wrapped(tokens_BT, labels=tokens_BT, **everywhere).loss
    torch.testing.assert_close(loss, wrapped(tokens_BT, labels=tokens_BT).loss * 5 / 10)
    shifted = F.pad(tokens_BT[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(wrapped(tokens_BT, shift_labels=shifted).loss * 5 / 10, loss)
    assert torch.equal(wrapped(tokens_BT, return_dict=False)[0], wrapped(tokens_BT).logits)


@torch.no_grad()
def test_the_cache_goes_by_every_name_it_has_had():
    wrapped, _ = make_pair()
    tokens_BT = random_tokens(1, 6)
    output = wrapped(tokens_BT, use_cache=True)
    assert output.cache_params is output.cache
    steps = [
        wrapped(tokens_BT[:, :1], **{name: copy.deepcopy(output.cache)}).logits
        for name in ("cache", "cache_params", "past_key_values")
    ]
    assert torch.equal(steps[0], steps[1])
    assert torch.equal(steps[0], steps[2])


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_hidden_states_of_a_padded_batch_are_in_the_graph(layer):
    wrapped, _ = make_pair()
    mask_BT = torch.ones(2, 12).long()
    mask_BT[0, :3] = 0
    output = wrapped(random_tokens(2, 12), attention_mask=mask_BT, output_hidden_states=True, use_cache=False)
    hidden_BTD = output.hidden_states[layer]
    hidden_BTD.retain_grad()
    output.logits[:, 3:].sum().backward()
    assert hidden_BTD.grad[:, 3:].abs().min() > 0


def test_a_second_initialisation_leaves_weights_alone(tmp_path):
    torch.manual_seed(0)
    fresh = XLSTMLMForCausalLM(XLSTMLMConfig(**SMALL))
    fresh.save_pretrained(tmp_path)
    for model in (fresh, XLSTMLMForCausalLM.from_pretrained(tmp_path)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.post_init()
        model.model.post_init()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_blocks_are_checkpointed_by_transformers_own_layer():
    wrapped, _ = make_pair()
    wrapped.gradient_checkpointing_enable()
    assert all(block.gradient_checkpointing for block in wrapped.model.blocks)
    assert wrapped.is_gradient_checkpointing
    wrapped.gradient_checkpointing_disable()
    assert not wrapped.is_gradient_checkpointing


def test_the_configuration_has_transformers_names_too(tmp_path):
    config = XLSTMLMConfig(**SMALL)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["hidden_size"], saved["num_hidden_layers"], saved["num_attention_heads"]) == (32, 3, 2)
    assert XLSTMLMConfig.from_pretrained(tmp_path).model_config() == config.model_config()
    assert XLSTMLMConfig.from_pretrained(tmp_path, hidden_size=64).embedding_dim == 64
    with pytest.raises(ValueError, match="hidden_size is 64 and embedding_dim is 32, but they are two names"):
        XLSTMLMConfig(**(SMALL | {"hidden_size": 64}))


@pytest.mark.parametrize("gradients", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_torch_export_with_a_mask(gradients):
    wrapped, _ = make_pair()
    tokens_BT, mask_BT = random_tokens(2, 4), torch.ones(2, 4).long()
    inputs = {"input_ids": tokens_BT, "attention_mask": mask_BT, "use_cache": False}
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(wrapped, (), inputs, strict=False).module()
        mask_BT[0, :2] = 0
        found_BTV = program(**inputs).logits
        torch.testing.assert_close(found_BTV, wrapped(**inputs).logits, atol=1e-4, rtol=1e-4)
