"""Logits against the authors' code: the `xlstm` package for the first paper's blocks, transformers for xLSTM-7B's."""

from __future__ import annotations

import pytest
import torch
import transformers
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)

import xlstm_lm.hub
from xlstm_lm.models import XLSTMConfig, build_model

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


def make_package_model(width: int, heads: int, blocks: int, slstm_at: list[int], vocab_size: int) -> xLSTMLMModel:
    return xLSTMLMModel(
        xLSTMLMModelConfig(
            mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=heads)),
            slstm_block=sLSTMBlockConfig(
                slstm=sLSTMLayerConfig(backend="vanilla", num_heads=heads),
                feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
            ),
            context_length=max(LENGTHS),
            num_blocks=blocks,
            embedding_dim=width,
            slstm_at=slstm_at,
            vocab_size=vocab_size,
        )
    ).eval()


def from_package(theirs: xLSTMLMModel, config: XLSTMConfig) -> dict[str, torch.Tensor]:
    """The package's weights under our names. Its norms keep the weight less one; in its sLSTM the attributes of
    the input and of the forget gate are crossed."""
    source = theirs.state_dict()
    heads, head_dim = config.num_heads, config.embedding_dim // config.num_heads
    weights = {
        "embedding.weight": source["token_embedding.weight"],
        "final_norm.weight": 1 + source["xlstm_block_stack.post_blocks_norm.weight"],
        "head.weight": source["lm_head.weight"],
    }
    for index, kind in enumerate(config.block_kinds()):
        old = {
            name.split(f"blocks.{index}.", 1)[1]: tensor
            for name, tensor in source.items()
            if f"blocks.{index}." in name
        }
        new = {"norm.weight": 1 + old["xlstm_norm.weight"]}
        new["mixer.conv.weight"] = old["xlstm.conv1d.conv.weight"].squeeze(1)
        new["mixer.conv.bias"] = old["xlstm.conv1d.conv.bias"]
        if kind == "mlstm_paper":
            new["mixer.up.weight"] = old["xlstm.proj_up.weight"]
            for ours, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
                new[f"mixer.{ours}.weight"] = old[f"xlstm.{name}.weight"]
            for part in ("weight", "bias"):
                gates = [old[f"xlstm.mlstm_cell.{gate}.{part}"] for gate in ("igate", "fgate")]
                new[f"mixer.gates.{part}"] = torch.cat(gates)
            new["mixer.head_norm.weight"] = 1 + old["xlstm.mlstm_cell.outnorm.weight"]
            new["mixer.skip"] = old["xlstm.learnable_skip"]
            new["mixer.down.weight"] = old["xlstm.proj_down.weight"]
        else:
            gates = [old[f"xlstm.{gate}.weight"].transpose(1, 2) for gate in ("fgate", "igate", "zgate", "ogate")]
            new["mixer.input_weight"] = torch.stack(gates)
            recurrent = old["xlstm.slstm_cell._recurrent_kernel_"].view(heads, 4, head_dim, head_dim)
            new["mixer.recurrent_weight"] = recurrent.permute(1, 0, 3, 2)
            new["mixer.bias"] = old["xlstm.slstm_cell._bias_"].view(4, heads, head_dim)
            new["mixer.head_norm.weight"] = 1 + old["xlstm.group_norm.weight"]
            new["feedforward_norm.weight"] = 1 + old["ffn_norm.weight"]
            new["feedforward.gate_up.weight"] = old["ffn.proj_up.weight"]
            new["feedforward.down.weight"] = old["ffn.proj_down.weight"]
        weights |= {f"blocks.{index}.{name}": tensor for name, tensor in new.items()}
    return weights


@pytest.mark.parametrize(
    ("seed", "width", "heads", "blocks", "slstm_at"),
    [
        (0, 64, 4, 2, []),
        (1, 64, 2, 2, [0, 1]),
        (2, 96, 4, 3, [1]),
        (3, 32, 1, 2, [0]),
    ],
)
def test_paper_blocks_equal_the_xlstm_package(seed, width, heads, blocks, slstm_at):
    torch.manual_seed(seed)
    theirs = make_package_model(width, heads, blocks, slstm_at, vocab_size=83)
    perturb(theirs, seed)
    config = XLSTMConfig(
        vocab_size=83,
        embedding_dim=width,
        num_heads=heads,
        num_blocks=blocks,
        pattern="xlstm[7:1]",
        mlstm_block="mlstm_paper",
        slstm_positions=slstm_at,
        norm="layer",
        norm_eps=1e-5,
        gate_soft_cap=None,
        logit_soft_cap=None,
    )
    ours = build_model(config).eval()
    ours.load_state_dict(from_package(theirs, config))
    assert_equal_logits(lambda tokens_BT: ours.logits(ours(tokens_BT)), theirs, 83, seed)
