"""Which implementation of an operator runs where, and why another would not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an implementation needs to know to say whether it can run."""

    platform: str
    """`cpu`, `gpu` or `tpu`."""
    shape: tuple[int, int, int, int, int]
    """B, T, H, N (key size) and M (value size)."""
    dtype: str
    """Dtype in which the recurrence runs: float32 or float64."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operator."""

    run: Callable[..., tuple[jax.Array, jax.Array]]
    """The function; its arguments are checked and its state is given."""
    refuses: Callable[[Problem], str | None]
    """The reason why this problem cannot be run, or None."""


def explain(implementations: Mapping[str, Implementation], problem: Problem) -> dict[str, str | None]:
    """For each implementation, None where it can run the problem and otherwise the reason why not."""
    return {name: implementation.refuses(problem) for name, implementation in implementations.items()}


def choose(
    operator: str,
    implementations: Mapping[str, Implementation],
    preferred: tuple[str, ...],
    problem: Problem,
    requested: str | None,
) -> Implementation:
    """The implementation that is asked for, or the first preferred one that can run.

    Raises:
      ValueError: the name is unknown, or that implementation cannot run the problem; nothing else is taken silently.
    """
    refusals = explain(implementations, problem)
    able = [name for name in preferred if refusals[name] is None]
    if requested is None:
        return implementations[able[0]]
    if requested not in implementations:
        raise ValueError(f"implementation = {requested!r}: {operator} has {', '.join(implementations)}")
    if refusals[requested] is not None:
        raise ValueError(
            f"implementation = {requested!r}: {operator} cannot run it here: {refusals[requested]}; use {able[0]!r}"
        )
    return implementations[requested]
