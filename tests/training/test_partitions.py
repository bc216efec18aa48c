"""ZeRO-3 partitions: the shares that ranks write join to the whole tensor, for any number of ranks."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_lm.parallel.process_group import World
from xlstm_lm.training import engine
from xlstm_lm.training.engine import TrainingEngine


def share_of_rank(value: torch.Tensor, rank: int, ranks: int, moment: str | None) -> torch.Tensor:
    """The share of `value` that a rank holds after it was written, without padding."""
    share = -(-value.numel() // ranks)
    stored = torch.full((share,), float("nan"))
    stored.ds_numel = share
    parameter = SimpleNamespace(ds_tensor=stored, ds_numel=value.numel(), copy_=lambda whole: None)
    world = World(rank=rank, size=ranks, local_rank=rank, device=torch.device("cpu"))
    own = SimpleNamespace(stage=3, world=world)
    with (
        mock.patch.object(engine, "safe_set_local_fp32_param", lambda parameter, own: stored.copy_(own)),
        mock.patch.object(engine, "safe_set_local_optimizer_state", lambda parameter, own, key: stored.copy_(own)),
        mock.patch.object(engine.deepspeed.zero, "GatheredParameters", lambda *_, **__: nullcontext()),
    ):
        TrainingEngine._write(own, parameter, value, moment)
    return TrainingEngine._own_part(own, parameter)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), max_size=3).map(tuple),
    before=st.integers(1, 9),
    after=st.integers(1, 9),
    moment=st.sampled_from([None, "exp_avg"]),
)
def test_a_tensor_passes_from_any_number_of_ranks_to_any_other(shape, before, after, moment):
    value = torch.randn(shape)
    for ranks in (before, after):
        shares = [share_of_rank(value, rank, ranks, moment) for rank in range(ranks)]
        joined = torch.cat(shares)
        assert joined.numel() == value.numel() and torch.equal(joined.view(shape), value)
