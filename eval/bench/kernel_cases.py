"""Cases of `eval.kernels`: operations at given sizes, the work that each requires, and its contenders.

A contender is a function, its full-size inputs, and checks: a part of those inputs with a definition to apply to it in
float64. Operations and bytes are those of the task, not of a contender's way of doing it:

* mLSTM, for a token and a head, forward: 4 K V + 64 (K + V) operations (C updated and read, chunks of 64 within), and
  q, k, v, i, f read and h written once. The backward counts twice the operations; it reads all of these and dh once and
  writes dq, dk, dv, di and df.
* Causal attention over T tokens: 2 T D operations for a token and a head (half of the square), backward twice.
* sLSTM, for a token and a head: 8 D^2 operations; wx read and y written; backward likewise with R's gradient.
* The gated delta rule: the operations and bytes of `GATED_DELTA.cost`; the backward takes twice the operations, reads
  all of these again and writes as much.
* A decode step reads and writes the state once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.bench.measure import dtype_name
from xlstm_lm.ops import mlstm as mlstm_ops
from xlstm_lm.ops import slstm as slstm_ops
from xlstm_lm.ops.backend import Backend, Cost
from xlstm_lm.ops.gated_delta import GATED_DELTA, gated_delta, gated_delta_inputs
from xlstm_lm.ops.mlstm.operation import mlstm_inputs
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.slstm.operation import slstm_inputs

Function = Callable[..., Tensor]
CHECKED_TOKENS = 257  # several chunks and no multiple of any


@dataclass(frozen=True)
class Check:
    """A part of a contender's inputs, and the definition of the right output."""

    definition: Function
    inputs: list[Tensor]


@dataclass
class Contender:
    """An implementation of the task, with its inputs."""

    function: Function
    inputs: list[Tensor]
    checks: list[Check] = field(default_factory=list)
    operations: float | None = None
    """Floating-point operations of a forward pass; None: those of the case."""
    moved_bytes: float | None = None
    """Bytes of a forward and a backward pass; None: those of the case."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation at given sizes."""

    device: str
    dtype: torch.dtype
    backward: bool = True

    operation = ""

    @property
    def sizes(self) -> str:
        """The sizes, for a reader."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Sizes, type and direction, which all contenders of a table share."""
        direction = "forward + backward" if self.backward else "forward"
        return f"{self.sizes}, {dtype_name(self.dtype)}, {direction}"

    def inputs(self) -> list[Tensor]:
        """Fresh random inputs."""
        raise NotImplementedError

    def own(self, inputs: list[Tensor]) -> Iterator[tuple[str, Contender]]:
        """Our kernels for this device, by name."""
        raise NotImplementedError

    def operations(self) -> float:
        """Floating-point operations of the forward pass."""
        raise NotImplementedError

    def moved_bytes(self) -> float:
        """Bytes that have to be read and written, at least."""
        raise NotImplementedError

    def backends(self, operation: Operation) -> list[Backend]:
        """The backends to measure here: all that are for this device except the reference."""
        return [each for each in operation.backends[:-1] if self.device in (each.devices or (self.device,))]


@dataclass(frozen=True, kw_only=True)
class MLSTM(Case):
    """The mLSTM over whole sequences."""

    B: int
    T: int
    H: int
    K: int
    V: int
    attention_heads: int
    """Heads of the attention that it is compared with, of `attention_dim` units each."""
    attention_dim: int

    operation = "mlstm"

    @property
    def sizes(self) -> str:
        return f"B {self.B} H {self.H} T {self.T} K {self.K} V {self.V}"

    def inputs(self) -> list[Tensor]:
        return mlstm_inputs(self.device, self.dtype, B=self.B, T=self.T, H=self.H, K=self.K, V=self.V)

    def own(self, inputs: list[Tensor]) -> Iterator[tuple[str, Contender]]:
        for backend in self.backends(mlstm_ops.MLSTM):
            if not backend.one_step:
                function = functools.partial(mlstm_ops.mlstm, backend=backend.name)
                yield f"mlstm / {backend.name}", Contender(function, inputs, self.checks(inputs))

    def checks(self, inputs: list[Tensor]) -> list[Check]:
        """Against the definition on the first tokens, and on a GPU also a head over all tokens, against the chunkwise
        form in float64, which the tests hold to the definition: that one is far too slow there."""
        definition = functools.partial(mlstm_ops.mlstm, backend="recurrence")
        checks = [Check(definition, [each[:1, :CHECKED_TOKENS, :2] for each in inputs])]
        if self.device == "cuda" and self.T > CHECKED_TOKENS:
            whole = functools.partial(mlstm_ops.mlstm, backend="chunkwise")
            checks.append(Check(whole, [each[:1, :, :1] for each in inputs]))
        return checks

    def operations(self) -> float:
        return mlstm_ops.MLSTM.cost(B=self.B, T=self.T, H=self.H, K=self.K, V=self.V).flops

    def moved_bytes(self) -> float:
        read, gates, written = 2 * self.K + self.V, 2 * 4, self.V
        size = self.dtype.itemsize
        forward = size * (read + written) + gates
        backward = size * (read + 2 * written + read) + 2 * gates  # h and dh are read too
        return self.B * self.T * self.H * (forward + (backward if self.backward else 0))


@dataclass(frozen=True, kw_only=True)
class SLSTM(Case):
    """The sLSTM over whole sequences."""

    B: int
    T: int
    H: int
    D: int

    operation = "slstm"

    @property
    def sizes(self) -> str:
        return f"B {self.B} T {self.T} {self.H} heads of {self.D}"

    def inputs(self) -> list[Tensor]:
        return slstm_inputs(self.device, self.dtype, B=self.B, T=self.T, H=self.H, D=self.D)

    def own(self, inputs: list[Tensor]) -> Iterator[tuple[str, Contender]]:
        for backend in self.backends(slstm_ops.SLSTM):
            function = functools.partial(slstm_ops.slstm, backend=backend.name)
            yield f"slstm / {backend.name}", Contender(function, inputs, self.checks(inputs))
        width = self.H * self.D
        x = torch.randn(self.B, self.T, width, device=self.device, dtype=self.dtype)
        weight = width**-0.5 * torch.randn(4 * width, width, device=self.device, dtype=self.dtype)
        whole = [x, weight, *inputs[1:]]
        definition = functools.partial(self.with_projection, backend="recurrence")
        checks = [Check(definition, [x[:1, :CHECKED_TOKENS], *whole[1:]])]
        operations = self.operations() + 2 * self.B * self.T * 4 * width**2
        yield "slstm and its input projection", Contender(self.with_projection, whole, checks, operations=operations)

    def with_projection(self, x: Tensor, weight: Tensor, r: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
        """The task of torch.nn.LSTM: the product with the input's weight, then the recurrence."""
        return slstm_ops.slstm(F.linear(x, weight).unflatten(-1, (4, self.H, self.D)), r, bias, backend=backend)

    def checks(self, inputs: list[Tensor]) -> list[Check]:
        """Against the definition on the first tokens."""
        definition = functools.partial(slstm_ops.slstm, backend="recurrence")
        return [Check(definition, [inputs[0][:2, :CHECKED_TOKENS], *inputs[1:]])]

    def operations(self) -> float:
        return slstm_ops.SLSTM.cost(B=self.B, T=self.T, H=self.H, D=self.D).flops

    def moved_bytes(self) -> float:
        token, weights = 5 * self.H * self.D, 4 * self.H * (self.D**2 + self.D)
        passes = 3 if self.backward else 1  # backward: wx, y and dy read, dwx written
        return self.dtype.itemsize * (self.B * self.T * token * passes + weights * passes)


@dataclass(frozen=True, kw_only=True)
class GatedDelta(Case):
    """The gated delta rule over whole sequences."""

    B: int
    T: int
    H: int
    K: int
    V: int

    operation = "gated delta"

    @property
    def sizes(self) -> str:
        return f"B {self.B} H {self.H} T {self.T} K {self.K} V {self.V}"

    def inputs(self) -> list[Tensor]:
        *inputs, _ = gated_delta_inputs(self.device, self.dtype, B=self.B, T=self.T, H=self.H, K=self.K, V=self.V)
        return inputs

    def own(self, inputs: list[Tensor]) -> Iterator[tuple[str, Contender]]:
        for backend in self.backends(GATED_DELTA):
            function = functools.partial(gated_delta, backend=backend.name)
            yield f"gated_delta / {backend.name}", Contender(function, inputs, self.checks(inputs))

    def checks(self, inputs: list[Tensor]) -> list[Check]:
        """Against the definition on the first tokens."""
        definition = functools.partial(gated_delta, backend="recurrence")
        return [Check(definition, [each[:1, :CHECKED_TOKENS, :2] for each in inputs])]

    def _cost(self) -> Cost:
        return GATED_DELTA.cost(B=self.B, T=self.T, H=self.H, K=self.K, V=self.V, itemsize=self.dtype.itemsize)

    def operations(self) -> float:
        return self._cost().flops

    def moved_bytes(self) -> float:
        return self._cost().moved_bytes * (3 if self.backward else 1)


@dataclass(frozen=True, kw_only=True)
class MLSTMStep(Case):
    """One token of the mLSTM in generation: the state read and written, in place where a backend can."""

    B: int
    H: int
    K: int
    V: int
    backward: bool = False

    operation = "mlstm step"

    @property
    def sizes(self) -> str:
        return f"B {self.B} H {self.H} K {self.K} V {self.V}, one token"

    def inputs(self) -> list[Tensor]:
        B, H, K, V = self.B, self.H, self.K, self.V
        state = [torch.randn(shape, device=self.device) for shape in ((B, H, K, V), (B, H, K))]
        stabilizer = torch.zeros(B, H, device=self.device)
        return [*mlstm_inputs(self.device, self.dtype, B=B, T=1, H=H, K=K, V=V), *state, stabilizer]

    def own(self, inputs: list[Tensor]) -> Iterator[tuple[str, Contender]]:
        for backend in self.backends(mlstm_ops.MLSTM):
            if backend.one_step:
                step = functools.partial(_step, backend.name)
                yield f"mlstm / {backend.name}", Contender(step, inputs, self.checks(inputs))

    def checks(self, inputs: list[Tensor]) -> list[Check]:
        """Against the definition, on a copy because steps overwrite the state."""
        return [Check(functools.partial(_step, "recurrence"), [each.clone() for each in inputs])]

    def operations(self) -> float:
        return self.B * self.H * 5 * self.K * self.V

    def moved_bytes(self) -> float:
        state = 2 * 4 * (self.K * self.V + self.K + 1)
        return self.B * self.H * (state + self.dtype.itemsize * (2 * self.K + 2 * self.V))


def _step(backend: str, *inputs: Tensor) -> Tensor:
    *token, C, n, m = inputs
    options = {"initial_state": (C, n, m), "return_state": True, "overwrite_state": True}
    return mlstm_ops.mlstm(*token, backend=backend, **options)[0]


def cpu_cases(lengths: list[int], dtype: torch.dtype) -> Iterator[Case]:
    """mLSTM beside attention of head dimension 64 at the same B, H and T; sLSTM beside an LSTM of its width; the gated
    delta rule beside the one in transformers."""
    for T in lengths:
        sizes = {"B": 2, "T": T, "H": 4, "K": 64, "V": 128, "attention_heads": 4, "attention_dim": 64}
        yield MLSTM(device="cpu", dtype=dtype, **sizes)
    for B, backward in ((8, True), (1, False)):
        yield SLSTM(device="cpu", dtype=dtype, backward=backward, B=B, T=512, H=4, D=64)
    for K in (24, 64):
        yield GatedDelta(device="cpu", dtype=dtype, B=8, T=512, H=4, K=K, V=2 * K)
    yield MLSTMStep(device="cpu", dtype=dtype, B=8, H=4, K=64, V=128)


def gpu_cases(lengths: list[int], dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    """The published sizes: mLSTM at model width 4096 and a constant number of tokens, sLSTM at width 768, decoding.

    What matters most comes first, for a run may be short of time.
    """

    def mlstm(H: int, K: int, T: int, backward: bool = True) -> MLSTM:
        heads = {"attention_heads": H * K // 64, "attention_dim": 128}
        return MLSTM(
            device="cuda", dtype=dtype, backward=backward, B=max(1, tokens // T), T=T, H=H, K=K, V=2 * K, **heads
        )

    heads = ((8, 256), (16, 128), (32, 64))
    first = min(lengths, key=lambda T: abs(T - 8192))
    for H, K in heads:
        yield mlstm(H, K, first)
    for D in (64, 128, 256):
        for backward in (True, False):
            yield SLSTM(device="cuda", dtype=dtype, backward=backward, B=16, T=1024, H=768 // D, D=D)
    for B in (64, 8, 1):
        yield MLSTMStep(device="cuda", dtype=dtype, B=B, H=8, K=256, V=512)
    for H, K in heads:
        yield mlstm(H, K, first, backward=False)
    for T in sorted(set(lengths) - {first}):
        for H, K in heads:
            yield mlstm(H, K, T)
