"""The mLSTM's backends, samples to check them on, and cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from xlstm_lm.ops.backend import (
    COUNTED_CHUNK,
    Backend,
    Call,
    Cost,
    Sample,
    linear_attention_flops,
    resolve,
)
from xlstm_lm.ops.mlstm.recurrence import DEFAULTS, State
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.selfcheck import TOLERANCE, Checked, some_resets

STATE_ENTRIES = 2**17
"""State entries of all rows and heads of a sample at most, which bounds the memory of the recurrence for wide heads."""
LONG = 16 * 32 + 5
"""Steps of the long sample: sixteen chunks of the Triton kernels and a rest, enough for their software pipelines and
more than the kernels of the gates have in a block."""


def mlstm_inputs(
    device: torch.device | str, dtype: torch.dtype, *, B: int = 2, T: int = 100, H: int = 2, K: int = 16, V: int = 24
) -> list[Tensor]:
    """q, k, v, i and f with a model's layout: views of one projection, gates in float32."""
    projected = torch.randn(B, T, H * (2 * K + V), device=device, dtype=dtype)
    heads = [each.unflatten(-1, (H, -1)) for each in projected.split((H * K, H * K, H * V), dim=-1)]
    gates = torch.randn(B, T, 2 * H, device=device).chunk(2, dim=-1)
    return [*heads, *(gate + shift for gate, shift in zip(gates, (-1.0, 3.0), strict=True))]


def samples(call: Call, backend: str) -> Iterator[Sample]:
    """A short sequence against the recurrence, and a long one against the chunkwise form in float64."""
    K, V = call.size("K"), call.size("V")

    def sample(against: str, B: int, T: int, H: int, super_chunk: int | None = None) -> Sample:
        inputs = mlstm_inputs(call.device, call.dtype, B=B, T=T, H=H, K=K, V=V)
        gates = call.dtype if call.dtype == torch.float64 else torch.float32
        state = [torch.randn(shape, device=call.device, dtype=gates) for shape in ((B, H, K, V), (B, H, K))]
        resets_BT = some_resets(inputs) if call.has_resets else None
        keywords = {"resets_BT": resets_BT, "super_chunk": super_chunk, "options": call.options}
        return Sample([*inputs, *state], keywords, against)

    # Wide heads get fewer steps, because the recurrence keeps every state. Super-chunks of two chunks exercise the
    # states between them.
    steps = 70 if 2 * K * V <= STATE_ENTRIES else 40
    H = max(1, min(2, STATE_ENTRIES // (2 * K * V)))
    yield sample("recurrence", B=2, T=steps, H=H, super_chunk=2)
    if backend not in ("step", "triton_step", "chunkwise"):
        yield sample("chunkwise", B=1, T=LONG, H=1)


def run(backend: Backend, sample: Sample) -> Checked:
    """h, and C and n of the last state, as a function of q, k, v, i, f, C and n of the first state (m is 0)."""
    keywords = dict(sample.options)
    super_chunk = keywords.pop("super_chunk")
    if backend.name == "triton":
        keywords["super_chunk"] = super_chunk
    cell = functools.partial(_token_by_token, backend.loaded) if backend.one_step else backend.loaded

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *others, C_BHKV, n_BHK = inputs
        state = (C_BHKV, n_BHK, torch.zeros_like(n_BHK[..., 0]))
        h_BTHV, (C_BHKV, n_BHK, _) = cell(*others, initial_state=state, return_state=True, **keywords)
        return h_BTHV, C_BHKV, n_BHK

    return function


def _token_by_token(
    step: Callable[..., tuple[Tensor, State]],
    *inputs: Tensor,
    resets_BT: Tensor | None,
    initial_state: State,
    **keywords: Any,
) -> tuple[Tensor, State]:
    """A backend for one token over a whole sequence, as in generation: with resets only where there is one."""
    h_BTHV, state = [], initial_state
    for index in range(inputs[0].shape[1]):
        token = slice(index, index + 1)
        reset_B1 = None if resets_BT is None or not resets_BT[:, token].any() else resets_BT[:, token]
        h_B1HV, state = step(
            *(x[:, token] for x in inputs),
            resets_BT=reset_B1,
            initial_state=state,
            overwrite_state=index > 0,
            **keywords,
        )
        h_BTHV.append(h_B1HV)
    return torch.cat(h_BTHV, 1), state


def cost(*, B: int, T: int, H: int, K: int, V: int, L: int = COUNTED_CHUNK, itemsize: int = 2) -> Cost:
    """Linear attention in chunks of L, and 4 K for the normalizer; q, k, v, i, f read and h written once."""
    flops = linear_attention_flops(min(L, T), H, K, V) + 4 * H * K
    return Cost(B * T * flops, B * T * H * (itemsize * (2 * K + 2 * V) + 2 * 4))


def kept(
    *, T: int, H: int, K: int, V: int, device: str, L: int | None = None, itemsize: int = 2, **sizes: int
) -> float:
    """On a CPU two numbers a step and the state every four chunks; on a GPU the weights within a chunk and five numbers
    a step."""
    del sizes
    if device == "cpu":
        chunk = L or resolve("xlstm_lm.ops.mlstm.compiled:default_chunk_length")(K, V)
        states = -(-T // (4 * chunk)) / T
        return 4 * H * (1 + 1 / chunk + states * (K * V + K))
    return H * (itemsize * COUNTED_CHUNK + 4 * 5)


def _walks(call: Call) -> str | None:
    """The reason why the Triton kernels do not train a call's heads; None if they do."""
    reason = resolve("xlstm_lm.ops.mlstm.triton_launch:why_not")(
        call.size("K"), call.size("V"), call.dtype, call.device
    )
    return None if reason is None else f"it {reason}"


def _step(call: Call) -> str | None:
    """The reason why the Triton kernel for a single step does not run; None if it does."""
    reason = resolve("xlstm_lm.ops.mlstm.triton_launch:why_not_step")(call.dtype, call.device)
    return None if reason is None else f"it {reason}"


PYTORCH = "as batched matrix products in PyTorch"
TOKENS = "token by token in PyTorch"
MLSTM = Operation(
    name="mlstm",
    title="the mLSTM",
    subject="q",
    backends=(
        Backend(
            name="triton_step",
            function="xlstm_lm.ops.mlstm.triton_step:mlstm_triton_step",
            devices=("cuda",),
            dtypes=tuple(TOLERANCE),
            package="triton",
            gradients=False,
            one_step=True,
            exports=lambda call: False,
            checked_on=("cuda",),
            limits=_step,
            # Its check has tokens with resets and tokens without.
            same_code=lambda call: call._replace(has_resets=True),
        ),
        Backend(
            name="step",
            function="xlstm_lm.ops.mlstm.step:mlstm_step",
            gradients=False,
            one_step=True,
            slow=TOKENS,
            fast_on=("cpu",),
        ),
        Backend(
            name="triton",
            function="xlstm_lm.ops.mlstm.triton_op:mlstm_triton",
            devices=("cuda",),
            dtypes=tuple(TOLERANCE),
            package="triton",
            exports=lambda call: False,
            checked_on=("cuda",),
            limits=_walks,
            same_code=lambda call: call._replace(one_step=False),
        ),
        Backend(
            name="compiled",
            function="xlstm_lm.ops.mlstm.compiled:mlstm_compiled",
            devices=("cpu",),
            native=True,
            exports=lambda call: False,
        ),
        Backend(
            name="chunkwise",
            function="xlstm_lm.ops.mlstm.chunkwise:mlstm_chunkwise",
            # torch.export does not trace a hand-written backward.
            exports=lambda call: not call.needs_gradient,
            slow=PYTORCH,
        ),
        Backend(name="recurrence", function="xlstm_lm.ops.mlstm.recurrence:mlstm_recurrence", slow=TOKENS),
    ),
    samples=samples,
    run=run,
    cost=cost,
    kept=kept,
    identity="KV",
    examples=({"K": 16, "V": 24},),
    gpu_examples=({"K": 128, "V": 256},),
    options=DEFAULTS,
)
