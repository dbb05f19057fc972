"""Chooses an operator's implementation, and explains the choice."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from rwkv_kernels.chunking import is_power_of_two


@dataclasses.dataclass(frozen=True)
class Problem:
    """What decides whether an implementation can run."""

    platform: str
    """`cpu`, `gpu` or `tpu`."""
    shape: tuple[int, int, int, int, int]
    """B, T, H, N and M; WKV-4 has C heads of size 1."""
    dtype: str
    """Dtype of the recurrence: float32 or float64."""
    device_kind: str | None = None
    """What JAX calls the device, such as `NVIDIA H100 80GB HBM3` or `TPU v5 lite`; None if it is not known."""

    def __str__(self) -> str:
        """Such as `B8 T4096 H64 N64 M64 float32 on gpu (NVIDIA H100 80GB HBM3)`."""
        sizes = " ".join(f"{letter}{size}" for letter, size in zip("BTHNM", self.shape, strict=True))
        kind = "" if self.device_kind in (None, self.platform) else f" ({self.device_kind})"
        return f"{sizes} {self.dtype} on {self.platform}{kind}"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operator."""

    run: Callable[..., Any]
    """The function; its arguments are checked, its state is never None, T is at least 1. An operator's returns y
    and the final state."""
    refuses: Callable[[Problem], str | None]
    """Why a problem cannot be run, or None."""
    min_chunk_size: int | None = None
    """The smallest `chunk_size` that `run` takes, a power of two; None if it has no chunks, or of one size."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation would run, and why others cannot; `str` gives a table."""

    operator: str
    problem: Problem
    chosen: str
    """The one that `implementation=None` takes, or the one that was measured to be the fastest."""
    refusals: Mapping[str, str | None]
    """For each implementation the reason why it cannot run, or None."""
    is_measured: bool = False
    """Whether the choice is by a measurement; otherwise by the table in docs/operators.md."""

    def __str__(self) -> str:
        """One line per implementation."""
        lines = [f"{self.operator} {self.problem}:"]
        width = max(map(len, self.refusals))
        for name, refusal in self.refusals.items():
            taken = "taken, as measured" if self.is_measured else "taken, by the table"
            verdict = f"cannot: {refusal}" if refusal else taken if name == self.chosen else "can, if named"
            lines.append(f"  {name.ljust(width)} {verdict}")
        return "\n".join(lines)


def default_order(problem: Problem) -> tuple[str, ...]:
    """Order that `implementation=None` tries, as measured on CPUs; kernels only run when named, as one that was
    measured is."""
    return ("scan", "chunked") if problem.shape[1] == 1 else ("chunked", "scan")


def problem_here(shape: tuple[int, int, int, int, int], dtype: str) -> Problem:
    """The problem on JAX's default backend."""
    return Problem(jax.default_backend(), shape, dtype, jax.devices()[0].device_kind)


def on_first_use(path: str) -> Callable[..., Any]:
    """The function at MODULE:NAME, imported when it is called: most users never need a kernel backend."""

    def run(*inputs: Any, **options: Any) -> Any:
        module, _, name = path.partition(":")
        return getattr(importlib.import_module(module), name)(*inputs, **options)

    return run


def anything(problem: Problem) -> None:
    """Refuses no problem."""


def refuse_unless(platform: str, device: str) -> Callable[[Problem], str | None]:
    """Refuses other platforms and float64."""

    def refuses(problem: Problem) -> str | None:
        if problem.platform != platform:
            return f"it needs {device}, and this is {problem.platform}"
        if problem.dtype != "float32":
            return f"it computes in float32, and an argument is {problem.dtype}"
        return None

    return refuses


unless_nvidia = refuse_unless("gpu", "an NVIDIA GPU")
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
"""In the names of GPUs of compute capability 9.0."""


def unless_hopper(largest_head: int) -> Callable[[Problem], str | None]:
    """Refuses all but NVIDIA Hopper, heads of more than a size, and float64."""

    def refuses(problem: Problem) -> str | None:
        if refusal := refuse_unless("gpu", "an NVIDIA Hopper GPU")(problem):
            return refusal
        if not _HOPPER.search(problem.device_kind or ""):
            return f"it needs an NVIDIA Hopper GPU, such as H100, and this is {problem.device_kind or 'an unnamed GPU'}"
        if max(problem.shape[3:]) > largest_head:
            return f"its heads have at most {largest_head} keys and values, and these {max(problem.shape[3:])}"
        return None

    return refuses


unless_tpu = refuse_unless("tpu", "a TPU")


def choose(
    operator: str,
    implementations: Mapping[str, Implementation],
    preferred: tuple[str, ...],
    problem: Problem,
    requested: str | Implementation | None,
    chunk_size: int | None = None,
) -> Implementation:
    """The requested implementation, or the first preferred one that can run.

    Args:
      preferred: names in the order to try; any other implementation runs on request only.
      requested: a name, None, or an `Implementation`.
      chunk_size: None is the implementation's own; otherwise those without chunks are not tried.

    Raises:
      ValueError: an unknown name, or the requested implementation cannot run the problem or has no chunks of that size;
        there is no fallback.
    """
    if requested is None:
        if chunk_size is not None:
            preferred = tuple(name for name in preferred if implementations[name].min_chunk_size is not None)
        name = _first_able(implementations, preferred, problem)
        _check_chunk_size(operator, repr(name), implementations[name], chunk_size)
        return implementations[name]
    if isinstance(requested, Implementation):
        name, chosen = "the given one", requested
    elif requested in implementations:
        name, chosen = repr(requested), implementations[requested]
    else:
        raise ValueError(f"implementation = {requested!r}: {operator} has {', '.join(implementations)}")
    if refusal := chosen.refuses(problem):
        able = _first_able(implementations, preferred, problem)
        raise ValueError(f"implementation = {name}: {operator} cannot run it here: {refusal}; use {able!r}")
    _check_chunk_size(operator, name, chosen, chunk_size)
    return chosen


def _check_chunk_size(operator: str, name: str, chosen: Implementation, chunk_size: int | None) -> None:
    if chunk_size is None:
        return
    smallest = chosen.min_chunk_size
    if smallest is None:
        raise ValueError(
            f"chunk_size = {chunk_size}: {name} of {operator} has no chunks to choose; leave chunk_size out or name "
            "another implementation, such as 'chunked'"
        )
    if not isinstance(chunk_size, int) or chunk_size < smallest or not is_power_of_two(chunk_size):
        raise ValueError(
            f"chunk_size = {chunk_size}: must be a power of two of at least {smallest} for {name} of {operator}"
        )


def _first_able(implementations: Mapping[str, Implementation], preferred: tuple[str, ...], problem: Problem) -> str:
    return next(name for name in preferred if implementations[name].refuses(problem) is None)


def explain(
    operator: str,
    implementations: Mapping[str, Implementation],
    preferred: tuple[str, ...],
    problem: Problem,
    measured: str | None = None,
) -> Explanation:
    """Explains which implementation would run the problem, and why others cannot.

    Args:
      measured: the fastest one, if that is known.

    Raises:
      ValueError: the measured one is unknown, or cannot run the problem.
    """
    refusals = {name: implementation.refuses(problem) for name, implementation in implementations.items()}
    if measured is None:
        return Explanation(operator, problem, _first_able(implementations, preferred, problem), refusals)
    choose(operator, implementations, preferred, problem, measured)
    return Explanation(operator, problem, measured, refusals, is_measured=True)


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """The implementations of a function that is no operator over time."""

    name: str
    implementations: Mapping[str, Implementation]
    """By name."""
    order: tuple[str, ...]
    """Names in the order that `implementation=None` tries; the first one is the definition."""
    axes: Mapping[str, str]
    """Axes of the arguments but the state, by name: "B T H N", "B H N" or "H N"."""

    def preferred(self, problem: Problem) -> tuple[str, ...]:
        """The order for a problem, which is the same for all."""
        del problem
        return self.order

    def choose(self, problem: Problem, requested: str | Implementation | None) -> Implementation:
        """As `choose`."""
        return choose(self.name, self.implementations, self.order, problem, requested)
