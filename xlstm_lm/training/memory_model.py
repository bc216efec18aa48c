"""A model of the memory that a rank needs: what it holds all the time, and what each phase of a step adds.

The terms are those of DeepSpeed's optimizers as this package configures them, read from the live tensors of real steps.
`tests/training/test_memory_model.py` holds the sum to those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xlstm_lm.models import LSTMConfig, ModelConfig
from xlstm_lm.models.storage import FLOAT32, Storage
from xlstm_lm.ops.loss import chunk_tokens_for
from xlstm_lm.training.deepspeed_config import Precision

DEFAULT_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at a time where `reduce_bucket_size` is not set, and at stage 0 always."""
DEFAULT_PREFETCH = 50_000_000
"""Elements of weights that stage 3 fetches ahead where `prefetch_bucket_size` is not set."""
LIVE_WEIGHTS = 1_000_000_000
"""Elements of gathered weights that stage 3 keeps on a device where `max_live_parameters` is not set."""
SUB_GROUP = 1_000_000_000
"""Elements that stage 3 updates at a time where `sub_group_size` is not set."""
STEP_WORKSPACE = 0.5
"""Bytes that the backward pass of one block works in, as a share of the bytes that the block keeps."""
LOGIT_COPIES = 3
"""Float32 copies of a chunk's logits that exist at a time, beside those in the run's type."""
BORDER_TOKENS = 16 * 64
"""Tokens from one state to the next that a GPU's kernels for matrix memories write while a pass runs."""


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """The part of a run's configuration that its memory depends on."""

    stage: int
    """Effective ZeRO stage."""
    processes: int
    """Number of processes."""
    precision: Precision
    """Type of weights and activations."""
    rows: int
    """Rows of a micro batch."""
    micro_batches: int
    """Micro batches of a step on a rank."""
    context_length: int
    """Tokens of a row."""
    checkpointing: bool
    """Whether activations are recomputed."""
    carries_state: bool = False
    """Whether each lane's recurrent state is kept from row to row."""
    device: str
    """Type of the device, cpu or cuda."""
    zero: Mapping[str, Any]
    """Section deepspeed.zero_optimization."""

    @property
    def storage(self) -> Storage:
        """The type of activations and the device that holds them."""
        return Storage(2 if self.precision == "bf16" else 4, self.device)

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch."""
        return self.rows * self.context_length

    def setting(self, name: str, default: int) -> int:
        """A number of the section, under its name or that with stage3_ before it."""
        return int(self.zero.get(name, self.zero.get(f"stage3_{name}", default)))


@dataclass(frozen=True, kw_only=True)
class Elements:
    """Numbers of elements of a model and of its optimizer's state."""

    parameters: int
    """Elements of all parameters."""
    state: int
    """Elements of the optimizer's state."""
    largest_group: int
    """Elements of the largest of the optimizer's groups."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a rank by purpose."""

    held: dict[str, int]
    """Bytes on the device from the first step to the last."""
    phases: dict[str, dict[str, int]]
    """Bytes that each phase of a step adds."""
    host: dict[str, int]
    """Bytes in the host's memory, of what is offloaded."""

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def items(self) -> dict[str, int]:
        """Bytes on the device in that phase."""
        added = self.phases[self.phase]
        return {name: self.held.get(name, 0) + added.get(name, 0) for name in [*self.held, *added]}

    @property
    def peak(self) -> int:
        """Most bytes on the device at a time."""
        return sum(self.items.values())


def memory_plan(model: ModelConfig, elements: Elements, layout: RankLayout) -> MemoryPlan:
    """The memory of one rank.

    Args:
        model: The model.
        elements: Sizes of the model and of its optimizer's state.
        layout: The layout of the run.
    """
    held, host = _held(elements, layout)
    if layout.carries_state:
        lanes = layout.rows * layout.micro_batches
        held["states"] = lanes * model.state_bytes(layout.storage.itemsize, layout.context_length)
    activations = activation_bytes(model, layout)
    loss = _loss_bytes(model, layout)
    head_gradient = FLOAT32 * model.vocab_size * model.head_width
    carried = _carried_gradients(elements, layout) if layout.micro_batches > 1 else 0
    gathered = _gathered_weights(elements, layout)
    buckets = _bucket_bytes(elements, layout)
    bucket = layout.setting("reduce_bucket_size", DEFAULT_BUCKET)
    first = min(1.0, bucket / elements.parameters)
    # The gradient of the head fills the first bucket before any block has freed what it kept.
    head, in_blocks = model.vocab_size * model.head_width, elements.parameters - model.vocab_size * model.embedding_dim
    freed = min(1.0, max(0.0, (bucket - head) / max(in_blocks - head, 1)))
    in_order = layout.stage >= 2 or (layout.stage == 1 and layout.precision == "fp32")
    gradients = _gradients_at_the_end(elements, layout)
    phases = {
        "forward": {"gathered weights": gathered, "activations": activations, **loss, "gradients": carried},
        "backward, at its start": {
            "gathered weights": gathered,
            "activations": activations + _workspace(model, layout),
            "gradients": carried + 2 * head_gradient + layout.storage.itemsize * layout.tokens * model.head_width,
        },
        "backward, at the first reduction": {
            "activations": round((1 - freed) * activations) if in_order else 0,
            "gradients": gradients if layout.stage == 2 or not in_order else max(carried, round(first * gradients)),
            "buckets": buckets,
            "gathered weights": gathered if first < 1 and in_order else 0,
        },
        "backward, at its end": {"gradients": gradients, "buckets": buckets},
        "update": {"gradients": _gradients_of_the_update(elements, layout)},
    }
    if layout.device == "cuda":
        for name in list(phases)[:3]:
            phases[name]["states"] = _state_workspace(model, layout)
    return MemoryPlan(held, phases, host)


def divided_bytes(elements: int, state: int, precision: Precision, stage: int, processes: int) -> dict[str, int]:
    """Bytes of weights, master weights and moments of one rank, as ZeRO divides them.

    Args:
        elements: Elements of all parameters.
        state: Elements of the optimizer's state.
        precision: Type of weights.
        stage: Effective ZeRO stage.
        processes: Number of processes.
    """
    width = 2 if precision == "bf16" else 4
    return {
        "weights": width * elements // (processes if stage == 3 else 1),
        "master weights": FLOAT32 * elements // processes if stage else 0,
        "moments": FLOAT32 * state // (processes if stage else 1),
    }


def activation_bytes(model: ModelConfig, layout: RankLayout) -> int:
    """Bytes that a micro batch's forward pass keeps: of all blocks, or with checkpointing the inputs of all and one
    block's whole."""
    blocks = _kept_by_block(model, layout)
    if not layout.checkpointing:
        return round(layout.tokens * sum(blocks))
    width = max(model.embedding_dim, model.head_width)
    return round(layout.tokens * ((len(blocks) + 1) * layout.storage.itemsize * width + max(blocks)))


def _kept_by_block(model: ModelConfig, layout: RankLayout) -> list[float]:
    """Bytes that each block keeps for a token."""
    if isinstance(model, LSTMConfig):
        parts = [model.layer_kept_by_part(layout.storage, width) for width in model.input_widths]
    else:
        parts = [block.kept_by_part(layout.storage, layout.context_length) for block in model.blocks()]
    return [sum(each.values()) for each in parts]


def _workspace(model: ModelConfig, layout: RankLayout) -> int:
    return round(STEP_WORKSPACE * layout.tokens * max(_kept_by_block(model, layout)))


def _state_workspace(model: ModelConfig, layout: RankLayout) -> int:
    """States at the borders of super-chunks, forward and backward, of the block that has the largest."""
    if isinstance(model, LSTMConfig):
        return 0
    largest = max((each.state_bytes(0, 0) for each in model.block_mixers()), default=0)
    return 2 * layout.rows * -(-layout.context_length // BORDER_TOKENS) * largest


def _loss_bytes(model: ModelConfig, layout: RankLayout) -> dict[str, int]:
    """Gradients of head and hidden states, which are formed with the loss, and the logits of one chunk."""
    a, head = layout.storage.itemsize, model.vocab_size * model.head_width
    chunk = min(layout.tokens, chunk_tokens_for(layout.device, model.vocab_size))
    return {
        "gradients of the loss": FLOAT32 * head + a * layout.tokens * model.head_width,
        "logits": chunk * model.vocab_size * (LOGIT_COPIES * FLOAT32 + layout.storage.copied // 2),
    }


def _held(elements: Elements, layout: RankLayout) -> tuple[dict[str, int], dict[str, int]]:
    held = divided_bytes(elements.parameters, elements.state, layout.precision, layout.stage, layout.processes)
    if layout.stage == 1 and layout.precision == "bf16":
        held["gradients"] = FLOAT32 * elements.parameters
    if layout.stage == 3:
        held["gradients"] = FLOAT32 * elements.parameters // layout.processes
        held["buckets"] = FLOAT32 * layout.setting("reduce_bucket_size", DEFAULT_BUCKET)
    host: dict[str, int] = {}
    for section, names in (("offload_optimizer", ("master weights", "moments")), ("offload_param", ("weights",))):
        if (layout.zero.get(section) or {}).get("device") == "cpu":
            host |= {name: held.pop(name) for name in names}
    return held, host


def _carried_gradients(elements: Elements, layout: RankLayout) -> int:
    """Bytes of gradients that stay, beside what is held, from one micro batch to the next."""
    if layout.stage == 2:
        return FLOAT32 * elements.parameters // layout.processes
    return FLOAT32 * elements.parameters if layout.precision == "fp32" and layout.stage < 2 else 0


def _gradients_at_the_end(elements: Elements, layout: RankLayout) -> int:
    """Bytes of gradients, beside what is held, when the backward pass ends."""
    N, P, a = elements.parameters, layout.processes, layout.storage.itemsize
    if layout.stage == 1 and layout.precision == "fp32":
        bucket = layout.setting("reduce_bucket_size", DEFAULT_BUCKET)
        return a * N + (FLOAT32 * N // P if bucket < N else 0)
    if layout.stage == 2:
        return FLOAT32 * N // P
    return 0 if layout.stage == 3 else a * N


def _gradients_of_the_update(elements: Elements, layout: RankLayout) -> int:
    """Bytes of gradients beside what is held while weights are updated: a rank's own, and a flat copy of a group's."""
    N, P = elements.parameters, layout.processes
    if layout.stage == 0:
        return FLOAT32 * N
    if layout.stage == 1 and layout.precision == "bf16":
        return layout.storage.itemsize * N
    if layout.stage == 2 and layout.precision == "bf16":
        return FLOAT32 * N // P
    group = (
        min(elements.largest_group, layout.setting("sub_group_size", SUB_GROUP))
        if layout.stage == 3
        else (elements.largest_group)
    )
    return FLOAT32 * group // P + (0 if layout.stage == 3 else FLOAT32 * N // P)


def _gathered_weights(elements: Elements, layout: RankLayout) -> int:
    """Bytes of whole weights that stage 3 holds for a pass, and of those on their way."""
    if layout.stage < 3 or layout.processes == 1:
        return 0
    live = min(elements.parameters, layout.setting("max_live_parameters", LIVE_WEIGHTS))
    ahead = min(elements.parameters, layout.setting("prefetch_bucket_size", DEFAULT_PREFETCH))
    return layout.storage.itemsize * (live + ahead)


def _bucket_bytes(elements: Elements, layout: RankLayout) -> int:
    """Bytes of buffers for the reduction of gradients, beside what is held."""
    a, N = layout.storage.itemsize, elements.parameters
    if layout.stage == 0 or (layout.stage == 1 and layout.precision == "bf16"):
        return FLOAT32 * min(N, DEFAULT_BUCKET)
    bucket = layout.setting("reduce_bucket_size", DEFAULT_BUCKET)
    content = min(N, bucket)
    if layout.stage == 3:
        return FLOAT32 * content
    buffers = 2 if layout.zero.get("overlap_comm") else 1
    # A bucket in bf16 is joined and copied to float32 to be summed; one in float32 is summed where it is.
    copies = a + layout.storage.copied if layout.storage.copied else 0
    return buffers * a * bucket + content * copies
