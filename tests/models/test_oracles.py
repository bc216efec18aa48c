"""Logits against the authors' code in transformers, for xLSTM-7B's blocks; the first paper's are held to the `xlstm`
package where its state dicts are loaded, in tests/hub."""

from __future__ import annotations

import pytest
import torch
import transformers

import xlstm_lm.hub

LENGTHS = [1, 7, 64, 100, 257]


def perturb(model: torch.nn.Module, seed: int) -> None:
    """Move every weight away from its initialisation, where whole paths are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def assert_equal_logits(ours, theirs, vocab_size: int, seed: int) -> None:
    for length in LENGTHS:
        tokens_BT = torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(seed + length))
        with torch.no_grad():
            torch.testing.assert_close(
                ours(tokens_BT), theirs(tokens_BT), rtol=1e-4, atol=1e-4, msg=lambda m, n=length: f"length {n}: {m}"
            )


@pytest.mark.parametrize(
    ("seed", "sizes"),
    [
        (0, {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 97}),
        (1, {"hidden_size": 64, "num_hidden_layers": 3, "num_heads": 4, "vocab_size": 131, "qk_dim_factor": 1.0}),
        (
            2,
            {
                "hidden_size": 192,
                "num_hidden_layers": 1,
                "num_heads": 3,
                "vocab_size": 60,
                "qk_dim_factor": 1.0,
                "v_dim_factor": 2.0,
            },
        ),
        (
            3,
            {
                "hidden_size": 128,
                "num_hidden_layers": 2,
                "num_heads": 4,
                "vocab_size": 61,
                "gate_soft_cap": 5.0,
                "output_logit_soft_cap": 4.0,
            },
        ),
    ],
)
def test_mlstm_blocks_equal_transformers(tmp_path, seed, sizes):
    torch.manual_seed(seed)
    config = transformers.xLSTMConfig(
        **sizes,
        embedding_dim=sizes["hidden_size"],
        num_blocks=sizes["num_hidden_layers"],
        autocast_kernel_dtype="float32",
        use_cache=False,
    )
    theirs = transformers.xLSTMForCausalLM(config).eval()
    perturb(theirs, seed)
    theirs.save_pretrained(tmp_path)
    ours = xlstm_lm.hub.load(tmp_path)
    assert_equal_logits(ours, lambda tokens_BT: theirs(tokens_BT).logits, sizes["vocab_size"], seed)
