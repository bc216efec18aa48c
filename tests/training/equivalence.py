"""Steps through DeepSpeed beside the same steps of a plain PyTorch loop; also a program for torchrun.

Every rank computes the plain loop on the whole batch: each comparison is against one process and no sharding.
"""

from __future__ import annotations

import atexit
import copy
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.training.tiny import VOCABULARY, TinyModel
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.training.engine import Judge, TrainingEngine
from xlstm_lm.training.optimizer import AdamWConfig, OptimizerConfig, build_optimizer
from xlstm_lm.training.schedule import ScheduleConfig, learning_rate_ratio

# DeepSpeed collects garbage six times while it sets up bf16, among all objects of the imported libraries if not frozen.
gc.freeze()
atexit.register(gc.unfreeze)

ROWS, MICRO_ROWS, STEPS = 8, 2, 5
OPTIMIZER = AdamWConfig(learning_rate=0.05, weight_decay=0.3, gradient_clip=0.2)
SCHEDULE = ScheduleConfig(kind="cosine", warmup=2, cooldown=1)


def batches(steps: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and targets; the first rows have few targets, and ranks and micro batches weigh differently."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(steps):
        tokens_BT, targets_BT = torch.randint(0, VOCABULARY, (2, ROWS, 5), generator=generator)
        targets_BT[:3, 1:] = -100
        made.append((tokens_BT, targets_BT))
    return made


def build_engine(
    world: World,
    stage: int,
    *,
    tied: bool = False,
    precision: str = "fp32",
    offload: bool = False,
    seed: int = 0,
    optimizer: OptimizerConfig = OPTIMIZER,
    model_class: type[TinyModel] = TinyModel,
    section: dict[str, Any] | None = None,
) -> tuple[TinyModel, TrainingEngine]:
    torch.manual_seed(seed)
    model = model_class(tied)
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    engine = TrainingEngine(
        model,
        optimizer,
        {"zero_optimization": zero} | (section or {}),
        world=world,
        precision=precision,
        micro_batch_size=MICRO_ROWS,
        accumulation_steps=ROWS // world.size // MICRO_ROWS,
    )
    return model, engine


def engine_step(
    world: World,
    engine: TrainingEngine,
    batch: tuple[torch.Tensor, torch.Tensor],
    step: int,
    by_layer: bool = True,
    judge: Judge | None = None,
):
    """The step, and the loss of the whole batch."""
    tokens_BT, targets_BT = batch
    count = (targets_BT >= 0).sum()
    own = ROWS // world.size
    parts = [tensor[world.rank * own :][:own].split(MICRO_ROWS) for tensor in (tokens_BT, targets_BT)]
    micro_batches = [(tokens, targets, None) for tokens, targets in zip(*parts, strict=True)]
    rate = OPTIMIZER.learning_rate * learning_rate_ratio(SCHEDULE, step, STEPS)
    result = engine.train_step(micro_batches, world.size / count, rate, by_layer, judge)
    return result, float(world.sum_(result.loss_sum.clone()) / count)


class PlainLoop:
    """torch.optim.AdamW, or another optimizer of xlstm-lm, on one device, whole batch at once."""

    def __init__(self, model: TinyModel, optimizer: OptimizerConfig = OPTIMIZER) -> None:
        self.model = copy.deepcopy(model)
        no_decay = self.model.no_decay_parameter_names()
        if optimizer is not OPTIMIZER:
            self.optimizer = build_optimizer(optimizer, self.model.named_parameters(), no_decay)
            return
        groups = [
            {
                "params": [p for name, p in self.model.named_parameters() if (name in no_decay) == kept],
                "weight_decay": 0.0 if kept else OPTIMIZER.weight_decay,
            }
            for kept in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, foreach=False)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor], step: int) -> tuple[float, float]:
        tokens_BT, targets_BT = batch
        for group in self.optimizer.param_groups:
            rate = OPTIMIZER.learning_rate * learning_rate_ratio(SCHEDULE, step, STEPS)
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad()
        loss = self.model.loss(self.model(tokens_BT), targets_BT, reduction="mean")
        loss.backward()
        squares: dict[str, float] = {}
        for name, parameter in self.model.named_parameters():
            layer = f"layers/{name.split('.')[0]}/gradient_norm"
            squares[layer] = squares.get(layer, 0.0) + parameter.grad.square().sum().item()
        self.layer_gradient_norms = {layer: square**0.5 for layer, square in squares.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.gradient_clip)
        self.optimizer.step()
        return loss.item(), norm.item()

    def difference(self, engine: TrainingEngine) -> dict[str, float]:
        """Largest absolute difference in weights and moments."""
        parameters = dict(self.model.named_parameters())
        weights, moments = dict(engine.state.weights()), dict(engine.state.moments())
        assert weights.keys() == parameters.keys()
        found = {"weights": max((weights[n] - p).abs().max().item() for n, p in parameters.items())}
        for name, moment in moments.items():
            parameter, _, key = name.rpartition(".")
            expected = self.optimizer.state[parameters[parameter]].get(key, torch.zeros_like(moment))
            found[key] = max(found.get(key, 0.0), (moment - expected).abs().max().item())
        return found


def compare(
    world: World,
    stage: int,
    tied: bool,
    offload: bool = False,
    optimizer: OptimizerConfig = OPTIMIZER,
    model_class: type[TinyModel] = TinyModel,
) -> dict[str, float]:
    """Largest differences between the two over some steps. The moments of the first step are its gradients."""
    _, engine = build_engine(world, stage, tied=tied, offload=offload, optimizer=optimizer, model_class=model_class)
    torch.manual_seed(0)
    plain = PlainLoop(model_class(tied), optimizer)
    worst: dict[str, float] = {}
    norms = []
    for step, batch in enumerate(batches()):
        result, loss = engine_step(world, engine, batch, step)
        plain_loss, plain_norm = plain.step(batch, step)
        norms.append(plain_norm)
        found = plain.difference(engine)
        found |= {"loss": abs(loss - plain_loss), "norm": abs(float(result.gradient_norm) - plain_norm)}
        layers = result.layer_gradient_norms
        assert layers.keys() == plain.layer_gradient_norms.keys()
        found["layers"] = max(abs(float(layers[name]) - norm) for name, norm in plain.layer_gradient_norms.items())
        worst = {key: max(value, worst.get(key, 0.0)) for key, value in found.items()}
        assert result.applied and engine.optimizer_steps == step + 1
    assert max(norms) > OPTIMIZER.gradient_clip  # clipping took place
    tokens_BT, targets_BT = batches(STEPS + 1)[-1]
    held_out = engine.evaluate((tokens_BT, targets_BT, None)) / (targets_BT >= 0).sum()
    expected = plain.model.loss(plain.model(tokens_BT), targets_BT, reduction="mean")
    worst["held-out loss"] = abs(held_out - expected).item()
    gates, expected_gates = engine.statistics((tokens_BT, None, None)), plain.model.gate_statistics(tokens_BT)
    worst["gate statistics"] = abs(gates["gates/mean"] - expected_gates["mean"]).item()
    norm = torch.nn.utils.get_total_norm([parameter.detach() for parameter in plain.model.parameters()])
    worst["parameter norm"] = abs(engine.parameter_norm() - norm).item()
    engine.close()
    return worst


def compare_with_faults(
    world: World, stage: int, fault: str, optimizer: OptimizerConfig = OPTIMIZER
) -> dict[str, float]:
    """`compare` with a fault on the last rank in the second and third step, which the plain loop never sees."""
    model, engine = build_engine(world, stage, optimizer=optimizer)
    torch.manual_seed(0)
    plain = PlainLoop(TinyModel(), optimizer)
    for step, batch in enumerate(batches()):
        faulty = step in (1, 2)
        model.fault = fault if faulty and world.rank == world.size - 1 else ""
        result, _ = engine_step(world, engine, batch, step)
        assert result.applied == (not faulty)
        if not faulty:
            plain.step(batch, step)
        if step == 2:
            at_fault = plain.difference(engine)
            assert engine.optimizer_steps == 1
    found = plain.difference(engine) | {f"{key} right after": value for key, value in at_fault.items()}
    engine.close()
    return found


def main(output: str) -> None:
    world = join_world()
    report = {}
    for stage in range(4):
        for tied in (False, True):
            report[f"stage {stage}, {'tied' if tied else 'untied'}"] = compare(world, stage, tied)
        fault = ("loss", "gradient")[stage % 2]
        report[f"stage {stage}, {fault} not finite"] = compare_with_faults(world, stage, fault)
    report["stage 2, offloaded"] = compare(world, 2, False, offload=True)
    report["stage 3, offloaded"] = compare(world, 3, False, offload=True)
    if world.rank == 0:
        Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
