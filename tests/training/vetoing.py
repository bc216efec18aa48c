"""Updates that are vetoed, beside an engine that never sees their batches; also a program for torchrun."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.equivalence import batches, build_engine, engine_step
from tests.training.muon_layouts import STACKED
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.training.engine import Judge, TrainingEngine
from xlstm_lm.training.spikes import SpikeDetector

VETOED = (1, 2, 4)
"""Steps, from 0, whose update is vetoed."""
CELLS = {
    **{f"stage {stage}, fp32": {"stage": stage} for stage in range(4)},
    **{f"stage {stage}, bf16": {"stage": stage, "precision": "bf16"} for stage in (1, 2, 3)},
    "stage 2, offloaded": {"stage": 2, "offload": True},
    "stage 3, offloaded": {"stage": 3, "offload": True},
    "stage 0, muon": {"stage": 0} | STACKED,
    "stage 2, muon": {"stage": 2} | STACKED,
}
"""Options of `build_engine` by name."""


def held(engine: TrainingEngine) -> dict[str, Tensor]:
    """Copies of all that an update changes: master weights, weights as the forward pass uses them, optimizer state."""
    found = {name: value.clone() for name, value in [*engine.state.weights(), *engine.state.moments()]}
    found |= {f"{name}, as used": engine.state.own_weight(name).clone() for name in engine.shapes}
    steps = [float(state["step"]) for state in engine._optimizer.state.values()]
    return found | {"steps": torch.tensor(steps)}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


class HostReads(TorchDispatchMode):
    """Counts the values that are read on the host, each of which waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def host_reads(world: World, engine: TrainingEngine, judge: Judge | None) -> int:
    """Values that a step reads on the host."""
    with HostReads() as reads:
        result, _ = engine_step(world, engine, batches()[0], 0, by_layer=False, judge=judge)
        assert result.applied
    return reads.count


def veto(world: World, name: str) -> list[str]:
    """Effects that a veto must not have.

    Values that it changes, those that differ in the end from a run without the batches, and whether a step with a
    detector reads more values on the host than one without.
    """
    _, engine = build_engine(world, **CELLS[name])
    seen: list[Tensor] = []
    norms, found, before = [], [], held(engine)
    for step, batch in enumerate(batches()):
        is_vetoed = step in VETOED

        def judge(values_Q: Tensor, is_vetoed: bool = is_vetoed) -> Tensor:
            seen.append(values_Q)
            return torch.tensor(is_vetoed)

        result, loss = engine_step(world, engine, batch, step, judge=judge)
        assert (result.applied, result.vetoed) == (not is_vetoed, is_vetoed)
        torch.testing.assert_close(seen[-1], torch.tensor([loss, float(result.gradient_norm)]), rtol=1e-6, atol=0.0)
        norms.append(float(result.gradient_norm))
        after = held(engine)
        changed = differing(before, after)
        assert changed or is_vetoed, "an update changes something"
        found += [f"{each}, in step {step}" for each in changed if is_vetoed]
        before = after
    assert len(seen) == len(batches())
    everywhere = world.all_gather([values_Q.tolist() for values_Q in seen])
    found += ["ranks judge different numbers"] if any(each != everywhere[0] for each in everywhere) else []
    engine.close()

    _, engine = build_engine(world, **CELLS[name])
    for step, batch in enumerate(batches()):
        if step not in VETOED:
            result, _ = engine_step(world, engine, batch, step)
            assert float(result.gradient_norm) == norms[step]
    found += [f"{each}, in the end" for each in differing(before, held(engine))]
    detector = SpikeDetector(1e6, 8, world.device, [[1.0] * 8] * 2)
    plain, judged = (host_reads(world, engine, judge) for judge in (None, detector.is_outlier))
    found += [f"{judged} reads on the host, not {plain}"] if not 0 < judged <= plain else []
    engine.close()
    return found


if __name__ == "__main__":
    world = join_world()
    report = {name: world.gather(veto(world, name)) for name in sys.argv[1:] or CELLS}
    if world.is_first:
        print(json.dumps(report))
