"""Which implementation of an operator runs where, and why another would not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an implementation needs to know to say whether it can run."""

    platform: str
    """`cpu`, `gpu` or `tpu`."""
    shape: tuple[int, int, int, int, int]
    """B, T, H, N (key size) and M (value size); WKV-4 has C heads of size 1."""
    dtype: str
    """Dtype in which the recurrence runs: float32 or float64."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operator."""

    run: Callable[..., tuple[jax.Array, Any]]
    """The function; its arguments are checked, its state is given, and time is of any length."""
    refuses: Callable[[Problem], str | None]
    """The reason why this problem cannot be run, or None."""


class Operator(Protocol):
    """What the package needs to know of an operator to explain it."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def implementations(self) -> Mapping[str, Implementation]:
        """Every way to compute it, by name."""
        ...

    @property
    def preferred(self) -> Callable[[Problem], tuple[str, ...]]:
        """Names in the order in which `None` tries them; docs/operators.md says what was measured where."""
        ...


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What would run a problem, and why the other implementations would not; `str` is for people."""

    operator: str
    problem: Problem
    chosen: str
    """The implementation that `implementation=None` takes."""
    refusals: Mapping[str, str | None]
    """For each implementation the reason why it cannot run, or None where it can."""

    def __str__(self) -> str:
        """One line an implementation."""
        sizes = " ".join(f"{letter}{size}" for letter, size in zip("BTHNM", self.problem.shape, strict=True))
        lines = [f"{self.operator} {sizes} {self.problem.dtype} on {self.problem.platform}:"]
        for name, refusal in self.refusals.items():
            verdict = f"cannot: {refusal}" if refusal else "taken" if name == self.chosen else "can, if named"
            lines.append(f"  {name:<16} {verdict}")
        return "\n".join(lines)


def default_order(problem: Problem) -> tuple[str, ...]:
    """Names in the order in which `None` tries them, from what was measured on CPUs; kernels run only when named."""
    return ("scan", "chunked") if problem.shape[1] == 1 else ("chunked", "scan")


def anything(problem: Problem) -> None:
    """Refuses no problem."""


def choose(
    operator: str,
    implementations: Mapping[str, Implementation],
    preferred: tuple[str, ...],
    problem: Problem,
    requested: str | Implementation | None,
) -> Implementation:
    """The implementation that is asked for, or the first preferred one that can run.

    Args:
      preferred: names in the order to try; an implementation that is not among them runs on request only.
      requested: a name, None, or an implementation of one's own.

    Raises:
      ValueError: the name is unknown, or that implementation cannot run the problem; nothing else is taken silently.
    """
    if requested is None:
        return implementations[_first_able(implementations, preferred, problem)]
    if isinstance(requested, Implementation):
        name, chosen = "the given one", requested
    elif requested in implementations:
        name, chosen = repr(requested), implementations[requested]
    else:
        raise ValueError(f"implementation = {requested!r}: {operator} has {', '.join(implementations)}")
    if refusal := chosen.refuses(problem):
        able = _first_able(implementations, preferred, problem)
        raise ValueError(f"implementation = {name}: {operator} cannot run it here: {refusal}; use {able!r}")
    return chosen


def _first_able(implementations: Mapping[str, Implementation], preferred: tuple[str, ...], problem: Problem) -> str:
    return next(name for name in preferred if implementations[name].refuses(problem) is None)


def explain(
    operator: str, implementations: Mapping[str, Implementation], preferred: tuple[str, ...], problem: Problem
) -> Explanation:
    """What would run the problem, and why the others would not."""
    refusals = {name: implementation.refuses(problem) for name, implementation in implementations.items()}
    return Explanation(operator, problem, _first_able(implementations, preferred, problem), refusals)
