"""Bytes that a block keeps for the backward pass, beside the tensors that autograd really saves on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models.test_mixers import configure
from xlstm_lm.models import LSTMConfig
from xlstm_lm.models.block import Block
from xlstm_lm.models.components import components
from xlstm_lm.models.lstm import Layer
from xlstm_lm.models.mixers import MIXERS
from xlstm_lm.models.presets import preset
from xlstm_lm.models.storage import Storage

B, T, D = 2, 512, 128
CONSTANTS = {"slstm": 4 * D * D // 4}
"""Numbers that do not grow with the tokens: copies of the gates' weights."""


def saved_bytes(block: nn.Module, dtype: torch.dtype) -> float:
    """Bytes for each token of the storages that a forward pass saves, parameters and positions not among them."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.01)
    left_out = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in left_out:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    x_BTD = torch.randn(B, T, D, dtype=dtype, requires_grad=True) + 0
    resets_BT = torch.zeros(B, T, dtype=torch.bool)
    if isinstance(block, Block):  # a layer pads documents, to lengths that the count does not know
        resets_BT[0, 100] = resets_BT[1, 300] = True
    context = block.make_context(x_BTD, resets_BT, None)
    positions = [getattr(context, name, None) for name in ("cosine_BT1K", "sine_BT1K")]
    left_out |= {each.untyped_storage()._cdata for each in positions if each is not None}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x_BTD, context)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / (B * T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MIXERS)
def test_a_block_keeps_what_is_counted(kind, dtype):
    sections = {"mamba2": [{"kind": "mamba2", "head_dim": 32, "state_dim": 32}]}.get(kind)
    config = configure(kind, embedding_dim=D, num_heads=4, chunk_length=None, mixers=sections).blocks()[0]
    counted = sum(config.kept_by_part(Storage(dtype.itemsize, "cpu"), T).values())
    constant = CONSTANTS.get(kind, 0) * dtype.itemsize / (B * T)
    assert counted + constant == pytest.approx(saved_bytes(Block(config).to(dtype), dtype), rel=0.05)


def test_dropout_keeps_what_it_multiplies_by():
    without, config = (configure("mlstm", embedding_dim=D, num_heads=4, dropout=p).blocks()[0] for p in (0.0, 0.1))
    counted = sum(config.kept_by_part(Storage(4, "cpu"), T).values())
    assert counted - sum(without.kept_by_part(Storage(4, "cpu"), T).values()) == 2 * 4 * D
    assert saved_bytes(Block(config), torch.float32) - saved_bytes(Block(without), torch.float32) == 2 * 4 * D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_layer_keeps_what_is_counted(cell, dtype):
    config = LSTMConfig(cell=cell, embedding_dim=D, layer_norm=True)
    counted = sum(config.layer_kept_by_part(Storage(dtype.itemsize, "cpu"), D).values())
    kept = saved_bytes(Layer(config, D).to(dtype), dtype)
    if cell == "lstm" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert kept < counted  # torch has another kernel on processors without AVX-512, and the count is of the larger
    else:
        assert counted == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize(
    ("name", "megabytes"), [("xlstm-165m", 0.47), ("xlstm-400m", 1.26), ("xlstm-1.3b", 2.5), ("xlstm-7b", 6.7)]
)
def test_a_gpu_keeps_what_a_traced_step_keeps(name, megabytes):
    """Megabytes a token from traces of a step on a GPU, operation by operation, at context 8192 in bf16."""
    assert sum(part.kept_bytes for part in components(preset(name), 8192)) / 1e6 == pytest.approx(megabytes, rel=0.03)
