"""A run's needs before it is paid for: memory at every layout, traffic, time, money, checkpoints and data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from xlstm_lm.models.accounting import training_flops_per_token
from xlstm_lm.ops.gpu import GPU, GPUS, gpu_named
from xlstm_lm.training.deepspeed_config import Precision, zero_stage
from xlstm_lm.training.layout import check_layout, first_process
from xlstm_lm.training.memory import elements_of, rank_layout
from xlstm_lm.training.memory_model import Elements, MemoryPlan, RankLayout, memory_plan
from xlstm_lm.training.run_config import RunConfig

RECOMPUTED = 4 / 3
"""FLOPs of a step with activation checkpointing over those without: a second forward pass."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Numbers that a plan cannot know. Each is printed with it."""

    mfu: float = 0.4
    """FLOPs of forward and backward, nothing recomputed, as a share of the GPU's peak."""
    price: float | None = None
    """Price of a GPU for an hour, in any currency; None for no costs."""
    reserved_bytes: float = 3e9
    """Memory of a GPU for the CUDA context, NCCL's buffers and the allocator's gaps."""
    gpus_per_node: int = 8
    """GPUs that share a node's path to storage."""
    copied_bytes_per_second: float = 10e9
    """Speed at which a GPU's share of a checkpoint is copied to the host, while training waits."""
    stored_bytes_per_second: float = 2e9
    """Speed at which a node reads and writes storage."""
    start_seconds: float = 120.0
    """Seconds from a restart to the first step beside the reading of the checkpoint: imports, kernels, meeting."""
    encoded_tokens_per_second: float = 194_000.0
    """Tokens that a core reads, encodes and packs in a second (a BPE of 8192, `python -m eval.data_throughput`)."""
    requests_to_open: int = 13
    """Requests to the hub with which one process opens a data set for all."""
    requests_per_lane: int = 2
    """Requests with which a lane begins to read its first file."""


class Collective(NamedTuple):
    """A kind of traffic of a step."""

    kind: str
    """Usual name, such as all-reduce."""
    dtype: str
    """Type of the numbers that travel."""
    bytes: int
    """Size of the whole tensors that it works on in a step."""

    def sent(self, processes: int) -> float:
        """Bytes that each process sends in a step, by rings."""
        share = (processes - 1) / processes
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Memory of one ZeRO stage, with or without activation checkpointing."""

    stage: int
    """ZeRO stage."""
    checkpointing: bool
    """Whether activations are recomputed."""
    memory: MemoryPlan | None
    """Bytes of a GPU; None for a layout that the optimizer does not work on."""
    fits: bool
    """Whether they fit, with what is reserved, into the GPU's memory."""
    is_configured: bool
    """Whether the recipe says so."""

    @property
    def items(self) -> dict[str, int]:
        """Bytes of a GPU by purpose, in the phase of a step that needs most."""
        return self.memory.items if self.memory else {}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a number of GPUs of one type."""

    run: RunConfig
    """Configuration of the run."""
    gpu: GPU
    """The type of GPU."""
    layout: RankLayout
    """The layout that the recipe describes."""
    elements: Elements
    """Sizes of the model and of its optimizer's state."""
    choices: list[Choice]
    """Every ZeRO stage, without and with activation checkpointing."""
    collectives: list[Collective]
    """Traffic of a step."""
    assumed: Assumptions = field(default_factory=Assumptions)
    """Numbers that the plan cannot know."""

    @property
    def configured(self) -> Choice:
        """The choice that the recipe describes."""
        return next(each for each in self.choices if each.is_configured)

    def rows_that_fit(self) -> int | None:
        """The most rows of a micro batch, fewer than the recipe's, with which its layout fits; None for none."""
        room = self.gpu.memory_bytes - self.assumed.reserved_bytes
        all_rows = self.layout.rows * self.layout.micro_batches
        for rows in range(self.layout.rows - 1, 0, -1):
            if all_rows % rows == 0:
                fewer = replace(self.layout, rows=rows, micro_batches=all_rows // rows)
                if memory_plan(self.run.model, self.elements, fewer).peak <= room:
                    return rows
        return None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step on all GPUs."""
        return self.run.data.global_batch_size * self.run.data.context_length

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return self.run.training.steps * self.tokens_per_step

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward for a token, nothing recomputed."""
        return training_flops_per_token(self.run.model, self.run.data.context_length)

    @property
    def peak_flops(self) -> float:
        """FLOPs of the GPU in a second, at most, in the type of the run's products."""
        return self.gpu.bf16_flops if self.layout.precision == "bf16" else self.gpu.fp32_flops

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a GPU in a second; recomputing takes time and adds none."""
        slower = RECOMPUTED if self.layout.checkpointing else 1.0
        return self.assumed.mfu * self.peak_flops / self.flops_per_token / slower

    @property
    def seconds_per_step(self) -> float:
        """Seconds of a step."""
        return self.tokens_per_step / (self.tokens_per_second * self.layout.processes)

    @property
    def hours(self) -> float:
        """Hours of the run, saves and restarts not counted."""
        return self.run.training.steps * self.seconds_per_step / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together."""
        return self.hours * self.layout.processes

    @property
    def sent_per_step(self) -> float:
        """Bytes that each GPU sends in a step."""
        return sum(each.sent(self.layout.processes) for each in self.collectives)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: weights and optimizer state in float32."""
        return 4 * (self.elements.parameters + self.elements.state)

    @property
    def nodes(self) -> float:
        """Nodes of the run, or the share of one."""
        return max(1.0, self.layout.processes / self.assumed.gpus_per_node)

    @property
    def stall_seconds(self) -> float:
        """Seconds for which a save stops training: the copy of a GPU's share to the host."""
        return self.checkpoint_bytes / self.layout.processes / self.assumed.copied_bytes_per_second

    @property
    def write_seconds(self) -> float:
        """Seconds in which a save is written, while training goes on."""
        return self.checkpoint_bytes / (self.nodes * self.assumed.stored_bytes_per_second)

    @property
    def restart_seconds(self) -> float:
        """Seconds from a restart to the first step."""
        return self.assumed.start_seconds + self.write_seconds

    @property
    def reader_cores(self) -> float:
        """Cores that read, encode and pack as many tokens as the GPUs train on."""
        return self.tokens_per_second * self.layout.processes / self.assumed.encoded_tokens_per_second

    @property
    def hub_requests(self) -> int:
        """Requests to the Hugging Face hub before the first step; 0 for local data."""
        data = self.run.data
        training, validation = (
            sum(each.dataset is not None for each in sources) for sources in (data.sources, data.validation)
        )
        opened = (training + validation) * self.assumed.requests_to_open
        return opened + training * data.global_batch_size * self.assumed.requests_per_lane


def make_plan(run: RunConfig, processes: int, device: str, assumed: Assumptions) -> Plan:
    """Plan a run.

    Args:
        run: Configuration of the run; training.precision auto means bf16.
        processes: Number of GPUs.
        device: Name of a type of GPU, such as h100.
        assumed: Numbers that the plan cannot know.

    Raises:
        ValueError: an unknown type of GPU, or a batch or an optimizer that the layout does not fit.
    """
    gpu = gpu_named(device)
    if gpu is None:
        known = ", ".join(each.name.lower() for each in GPUS)
        raise ValueError(f"--device is {device!r}, which is no GPU in the table of devices: choose one of {known}.")
    precision: Precision = "bf16" if run.training.precision == "auto" else run.training.precision
    world = first_process(processes, run.training.sequence_parallel)
    layout = rank_layout(run, processes, precision, check_layout(run, world, precision), "cuda")
    elements = elements_of(run)
    return Plan(
        run=run,
        gpu=gpu,
        layout=layout,
        elements=elements,
        choices=_choices(run, layout, elements, gpu.memory_bytes - assumed.reserved_bytes),
        collectives=collectives_of(run, elements.parameters, layout),
        assumed=assumed,
    )


def _choices(run: RunConfig, layout: RankLayout, elements: Elements, room: float) -> list[Choice]:
    stages = sorted({zero_stage({"zero_optimization": {"stage": stage}}, layout.precision) for stage in range(4)})
    found = []
    for stage in stages:
        for checkpointing in (False, True):
            try:
                run.optimizer.check_layout(stage)
                memory = memory_plan(run.model, elements, replace(layout, stage=stage, checkpointing=checkpointing))
            except ValueError:
                memory = None
            found.append(
                Choice(
                    stage=stage,
                    checkpointing=checkpointing,
                    memory=memory,
                    fits=memory is not None and memory.peak <= room,
                    is_configured=(stage, checkpointing) == (layout.stage, layout.checkpointing),
                )
            )
    return found


def collectives_of(run: RunConfig, parameters: int, layout: RankLayout) -> list[Collective]:
    """Traffic of a step by kind.

    Args:
        run: Configuration of the run; its communication_data_type says how gradients are summed.
        parameters: Elements of all parameters.
        layout: The layout of the run.
    """
    if layout.processes == 1:
        return []
    sums = "bfloat16" if run.deepspeed.get("communication_data_type") == "bf16" else "float32"
    sum_bytes = (2 if sums == "bfloat16" else 4) * parameters
    own, width = ("bfloat16", 2) if layout.precision == "bf16" else ("float32", 4)
    if layout.stage == 3:
        # The backward pass reads all weights once more but those of the embedding.
        embedding = 0 if run.model.tie_embeddings else run.model.vocab_size * run.model.embedding_dim
        return [
            Collective("all-gather", own, layout.micro_batches * width * (2 * parameters - embedding)),
            Collective("reduce-scatter", sums, layout.micro_batches * sum_bytes),
        ]
    times = layout.micro_batches if layout.stage == 2 else 1
    reduction = [Collective("all-reduce", sums, times * sum_bytes)]
    return [*reduction, Collective("all-gather", own, width * parameters)] if layout.stage else reduction
