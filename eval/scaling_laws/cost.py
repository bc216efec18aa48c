"""The cost of a design: runs, tokens and FLOPs of each architecture, in hours where the speed is given."""

from __future__ import annotations

from collections.abc import Iterable

from eval.scaling_laws.designed import Design, DesignedRun


def cost_as_markdown(design: Design, flops_per_second: float | None = None) -> str:
    """Tabulate the sizes of a design with what their runs cost, each architecture's sum last.

    Args:
        design: the runs.
        flops_per_second: of the devices together; None for no hours.
    """
    lines = [
        "| architecture | parameters | runs | longest, tokens | trained tokens | FLOPs | hours |",
        "|---" * 7 + "|",
    ]
    for architecture in dict.fromkeys(run.architecture for run in design.runs):
        runs = [run for run in design.runs if run.architecture == architecture]
        for params in sorted({run.params for run in runs}):
            of_size = [run for run in runs if run.params == params]
            lines.append(_line(architecture, f"{params:,}", of_size, flops_per_second))
        lines.append(_line(f"**{architecture}**", "all", runs, flops_per_second))
    return "\n".join(lines) + f"\n\n{_shape(design.runs)}"


def _line(architecture: str, params: str, runs: list[DesignedRun], flops_per_second: float | None) -> str:
    flops = sum(run.own_flops for run in runs)
    trained = sum(run.batch_tokens * (run.steps - run.branch_step) for run in runs)
    hours = f"{flops / flops_per_second / 3600:,.3g}" if flops_per_second else "not known"
    longest = max(run.tokens for run in runs)
    return f"| {architecture} | {params} | {len(runs)} | {longest:,} | {trained:,} | {flops:.3g} | {hours} |"


def _shape(runs: Iterable[DesignedRun]) -> str:
    """A sentence on the schedule of the runs."""
    shares = sorted({round(run.cooldown_steps / run.steps, 3) for run in runs if run.cooldown_steps})
    shapes = " or ".join(dict.fromkeys(run.cooldown_shape for run in runs))
    warmups = sorted({run.warmup_steps for run in runs})
    cooldown = f"{shares[0]:.1%}" if len(shares) == 1 else f"{shares[0]:.1%} to {shares[-1]:.1%}"
    return (
        f"Schedule: a linear warm-up of {warmups[0]:,} to {warmups[-1]:,} steps, then constant, then a {shapes} "
        f"cooldown over the last {cooldown} of a run's steps."
    )
