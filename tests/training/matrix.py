"""Steps of a hybrid of four recurrent blocks through DeepSpeed beside a plain loop; a program for torchrun.

Arguments are cells, such as `3-bf16-checkpointing-2`: ZeRO stage, precision, recomputed activations or `kept` ones, and
the processes that divide each row, 1 if left out. Every rank computes the plain loop in float32 on the whole batch.
Prints the largest differences of each cell as JSON.
"""

from __future__ import annotations

import json
import sys

import torch

from xlstm_lm.models import build_model
from xlstm_lm.models.xlstm_config import HybridConfig
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.training.build import unbuilt_model
from xlstm_lm.training.engine import TrainingEngine
from xlstm_lm.training.optimizer import AdamWConfig, build_optimizer
from xlstm_lm.training.sequence_parallel import with_divided_rows

MODEL = HybridConfig(
    vocab_size=23, embedding_dim=32, num_blocks=4, pattern=["mlstm", "slstm", "mlstm_paper", "mamba2"], num_heads=2
)
ROWS, LENGTH, STEPS = 8, 12, 3
# AdamW divides by the root of the second moment: with a small eps, rounding of the smallest gradients would be all.
OPTIMIZER = AdamWConfig(learning_rate=0.01, eps=1e-3, weight_decay=0.1, gradient_clip=0.5)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batches() -> list[Batch]:
    """Tokens, targets (fewer in the first rows) and resets."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(STEPS):
        tokens_BT, targets_BT = torch.randint(0, MODEL.vocab_size, (2, ROWS, LENGTH), generator=generator)
        targets_BT[:3, 4:] = -100
        made.append((tokens_BT, targets_BT, torch.rand(ROWS, LENGTH, generator=generator) < 0.15))
    return made


def plain_steps(precision: str) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and last weights of a loop in one process, in float32, the whole batch at once.

    A run in bf16 starts from rounded weights; so does the loop beside it.
    """
    torch.manual_seed(0)
    model = build_model(MODEL)
    if precision == "bf16":
        model.bfloat16().float()
    optimizer = build_optimizer(OPTIMIZER, model.named_parameters(), model.no_decay_parameter_names())
    for group in optimizer.param_groups:
        group["lr"] = OPTIMIZER.learning_rate * group["lr_scale"]
    losses, norms = [], []
    for tokens_BT, targets_BT, resets_BT in batches():
        optimizer.zero_grad()
        loss = model.loss(model(tokens_BT, resets_BT), targets_BT, reduction="mean")
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.gradient_clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


def cell(world: World, stage: int, precision: str, checkpointing: bool, sequence: int) -> dict[str, float]:
    """Largest differences: of losses and norms relative to the plain loop's, of weights in units of the rate."""
    micro_rows = 1
    world = world.with_sequence(sequence)
    torch.manual_seed(0)
    model = unbuilt_model(MODEL)
    model.activation_checkpointing = checkpointing
    own = ROWS // world.data.size
    zero = {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
    if sequence > 1:
        zero["overlap_comm"] = False
    engine = TrainingEngine(
        with_divided_rows(model, world),
        OPTIMIZER,
        {"zero_optimization": zero},
        world=world,
        precision=precision,
        micro_batch_size=micro_rows,
        accumulation_steps=own // micro_rows,
    )
    losses, norms, weights = plain_steps(precision)
    found = {"loss": 0.0, "norm": 0.0}
    for batch, plain_loss, plain_norm in zip(batches(), losses, norms, strict=True):
        count = (batch[1] >= 0).sum()
        slices = (tensor.chunk(sequence, dim=1)[world.sequence.rank] for tensor in batch)
        parts = [tensor[world.data.rank * own :][:own].split(micro_rows) for tensor in slices]
        result = engine.train_step(list(zip(*parts, strict=True)), world.size / count, OPTIMIZER.learning_rate)
        assert result.applied
        loss = float(world.sum_(result.loss_sum.clone()) / count)
        found["loss"] = max(found["loss"], abs(loss - plain_loss) / plain_loss)
        found["norm"] = max(found["norm"], abs(float(result.gradient_norm) - plain_norm) / plain_norm)
    assert max(norms) > OPTIMIZER.gradient_clip  # clipping took place
    ours = dict(engine.state.weights())
    largest = max(float((ours[name] - weight).abs().max()) for name, weight in weights.items())
    found["weights"] = largest / OPTIMIZER.learning_rate
    engine.close()
    return found


if __name__ == "__main__":
    world = join_world()
    report = {}
    for name in sys.argv[1:]:
        given = name.split("-")
        stage, precision, activations, sequence = given + ["kept", "1"][len(given) - 2 :]
        report[name] = cell(world, int(stage), precision, activations == "checkpointing", int(sequence))
    if world.is_first:
        print(json.dumps(report))
