"""Forward, loss and backward of every family run without waiting for a device.

The meta device stands for a GPU: its tensors have no values, so nothing can be read from them. The operations inside
our operators are looked at, too, as a GPU without Triton runs them.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models.family_cases import CONFIGS, make_model, make_rows
from xlstm_lm.ops import loss
from xlstm_lm.ops.conv import shifts
from xlstm_lm.ops.mlstm import chunkwise
from xlstm_lm.ops.slstm import fused

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.item.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
}
"""Operations for which the host waits."""
INSIDE = {
    each.operator: each.function
    for each in (
        loss._total_loss,
        loss._token_losses,
        loss._token_losses_backward,
        chunkwise.forward,
        chunkwise.backward,
        shifts.forward,
        shifts.backward,
        fused.forward,
        fused.backward,
    )
}
"""The operations behind each operator, which a mode does not see by itself."""


class NoSynchronization(TorchDispatchMode):
    """Raises where the host would wait for a device, here meta, and runs our operators' own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in INSIDE:
            self.entered.add(function.name())
            with self:
                return INSIDE[function](*args, **kwargs)
        on_device = any(isinstance(each, torch.Tensor) and each.is_meta for each in tree_leaves((args, kwargs)))
        to_host = torch.device(kwargs.get("device") or "meta").type == "cpu"
        if on_device and (function in READS or to_host):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **kwargs)


CASES = [(name, "host", "sum") for name in CONFIGS if not name.endswith(("_peepholes", "_chunkwise", "_batched"))]
CASES += [(name, "meta", "none") for name, _, _ in CASES if CONFIGS[name].family != "lstm"]
"""Which model, where its resets are, and how the loss is reduced. Left out: what is chosen on this device anyway, and
what runs step by step. torch's LSTM needs the lengths of documents on the host."""


@pytest.mark.parametrize(("name", "place", "reduction"), CASES)
def test_a_step_of_training_waits_for_nothing(name, place, reduction):
    model = make_model(name).to("meta")
    tokens_BT, resets_BT, targets_BT = make_rows()
    tokens_BT, targets_BT = tokens_BT.to("meta"), targets_BT.to("meta")
    resets_BT = resets_BT.to("meta") if place == "meta" else resets_BT
    with NoSynchronization() as mode:
        losses = model.loss(model(tokens_BT, resets_BT), targets_BT, reduction=reduction)
        losses.sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    expected = {"sum": {"total_loss"}, "none": {"token_losses", "token_losses_backward"}}[reduction]
    assert {f"xlstm_lm::{each}" for each in expected} <= mode.entered


def test_what_would_wait_is_found():
    x = torch.ones(3, device="meta")
    for wait in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x.cpu()):
        with NoSynchronization(), pytest.raises(AssertionError, match="waits for the device"):
            wait()
