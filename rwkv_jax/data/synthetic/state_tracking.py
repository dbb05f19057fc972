"""Tasks that follow a state: each input changes it, and the label of every input is the state after it.

One layer whose transitions have no eigenvalue below zero follows none of them at any length (arXiv 2411.12537); a
Transformer or a diagonal recurrence of fixed depth does not follow the word problem of S5 (arXiv 2404.08819).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import math
from typing import ClassVar, Literal

import numpy as np
from typing_extensions import override

from rwkv_jax.data.synthetic.draws import Draws
from rwkv_jax.data.synthetic.task import BEGIN, Task
from rwkv_jax.data.tokens.rows import Rows

_FIRST = 1  # id of the first symbol: state 0


@dataclasses.dataclass(frozen=True)
class _StateTracking(Task):
    """T - 1 inputs after end_of_text, all scored; inputs and states have the same symbols."""

    labels: ClassVar[bool] = True

    @abc.abstractmethod
    def _draw_inputs(self, draws: Draws, count: int) -> np.ndarray:
        """Inputs, integers [n, count]."""

    @abc.abstractmethod
    def _states(self, inputs: np.ndarray) -> np.ndarray:
        """The state after each input, [n, count]."""

    @property
    @override
    def min_length(self) -> int:
        return 2

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        inputs = self._draw_inputs(draws, length)  # the last one is the row's T + 1st token, which no model reads
        tokens = np.concatenate([np.full((draws.num_rows, 1), BEGIN), _FIRST + inputs], axis=1).astype(np.int32)
        targets = tokens[:, :-1].copy()
        targets[:, 1:] = _FIRST + self._states(inputs[:, :-1])
        mask = np.ones(targets.shape, np.float32)
        mask[:, 0] = 0
        return Rows(tokens, mask, targets)


@dataclasses.dataclass(frozen=True)
class ModularAddition(_StateTracking):
    """Running sums of random numbers, modulo m. With T = 3 it is the sum of two numbers.

    Chance: one of m states, which are equally likely.
    """

    name: ClassVar[str] = "modular_addition"

    modulus: int = 5
    """m."""

    def __post_init__(self) -> None:
        self.require(2 <= self.modulus <= 2**16, "modulus", "must lie in 2 to 65536")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.modulus)))

    @override
    def _draw_inputs(self, draws: Draws, count: int) -> np.ndarray:
        return draws.integers(self.modulus, count)

    @override
    def _states(self, inputs: np.ndarray) -> np.ndarray:
        return np.cumsum(inputs, axis=1) % self.modulus

    @override
    def chance(self, length: int) -> float:
        return 1 / self.modulus


@dataclasses.dataclass(frozen=True)
class Parity(_StateTracking):
    """Whether the number of ones so far is odd.

    Chance: one half.
    """

    name: ClassVar[str] = "parity"

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return ("0", "1")

    @override
    def _draw_inputs(self, draws: Draws, count: int) -> np.ndarray:
        return draws.integers(2, count)

    @override
    def _states(self, inputs: np.ndarray) -> np.ndarray:
        return np.cumsum(inputs, axis=1) % 2

    @override
    def chance(self, length: int) -> float:
        return 0.5


@dataclasses.dataclass(frozen=True)
class WordProblem(_StateTracking):
    """Products of permutations: the order of some items after each rearrangement; the word problem of S3 to S6.

    Symbols are orders, such as 21345. The input 21345 puts the second item first, and the first one second.

    Chance: the likeliest order at each position, without having read the inputs. It is above 1 / items! where few swaps
    have been made yet.
    """

    name: ClassVar[str] = "word_problem"

    items: int = 5
    """Number of items: 5 is S5, with 120 orders."""
    inputs: Literal["swaps", "all"] = "swaps"
    """Inputs, all equally likely: swaps of two items and the order that changes nothing, 11 for S5; or all orders."""

    def __post_init__(self) -> None:
        self.require(2 <= self.items <= 6, "items", "must lie in 2 to 6")
        self.require(self.inputs in ("swaps", "all"), "inputs", "must be swaps or all")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return tuple("".join(str(item + 1) for item in order) for order in _orders(self.items).tolist())

    @override
    def _draw_inputs(self, draws: Draws, count: int) -> np.ndarray:
        generators = self._generators()
        return generators[draws.integers(len(generators), count)]

    @override
    def _states(self, inputs: np.ndarray) -> np.ndarray:
        products = _products(self.items)
        states, state = np.empty_like(inputs), np.zeros(len(inputs), np.int64)
        for step in range(inputs.shape[1]):
            states[:, step] = state = products[state, inputs[:, step]]
        return states

    @override
    def chance(self, length: int) -> float:
        if self.inputs == "all":
            return 1 / math.factorial(self.items)
        reached = _products(self.items)[:, self._generators()]  # [orders, inputs]
        probability, best = np.zeros(len(reached)), []
        probability[0] = 1
        for _ in range(length - 1):
            after = np.zeros_like(probability)
            np.add.at(after, reached, probability[:, None] / reached.shape[1])
            probability = after
            best.append(probability.max())
        return float(np.mean(best))

    def _generators(self) -> np.ndarray:
        """Indices of the orders that may be inputs."""
        orders = _orders(self.items)
        moved = (orders != np.arange(self.items)).sum(axis=1)
        return np.flatnonzero(moved <= (2 if self.inputs == "swaps" else self.items))


@functools.cache
def _orders(items: int) -> np.ndarray:
    """All orders of the items, [items!, items]; the first one is the identity."""
    return np.array(list(itertools.permutations(range(items))))


@functools.cache
def _products(items: int) -> np.ndarray:
    """[state, input] -> the state after it; indices of orders, [items!, items!]."""
    orders = _orders(items)
    places = items ** np.arange(items)[::-1]  # orders as numbers, which grow with the index
    after = orders[:, orders] @ places  # [state, input]: order[state][order[input]]
    return np.searchsorted(orders @ places, after)
