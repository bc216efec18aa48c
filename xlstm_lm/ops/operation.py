"""Operations that describe themselves, and the one choice among their backends.

An `Operation` lists its backends from the fastest to the reference, which defines the right values. `choose` picks the
first backend that accepts a call, `verify` compares a backend with the reference, and `refuse` withdraws one for the
rest of the process. Backends are loaded on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.errors import first_line
from xlstm_lm.base.tracing import constant_result
from xlstm_lm.ops.backend import IN_EXPORT, Backend, Call, Choice, Cost, Expected, Sample, resolve
from xlstm_lm.ops.compiling import needs_gradient
from xlstm_lm.ops.selfcheck import TOLERANCE, Checked, compare, undisturbed

INSTALL = {"triton": "Triton is not installed (pip install 'xlstm-lm[gpu]')"}
"""Reasons, with the remedy, for packages that xlstm-lm installs on request; others are named alone."""
TENSORS = {"cpu": "CPU", "cuda": "GPU"}


@dataclass(eq=False, kw_only=True)
class Operation:
    """A function of tensors with several backends."""

    name: str
    title: str
    """Name in a sentence, such as "the mLSTM"."""
    subject: str
    """Name of the first input, whose device and type count."""
    backends: tuple[Backend, ...]
    """From the fastest to the reference."""
    samples: Callable[[Call, str], Iterator[Sample]]
    """Function that yields inputs on which to check the named backend for a call; its caller seeds the random state."""
    run: Callable[[Backend, Sample], Checked]
    """A loaded backend as a function of a sample's inputs."""
    cost: Callable[..., Cost]
    """Function of the sizes."""
    kept: Callable[..., float] = lambda **sizes: 0.0
    """Function of the sizes, of `device` (its type) and of `itemsize`: bytes that stay for the backward pass for each
    token, beside inputs and output."""
    identity: str = ""
    """Letters of the sizes for which a refusal holds."""
    examples: tuple[dict[str, int], ...] = ({},)
    """Sizes to check without a model."""
    gpu_examples: tuple[dict[str, int], ...] = ()
    """Further ones on a GPU, for which its kernels are made."""
    options: Hashable = ()
    """Options of the examples."""

    def __post_init__(self) -> None:
        self.by_name = {backend.name: backend for backend in self.backends}

        @constant_result
        def pick(backend: str, *of_call: Any, **sizes: int) -> str:
            """The name of the backend for a call, loaded. torch.compile can hold each of the arguments constant."""
            device, dtype, options, *others = of_call
            call = Call(device, dtype, tuple(sorted(sizes.items())), options, *others)
            chosen = choose(self, call, backend).backend
            self.by_name[chosen].load()
            for record in _RECORDS:
                if chosen not in record.setdefault(self.name, []):
                    record[self.name].append(chosen)
            return chosen

        self.pick = pick

    def __getitem__(self, name: str) -> Backend:
        return self.by_name[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all backends."""
        return tuple(self.by_name)

    @property
    def reference(self) -> str:
        """Name of the backend that defines the right values."""
        return self.backends[-1].name

    def backend_for(
        self,
        inputs: Sequence[Tensor | None],
        backend: str = "auto",
        *,
        options: Hashable = (),
        has_resets: bool = False,
        one_step: bool = False,
        **sizes: int,
    ) -> Backend:
        """The backend, loaded, for a call with these inputs. The first one, a tensor, gives the device and the type.

        Raises:
            ValueError: there is no such backend, or the one named does not accept the call.
        """
        first = inputs[0]
        assert first is not None
        has_float64 = any(each is not None and each.dtype == torch.float64 for each in inputs)
        chosen = self.pick(
            backend,
            first.device,
            torch.float64 if has_float64 else first.dtype,
            options,
            needs_gradient(*inputs),
            has_resets,
            one_step,
            torch.compiler.is_exporting(),
            **sizes,
        )
        return self.by_name[chosen]


_REFUSED: dict[Hashable, str] = {}
_RECORDS: list[dict[str, list[str]]] = []


def _why_absent(backend: Backend) -> str | None:
    """The reason why a backend's source is not here; None if it is."""
    if IN_EXPORT and isinstance(backend.function, str):
        try:
            resolve(backend.function)
        except (ImportError, AttributeError):
            announce_once("xlstm-lm is not installed, so this model runs in plain PyTorch, which is slower")
            return Expected("it comes with xlstm-lm, which is not installed, or in another version")
    return None


def choose(operation: Operation, call: Call, backend: str = "auto") -> Choice:
    """The backend for a call: the one named, unless it was refused; else the first that accepts the call.

    A backend that is checked on this device is verified before its first use. A slower path is announced once. Answers
    are kept for the process.

    Raises:
        ValueError: there is no such backend, or the one named does not accept the call.
    """
    if backend == "auto":
        return _first_that_accepts(operation, call)
    if backend not in operation.names:
        known = ", ".join(map(repr, operation.names))
        raise ValueError(f"unknown {operation.name} backend {backend!r}: choose 'auto' or one of {known}")
    reason = why_impossible(operation, operation[backend], call)
    if reason is not None:
        raise ValueError(f"the {operation.name} backend {backend!r} cannot compute this: {reason}; choose 'auto'")
    refused = refusal(operation, backend, call)
    if refused is None:
        return Choice(backend)
    chosen = _first_that_accepts(operation, call)
    return Choice(chosen.backend, tuple(dict(((backend, refused), *chosen.passed_over)).items()))


@functools.cache
def _first_that_accepts(operation: Operation, call: Call) -> Choice:
    passed_over: dict[str, str] = {}
    failed = False
    for backend in operation.backends:
        if backend.name == operation.reference:
            break
        reason = why_not(operation, backend, call)
        if reason is None and call.device.type in backend.checked_on:
            reason = verdict(operation, backend.name, call)
            failed = failed or reason is not None
        if reason is None:
            break
        passed_over[backend.name] = reason
    _announce(operation, call, backend, passed_over, failed)
    return Choice(backend.name, tuple(passed_over.items()))


def _announce(operation: Operation, call: Call, backend: Backend, passed_over: dict[str, str], failed: bool) -> None:
    """Log that a slower backend runs, or that one failed its check, with the reasons."""
    kind = call.device.type
    slow = backend.slow is not None and kind not in (*backend.fast_on, "meta") and not call.exporting
    notable = [f"`{name}`: {reason}" for name, reason in passed_over.items() if not isinstance(reason, Expected)]
    if slow and not any(kind in (operation[name].devices or ()) for name in passed_over):
        notable.append(f"there is no faster backend for {kind}")
    if notable and (slow or failed):
        how = f"{backend.slow} (`{backend.name}`), which is slower," if slow else f"by `{backend.name}`"
        announce_once(f"{operation.title} runs {how} {call}: {'; '.join(notable)}")


def why_not(operation: Operation, backend: Backend, call: Call) -> str | None:
    """The reason why a backend is not chosen for a call; None if nothing but a check is in its way."""
    if (backend.one_step and not call.one_step) or (call.needs_gradient and not backend.gradients):
        return Expected("it computes a single step without gradient")
    if call.exporting and not backend.exports(call):
        return Expected("torch.export cannot trace it into a program that runs anywhere")
    refused = refusal(operation, backend.name, call)
    if refused is not None:
        return Expected(refused)
    unsuited = backend.unsuited(call)
    if unsuited is not None:
        return Expected(unsuited)
    reason = why_impossible(operation, backend, call)
    if reason is None and backend.dtypes is not None and call.dtype not in backend.dtypes:
        return f"it accepts {', '.join(map(str, backend.dtypes))}, not {call.dtype}"
    if reason is None and backend.native:
        return resolve("xlstm_lm.ops.native:why_no_kernels")()
    return reason


def why_impossible(operation: Operation, backend: Backend, call: Call) -> str | None:
    """The reason why a backend cannot compute a call even where it is named; None if there is none.

    A backend may still reject the call with a message of its own, for a type for example.
    """
    devices = backend.devices
    if devices is not None and call.device.type not in devices and not _interpreted(backend):
        tensors = " or ".join(TENSORS[kind] for kind in devices)
        return Expected(f"it takes {tensors} tensors, but {operation.subject} is on {call.device}")
    if backend.package is not None and importlib.util.find_spec(backend.package) is None:
        return INSTALL.get(backend.package, f"{backend.package} is not installed")
    absent = _why_absent(backend)
    if absent is not None or backend.limits is None:
        return absent
    return (resolve(backend.limits) if isinstance(backend.limits, str) else backend.limits)(call)


def _interpreted(backend: Backend) -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    if backend.package != "triton" or importlib.util.find_spec("triton") is None:
        return False
    # Not an import: this file goes with exports, and transformers refuses code whose imports are not installed.
    return importlib.import_module("triton").knobs.runtime.interpret


def verify(operation: Operation, backend: str, call: Call) -> str | None:
    """How a backend fails for a call: it does not run, or values or gradients are wrong; None if all is right.

    Each sample is compared with its definition in float64: values, gradients of all inputs, and states. The random
    state, the grad mode and saved-tensor hooks of the caller have no effect and stay as they are.
    """
    tolerance = TOLERANCE.get(call.dtype, 1e-9)
    with undisturbed(call.device):
        try:
            for sample in operation.samples(call, backend):
                error = error_of(operation, backend, sample)
                if not error <= tolerance:
                    return f"its values or gradients are wrong (error {error:.1e}, allowed {tolerance:.0e})"
        except Exception as caught:  # anything that a compiler, an assembler or a driver raises
            return f"it does not run ({first_line(caught)})"
    return None


def error_of(operation: Operation, backend: str, sample: Sample) -> float:
    """The largest error of a backend on a sample, relative to the largest entry of each right value or gradient."""
    checked, exact = operation[backend], operation[sample.against]
    checked.load()
    exact.load()
    function, definition = operation.run(checked, sample), operation.run(exact, sample)
    return compare(function, definition, sample.inputs, gradients=checked.gradients)


def verdict(operation: Operation, backend: str, call: Call) -> str | None:
    """`verify`, once a process for all calls that run the same compiled code."""
    call = call._replace(needs_gradient=operation[backend].gradients, exporting=False)
    return _verdict(operation, backend, operation[backend].same_code(call))


_verdict = functools.cache(verify)


def refuse(operation: Operation, backend: str, call: Call, reason: str) -> None:
    """Withdraw a backend for the rest of the process, for calls on such a device with such options and head sizes.

    The reference cannot be refused.
    """
    assert backend != operation.reference
    _REFUSED[_refusal_key(operation, backend, call)] = reason
    _first_that_accepts.cache_clear()


def refusal(operation: Operation, backend: str, call: Call) -> str | None:
    """The reason given to `refuse`; None if the backend was not refused for such calls."""
    return _REFUSED.get(_refusal_key(operation, backend, call))


def _refusal_key(operation: Operation, backend: str, call: Call) -> Hashable:
    identity = tuple(size for letter, size in call.sizes if letter in operation.identity)
    return operation, backend, call.device.type, identity, call.options


def forget() -> None:
    """Drop all choices, verdicts and refusals of this process."""
    _first_that_accepts.cache_clear()
    _verdict.cache_clear()
    _REFUSED.clear()


@contextlib.contextmanager
def recorded_choices() -> Iterator[dict[str, list[str]]]:
    """Record, by operation, the names of the backends that compute calls while this is entered, in order."""
    record: dict[str, list[str]] = {}
    _RECORDS.append(record)
    try:
        yield record
    finally:
        _RECORDS.remove(record)
