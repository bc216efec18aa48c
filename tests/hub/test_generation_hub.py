"""`model.generate` in all its ways, held to our own generation and to itself without a cache."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.hub.lively import make_pair, make_trained, random_tokens
from xlstm_lm import hub
from xlstm_lm.models.generation import SamplingConfig, generate

NEW = 20
PATTERNS = [["mlstm", "slstm", "mlstm_paper"], ["mlstm"] * 3]


def generated(model, tokens_BT, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 256} | options
    return model.generate(tokens_BT, **options)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_is_our_own_generation(pattern):
    wrapped, model = make_pair(pattern=pattern)
    prompt = random_tokens(1, 13)
    expected = list(generate(model, prompt[0].tolist(), SamplingConfig(max_new_tokens=NEW, temperature=0)))
    assert generated(wrapped, prompt)[0, 13:].tolist() == expected
    assert generated(wrapped, prompt, use_cache=False)[0, 13:].tolist() == expected


def test_a_tokenizer_for_stop_strings_is_not_an_argument_of_the_model():
    """`transformers serve` always gives one."""
    wrapped, _ = make_pair()
    prompt = random_tokens(1, 5)
    assert torch.equal(generated(wrapped, prompt, tokenizer=object()), generated(wrapped, prompt))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_a_padded_batch_gives_what_single_prompts_give(pattern, options):
    wrapped, _ = make_pair(pattern=pattern)
    prompts = [random_tokens(1, length) for length in (3, 12, 7)]
    rows = [torch.cat((torch.full((1, 12 - row.shape[1]), 256), row), dim=1) for row in prompts]
    mask_BT = torch.cat([(torch.arange(12) >= 12 - row.shape[1]).long()[None] for row in prompts])
    batch = generated(wrapped, torch.cat(rows), attention_mask=mask_BT, **options)
    single = torch.cat([generated(wrapped, row, **options)[:, row.shape[1] :] for row in prompts])
    assert torch.equal(batch[:, 12:], single)


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 3, "do_sample": True}, {"do_sample": True}])
def test_a_cache_changes_nothing(options):
    wrapped, _ = make_pair()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generated(wrapped, random_tokens(2, 9), use_cache=use_cache, **options))
    assert torch.equal(*found)


def test_an_embedded_prompt_gives_what_its_tokens_give():
    wrapped, _ = make_pair()
    prompt = random_tokens(2, 9)
    embedded = wrapped.generate(
        inputs_embeds=wrapped.get_input_embeddings()(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=256
    )
    assert torch.equal(embedded, generated(wrapped, prompt)[:, 9:])


def test_generation_goes_on_from_a_cache():
    wrapped, _ = make_pair()
    prompt = random_tokens(1, 9)
    first = generated(wrapped, prompt, return_dict_in_generate=True, max_new_tokens=8)
    with torch.no_grad():
        cache = wrapped(prompt, use_cache=True).cache_params
    longer = first.sequences[:, :12]
    assert torch.equal(generated(wrapped, longer, cache_params=cache), generated(wrapped, longer))
    with pytest.raises(ValueError, match="cache_params holds .* give all tokens so far"):
        generated(wrapped, prompt[:, :2], cache_params=cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_documents_of_a_prompt_are_kept_apart(use_cache):
    wrapped, _ = make_pair()
    prompt, short = random_tokens(2, 12), {"max_new_tokens": 4}
    expected = generated(wrapped, prompt[:, 5:], **short)[:, 7:]
    starts_BT = torch.arange(12)[None].expand(2, -1) == 5
    for options in ({"resets": starts_BT}, {"seq_idx": starts_BT.cumsum(1)}):
        for more in ({}, {"num_beams": 2}, {"logits_to_keep": 1}):
            found = generated(wrapped, prompt, use_cache=use_cache, **options, **more, **short)[:, 12:]
            assert torch.equal(found, generated(wrapped, prompt[:, 5:], **more, **short)[:, 7:])
    positions_BT = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]).expand(2, -1)
    found = generated(wrapped, prompt, use_cache=use_cache, position_ids=positions_BT, **short)
    assert torch.equal(found[:, 12:], expected)


def test_the_state_of_a_batch_does_not_grow():
    wrapped, _ = make_pair()
    sizes = []
    for length in (4, 40):
        with torch.no_grad():
            cache = wrapped(random_tokens(3, length), use_cache=True).cache_params
        sizes.append(sum(tensor.numel() for state in cache.states for tensor in state))
    assert sizes[0] == sizes[1]


def test_what_transformers_does_not_do_with_a_recurrent_state_is_refused():
    wrapped, _ = make_pair()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generated(wrapped, random_tokens(1, 5), prompt_lookup_num_tokens=3)


def test_a_pipeline_on_an_export(tmp_path):
    trained = make_trained(tmp_path / "source", vocab_size=257)  # else it draws padded rows
    hub.save_export(trained, tmp_path / "export")
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "export"))
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    single = [pipe(prompt, **options)[0]["generated_text"] for prompt in ("def ", "class A:\n  pass")]
    batch = pipe(["def ", "class A:\n  pass"], batch_size=2, **options)
    assert [each[0]["generated_text"] for each in batch] == single
    ids = trained.tokenizer.encode("def ")
    sampling = SamplingConfig(max_new_tokens=8, temperature=0)
    ours = list(generate(trained.model, [256, *ids], sampling, stop_token=256, num_tokens=257))
    assert single[0] == trained.tokenizer.decode(ours)
