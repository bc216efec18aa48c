"""Layers in another form than their plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xlstm_lm.models.layers import BlockDiagonalLinear, join_diagonal_blocks


@pytest.mark.parametrize(("blocks", "units"), [(24, 4), (13, 4), (6, 3), (1, 4), (2, 40)])
@pytest.mark.parametrize("steps", [1, BlockDiagonalLinear.MANY])
def test_a_block_diagonal_layer_is_one_with_a_block_diagonal_matrix(blocks: int, units: int, steps: int) -> None:
    torch.manual_seed(0)
    layer = BlockDiagonalLinear(blocks * units, blocks).double()
    torch.nn.init.normal_(layer.weight)
    x, upstream = torch.randn(2, 1, steps, blocks * units, dtype=torch.float64)
    x.requires_grad_()

    found = layer(x)
    expected = F.linear(x, torch.block_diag(*layer.weight))

    torch.testing.assert_close(found, expected)
    for ours, right in zip(*(torch.autograd.grad(each, (x, layer.weight), upstream) for each in (found, expected))):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize(("blocks", "units", "joined"), [(24, 4, 3), (76, 4, 19), (13, 4, 13), (2, 40, 2)])
def test_as_many_blocks_are_joined_as_divide_them_evenly(blocks: int, units: int, joined: int) -> None:
    width = blocks * units // joined
    assert join_diagonal_blocks(torch.ones(blocks, units, units), 32).shape == (joined, width, width)
