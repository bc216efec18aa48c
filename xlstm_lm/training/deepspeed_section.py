"""The section `deepspeed` of a recipe: the keys of DeepSpeed's JSON that a run may set, with their types.

DeepSpeed ignores most unknown keys, so a misspelled one would have no effect and no message.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, StrictBool
from typing_extensions import TypedDict

from xlstm_lm.base.fields import Count, CountOrZero, Positive, Range, refuse_bool

_FORBID = {"extra": "forbid", "use_attribute_docstrings": True}
_ANOTHER_LAYOUT = "checkpoints here hold weights and optimizer state either whole or divided over all processes"
_NO_NVME = "checkpoints here are read from and written to device cpu only"
_OTHER_NUMBERS = "it changes what is computed"
_LEAVES = "the loss uses the head's weight outside of its module, and DeepSpeed would not collect it there"
_NO_EFFECT = "DeepSpeed reads it nowhere"
_OWN_CHECKPOINTS = "it is of DeepSpeed's own checkpoints, which xlstm-lm does not write"

REFUSED = {
    "train_batch_size": "use data.global_batch_size",
    "train_micro_batch_size_per_gpu": "use training.micro_batch_size",
    "gradient_accumulation_steps": "use training.micro_batch_size (and data.global_batch_size)",
    "managed_gradient_accumulation": "use training.micro_batch_size",
    "bf16": "use training.precision",
    "bfloat16": "use training.precision",
    "fp16": "use training.precision",
    "amp": "use training.precision",
    "torch_autocast": "use training.precision",
    "gradient_clipping": "use optimizer.gradient_clip",
    "optimizer": "use the section optimizer",
    "scheduler": "use the section schedule",
    "activation_checkpointing": "use training.activation_checkpointing",
    "wandb": "use the section wandb",
    "tensorboard": "metrics are in metrics.jsonl, and in W&B by the section wandb",
    "csv_monitor": "metrics are in metrics.jsonl, and in W&B by the section wandb",
    "comet": "metrics are in metrics.jsonl, and in W&B by the section wandb",
    "checkpoint": "use training.checkpoint_every",
    "load_universal_checkpoint": "use training.resume, which reads checkpoints of any ZeRO stage",
    "steps_per_print": "use training.log_every",
    "gradient_allreduce_op": "the loss is normalized by the target tokens of the whole batch",
    "zero_force_ds_cpu_optimizer": "the optimizers of xlstm-lm update CPU tensors as well",
    "elasticity": "use data.global_batch_size: a run continues with any number of processes that divides it",
    "sequence_parallel_size": "rows are not divided over processes, and DeepSpeed would scale gradients wrongly",
    "seq_parallel_communication_data_type": "rows are not divided over processes",
    "autotuning": "it starts runs of its own and cannot be part of one",
    "aio": _NO_NVME,
    "tensor_parallel": _ANOTHER_LAYOUT,
    "autotp": _ANOTHER_LAYOUT,
    "pipeline": _ANOTHER_LAYOUT,
    "expert_parallel": _ANOTHER_LAYOUT,
    "mics_shard_size": _ANOTHER_LAYOUT,
    "compression_training": _OTHER_NUMBERS,
    "quantize_training": _OTHER_NUMBERS,
    "weight_quantization": _OTHER_NUMBERS,
    "progressive_layer_drop": _OTHER_NUMBERS,
    "curriculum_learning": "the section data determines the order of the data",
    "data_efficiency": "the section data determines the order of the data",
    "sparse_attention": _OTHER_NUMBERS,
    "sparse_gradients": "embeddings of xlstm-lm have dense gradients",
    "hybrid_engine": "it serves generation during training, which xlstm-lm does not do",
    "disable_allgather": _NO_EFFECT,
    "zero_allow_untested_optimizer": "the optimizers of xlstm-lm are tested at every stage, and DeepSpeed is told so",
    "compile": "kernels are chosen and checked by xlstm-lm",
    "zero_optimization.mics_shard_size": _ANOTHER_LAYOUT,
    "zero_optimization.mics_hierarchical_params_gather": _ANOTHER_LAYOUT,
    "zero_optimization.zero_hpz_partition_size": _ANOTHER_LAYOUT,
    "zero_optimization.zero_quantized_weights": _OTHER_NUMBERS,
    "zero_optimization.zero_quantized_nontrainable_weights": _OTHER_NUMBERS,
    "zero_optimization.zero_quantized_gradients": _OTHER_NUMBERS,
    "zero_optimization.zenflow": "it changes when weights are updated",
    "zero_optimization.elastic_checkpoint": "xlstm-lm reads its checkpoints at any ZeRO stage",
    "zero_optimization.load_from_fp32_weights": "xlstm-lm reads its checkpoints at any ZeRO stage",
    "zero_optimization.cpu_offload": "use zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_params": "use zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "use pin_memory of offload_optimizer and offload_param",
    "zero_optimization.offload_optimizer.nvme_path": _NO_NVME,
    "zero_optimization.offload_optimizer.super_offload": "xlstm-lm cannot save the optimizer state that it holds",
    "zero_optimization.offload_optimizer.buffer_count": _NO_NVME,
    "zero_optimization.offload_optimizer.fast_init": _NO_NVME,
    "zero_optimization.offload_optimizer.pipeline_read": _NO_NVME,
    "zero_optimization.offload_optimizer.pipeline_write": _NO_NVME,
    "zero_optimization.offload_optimizer.ratio": "checkpoints would miss the part that is not offloaded",
    "zero_optimization.offload_param.nvme_path": _NO_NVME,
    "zero_optimization.offload_param.buffer_count": _NO_NVME,
    "zero_optimization.offload_param.buffer_size": _NO_NVME,
    "zero_optimization.offload_param.max_in_cpu": _NO_NVME,
    "zero_optimization.allgather_partitions": _NO_EFFECT,
    "zero_optimization.round_robin_gradients": "DeepSpeed then returns a parameter's gradient with another's size, "
    "where norms by layer are measured",
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it",
    "zero_optimization.compute_grad_norm": "the gradient norm is a metric, and decides whether a step is applied",
    "zero_optimization.leaf_module": _LEAVES,
    "zero_optimization.module_granularity_threshold": _LEAVES,
    "zero_optimization.stage3_module_granularity_threshold": _LEAVES,
    "zero_optimization.pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINTS,
}
"""DeepSpeed's keys that a recipe must not set, with the reason or the field to use instead."""


def _refuse(section: Any) -> Any:
    if problems := _problems(section, ""):
        raise ValueError("\n".join(problems))
    return section


def _problems(section: Any, prefix: str) -> list[str]:
    """One line for each key in `REFUSED` and each value 'auto', which only the Hugging Face Trainer resolves."""
    problems = []
    for key, value in section.items() if isinstance(section, dict) else ():
        name = f"{prefix}{key}"
        if name in REFUSED:
            problems.append(f"deepspeed.{name} is not set there: {REFUSED[name]}; remove it.")
        elif value == "auto":
            problems.append(f"deepspeed.{name} = 'auto': give a value, or remove it for DeepSpeed's default.")
        else:
            problems += _problems(value, f"{name}.")
    return problems


class Offload(TypedDict, total=False):
    """Tensors in the host's memory."""

    __pydantic_config__ = _FORBID

    device: Literal["none", "cpu"]
    """Device that holds them. Checkpoints can be read from and written to device cpu only."""
    pin_memory: StrictBool
    """Whether the memory is page-locked."""


class ZeroOptimization(TypedDict, total=False):
    """Division of optimizer state, gradients and weights over the processes."""

    __pydantic_config__ = _FORBID

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(refuse_bool)]
    """ZeRO stage. 1 divides optimizer state, 2 gradients as well, 3 weights as well; 0 divides nothing."""
    contiguous_gradients: StrictBool
    """Whether gradients are copied to one buffer."""
    reduce_scatter: StrictBool
    """Whether gradients are averaged by reduce-scatter in place of all-reduce."""
    reduce_bucket_size: Count
    """Elements reduced at a time."""
    use_multi_rank_bucket_allreduce: StrictBool
    """Whether the gradients of several ranks are reduced together."""
    allgather_bucket_size: Count
    """Elements collected at a time."""
    allgather_sequential: StrictBool
    """Whether weights are collected one after the other."""
    stage3_allgather_sequential: StrictBool
    """Whether weights are collected one after the other."""
    overlap_comm: StrictBool
    """Whether gradients are reduced during the backward pass."""
    offload_optimizer: Offload | None
    """Master weights and moments in the host's memory."""
    offload_param: Offload | None
    """Weights in the host's memory, at stage 3."""
    sub_group_size: Count
    """Elements updated at a time, at stage 3."""
    prefetch_bucket_size: CountOrZero
    """Elements of weights fetched ahead, at stage 3."""
    stage3_prefetch_bucket_size: CountOrZero
    """Elements of weights fetched ahead, at stage 3."""
    param_persistence_threshold: CountOrZero
    """Weights with fewer elements are not divided, at stage 3."""
    stage3_param_persistence_threshold: CountOrZero
    """Weights with fewer elements are not divided, at stage 3."""
    model_persistence_threshold: CountOrZero
    """Largest number of elements that are not divided, at stage 3."""
    stage3_model_persistence_threshold: CountOrZero
    """Largest number of elements that are not divided, at stage 3."""
    max_live_parameters: CountOrZero
    """Elements of weights on a device at a time, at stage 3."""
    stage3_max_live_parameters: CountOrZero
    """Elements of weights on a device at a time, at stage 3."""
    max_reuse_distance: CountOrZero
    """Weights that are used again within this many elements are kept, at stage 3."""
    stage3_max_reuse_distance: CountOrZero
    """Weights that are used again within this many elements are kept, at stage 3."""
    use_all_reduce_for_fetch_params: StrictBool
    """Whether weights are fetched by all-reduce, at stage 3."""
    stage3_use_all_reduce_for_fetch_params: StrictBool
    """Whether weights are fetched by all-reduce, at stage 3."""
    ignore_unused_parameters: StrictBool
    """Whether parameters without a gradient are accepted."""
    memory_efficient_linear: StrictBool
    """Whether linear layers recompute activations instead of keeping them, at stage 3."""
    log_trace_cache_warnings: StrictBool
    """Whether a change in the order of modules is logged, at stage 3."""
    enable_sanity_checks: StrictBool
    """Whether DeepSpeed runs its own consistency checks."""


class DataTypes(TypedDict, total=False):
    """Data types."""

    __pydantic_config__ = _FORBID

    grad_accum_dtype: Literal["fp32", "bf16"]
    """Type of the gradients that are summed over micro batches."""


class FlopsProfiler(TypedDict, total=False):
    """DeepSpeed's profile of one step."""

    __pydantic_config__ = _FORBID

    enabled: StrictBool
    """Whether the profile is made."""
    recompute_fwd_factor: Positive
    """Forward passes counted for activation checkpointing."""
    profile_step: Count
    """The step that is profiled."""
    module_depth: Annotated[int, Range(-1, 1000)]
    """Depth of the modules that are listed; -1 for all."""
    top_modules: Count
    """Modules that are listed."""
    detailed: StrictBool
    """Whether all modules are listed."""
    output_file: str | None
    """File to write to."""


class CommsLogger(TypedDict, total=False):
    """DeepSpeed's log of communication."""

    __pydantic_config__ = _FORBID

    enabled: StrictBool
    """Whether the log is written."""
    prof_all: StrictBool
    """Whether all operations are logged."""
    prof_ops: list[str]
    """Names of the operations that are logged."""
    verbose: StrictBool
    """Whether each operation is printed."""
    debug: StrictBool
    """Whether the caller's name is printed."""


class DeepSpeedSection(TypedDict, total=False):
    """Accepted part of DeepSpeed's JSON."""

    __pydantic_config__ = _FORBID

    zero_optimization: ZeroOptimization
    """ZeRO."""
    communication_data_type: Literal["fp32", "bf16"]
    """Type in which gradients are summed over processes; fp32 where it is not given, also in a run in bf16."""
    data_types: DataTypes
    """Data types."""
    prescale_gradients: StrictBool
    """Whether gradients are divided before they are summed."""
    gradient_predivide_factor: Positive
    """Divisor of gradients before they are summed."""
    disable_python_gc: StrictBool
    """Whether Python's garbage collection is off while DeepSpeed sets up."""
    wall_clock_breakdown: StrictBool
    """Whether DeepSpeed prints its timings."""
    memory_breakdown: StrictBool
    """Whether DeepSpeed prints memory."""
    dump_state: StrictBool
    """Whether DeepSpeed prints its configuration."""
    log_level: Literal["debug", "info", "warning", "error", "critical"]
    """DeepSpeed's log level."""
    flops_profiler: FlopsProfiler
    """DeepSpeed's profile of one step."""
    comms_logger: CommsLogger
    """DeepSpeed's log of communication."""


CheckedSection = Annotated[DeepSpeedSection, BeforeValidator(_refuse)]
"""Type of the section, with the keys in `REFUSED` rejected by name."""
