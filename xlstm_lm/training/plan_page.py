"""A plan as lines for a person."""

from __future__ import annotations

from dataclasses import fields

from xlstm_lm.training.plan import Assumptions, Choice, Plan

GB = 1e9


def page(plan: Plan) -> list[str]:
    """Lines of the page, section by section."""
    return [
        *_work(plan),
        "",
        *_memory(plan),
        "",
        *_traffic(plan),
        "",
        *_time(plan),
        "",
        *_files(plan),
        "",
        *_assumptions(plan),
    ]


def _work(plan: Plan) -> list[str]:
    run, layout = plan.run, plan.layout
    return [
        f"{plan.elements.parameters:,} parameters on {layout.processes} {plan.gpu.name}, ZeRO {layout.stage}, "
        f"{layout.precision}.",
        f"A step: {run.data.global_batch_size} rows of {run.data.context_length:,} tokens = {plan.tokens_per_step:,}. "
        f"Micro batches of a GPU: {layout.micro_batches}; rows of each: {layout.rows}.",
        f"The run: {run.training.steps:,} steps, {plan.tokens:.4g} tokens "
        f"({plan.tokens / plan.elements.parameters:,.1f} a parameter), {plan.flops_per_token:.4g} FLOPs a token, "
        f"{plan.tokens * plan.flops_per_token:.4g} in all.",
    ]


def _memory(plan: Plan) -> list[str]:
    total, reserved = plan.gpu.memory_bytes / GB, plan.assumed.reserved_bytes / GB
    lines = [f"GB of a GPU's {total:.0f}, {reserved:.0f} of them reserved, in the phase of a step that needs most:"]
    columns = [choice for choice in plan.choices if choice.memory is not None]
    lines.append(f"{'ZeRO stage':<24}" + "".join(f"{_column(choice):>10}" for choice in columns))
    names = dict.fromkeys(name for choice in columns for name, value in choice.items.items() if value)
    for name in names:
        numbers = "".join(f"{choice.items.get(name, 0) / GB:>10.2f}" for choice in columns)
        lines.append(f"{name:<24}{numbers}")
    lines.append(f"{'sum':<24}" + "".join(f"{sum(choice.items.values()) / GB:>10.2f}" for choice in columns))
    lines.append(f"{'fits':<24}" + "".join(f"{'yes' if choice.fits else 'no':>10}" for choice in columns))
    lines.append("r: activations recomputed (training.activation_checkpointing); *: the recipe.")
    if len(columns) < len(plan.choices):
        lines.append(f"optimizer.kind {plan.run.optimizer.kind} does not work at the other stages.")
    return [*lines, *_phases(plan), *_advice(plan)]


def _column(choice: Choice) -> str:
    return f"{choice.stage}{' r' if choice.checkpointing else ''}{' *' if choice.is_configured else ''}"


def _phases(plan: Plan) -> list[str]:
    """Lines of the phases of a step of the recipe."""
    memory = plan.configured.memory
    assert memory is not None, "the recipe's own layout was checked"
    held = sum(memory.held.values())
    lines = [f"Phases of the recipe's step, beside {held / GB:.2f} GB that are held all the time:"]
    for phase, added in memory.phases.items():
        items = ", ".join(f"{name} {value / GB:.2f}" for name, value in added.items() if value >= GB / 200)
        lines.append(f"  {phase}: {items or 'nothing'}")
    if memory.host:
        moved = ", ".join(f"{name} {value / GB:.2f}" for name, value in memory.host.items())
        lines.append(f"In the host's memory, GB for each GPU: {moved}.")
    return lines


def _advice(plan: Plan) -> list[str]:
    """Whether the recipe fits, and the nearest settings that do where it does not."""
    if plan.configured.fits:
        return ["The recipe fits."]
    changes = []
    if fitting := [choice for choice in plan.choices if choice.fits]:
        ways = [_settings(plan, choice) for choice in fitting]
        changes.append(min(ways, key=lambda settings: settings.count(" and ")))
    if rows := plan.rows_that_fit():
        changes.append(f"training.micro_batch_size {rows}")
    if not changes:
        changes = ["more GPUs at ZeRO 3, a shorter data.context_length, a smaller model, or a GPU with more memory"]
    return [f"The recipe does not fit. Change: {'; or '.join(changes)}."]


def _settings(plan: Plan, choice: Choice) -> str:
    changes = []
    if choice.stage != plan.layout.stage:
        changes.append(f"deepspeed.zero_optimization.stage {choice.stage}")
    if choice.checkpointing != plan.layout.checkpointing:
        changes.append(f"training.activation_checkpointing {str(choice.checkpointing).lower()}")
    return " and ".join(changes)


def _traffic(plan: Plan) -> list[str]:
    if not plan.collectives:
        return ["Network: nothing, with one GPU."]
    lines = ["Network, a step:"]
    for each in plan.collectives:
        whole, sent = each.bytes / GB, each.sent(plan.layout.processes) / GB
        lines.append(f"  {each.kind:<15}{each.dtype:<10}{whole:>10.2f} GB of tensors, {sent:.2f} GB sent by a GPU")
    sent, seconds = plan.sent_per_step / GB, plan.seconds_per_step
    lines.append(f"  {sent:.2f} GB sent by each GPU in a step of {seconds:.3g} s: {sent / seconds:.2f} GB/s.")
    return lines


def _time(plan: Plan) -> list[str]:
    all_tokens = plan.tokens_per_second * plan.layout.processes
    recomputing = ", a quarter of the time for recomputing" if plan.layout.checkpointing else ""
    lines = [
        f"Speed at an MFU of {plan.assumed.mfu:.0%} of {plan.peak_flops:.3g} FLOPs/s{recomputing}: "
        f"{plan.tokens_per_second:,.0f} tokens/s a GPU, {all_tokens:,.0f} in all.",
        f"Time: {plan.hours:,.1f} hours ({plan.hours / 24:,.1f} days), {plan.gpu_hours:,.0f} GPU-hours.",
    ]
    if plan.assumed.price is None:
        return [*lines, "Cost: give the price of a GPU-hour (--price)."]
    return [*lines, f"Cost at {plan.assumed.price:g} for a GPU-hour: {plan.gpu_hours * plan.assumed.price:,.0f}."]


def _files(plan: Plan) -> list[str]:
    every = plan.run.training.checkpoint_every
    lost = plan.stall_seconds * -(-plan.run.training.steps // every) / 3600
    minutes, requests = every * plan.seconds_per_step / 60, plan.hub_requests
    return [
        f"A checkpoint: {plan.checkpoint_bytes / GB:,.1f} GB, every {every:,} steps ({minutes:,.1f} minutes).",
        f"A save: stops training for {plan.stall_seconds:.2g} s ({lost:.2g} hours in all), and is written in "
        f"{plan.write_seconds:,.0f} s beside it.",
        f"A restart: {plan.restart_seconds:,.0f} s to the first step, and half of {every:,} steps again on average.",
        f"Data: {plan.reader_cores:,.1f} cores read and encode as fast as the GPUs train.",
        f"Hub: about {requests:,} requests before the first step." if requests else "Hub: no requests, data is local.",
    ]


def _assumptions(plan: Plan) -> list[str]:
    """Every assumption with its number."""
    values = {each.name.replace("_", " "): getattr(plan.assumed, each.name) for each in fields(Assumptions)}
    return [
        f"Assumed: {', '.join(f'{name} {value:g}' for name, value in values.items() if value is not None)}.",
        "Memory: the terms of DeepSpeed's optimizers and the tensors that each block keeps, within 10 % of the live "
        "tensors of steps on a CPU.",
        "Rings for collectives, none of them overlapped with computation; no failures, no validation.",
    ]
