"""The loss point of a run that its configuration determines, all but the loss."""

from __future__ import annotations

from glob import has_magic
from pathlib import Path

from eval.scaling_laws.points import LossPoint
from xlstm_lm.models.accounting import totals, training_flops_per_token
from xlstm_lm.models.components import components
from xlstm_lm.training.run_config import RunConfig


def planned_point(config: RunConfig) -> LossPoint:
    """The point of a run as far as its configuration says it; its loss is NaN."""
    context, batch_rows, steps = config.data.context_length, config.data.global_batch_size, config.training.steps
    counts = totals(components(config.model, context), context)
    per_token = training_flops_per_token(config.model, context)
    cooldown = config.schedule.lengths(steps)[1]
    tokens = steps * batch_rows * context
    return LossPoint(
        run=str(config.training.folder),
        architecture=config.model.family,
        params=int(counts["parameters"]),
        params_non_embedding=int(counts["parameters_without_embedding_and_head"]),
        tokens=tokens,
        flops=per_token * tokens,
        flops_per_token=per_token,
        context=context,
        batch_tokens=batch_rows * context,
        learning_rate=config.optimizer.learning_rate,
        schedule=config.schedule.kind,
        cooldown_fraction=cooldown / steps,
        cooldown_shape=config.schedule.cooldown_shape if cooldown else "",
        seed=config.training.seed,
        loss=float("nan"),
        val_tokens=config.data.validation_tokens,
        data=_data_name(config),
        status="planned",
    )


def _data_name(config: RunConfig) -> str:
    """Names of the training data's sources."""
    return "+".join(
        source.dataset or ",".join(map(_file_name, source.paths)) or source.kind for source in config.data.sources
    )


def _file_name(path: str) -> str:
    """The name of a file, and of a pattern such as *.bin the two folders above it too, which tell it from others."""
    return "/".join(Path(path).parts[-3:]) if has_magic(path) else Path(path).name
