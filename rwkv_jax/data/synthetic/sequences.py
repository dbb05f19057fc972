"""Tasks that write one sequence for another: copying, reversal, selective copying, sorting, addition."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar

import numpy as np
from typing_extensions import override

from rwkv_jax.checks import require
from rwkv_jax.data.synthetic.draws import Draws
from rwkv_jax.data.synthetic.task import BEGIN, BLANK, MARK, SIGNS, Task, rows_of_text
from rwkv_jax.data.tokens.rows import Rows

_FIRST = len(SIGNS) + 1  # id of the first symbol


def _question_and_answer(question: np.ndarray, answer: np.ndarray, length: int) -> Rows:
    """Rows of end_of_text, a question, a mark and its answer, which is scored; two arrays of ids [n, m]."""
    begin, mark = (np.full((len(question), 1), sign) for sign in (BEGIN, MARK))
    tokens = np.concatenate([begin, question, mark, answer], axis=1)
    return rows_of_text(tokens, np.arange(tokens.shape[1]) > question.shape[1] + 1, length)


@dataclasses.dataclass(frozen=True)
class _OfSymbols(Task):
    """n symbols, each drawn from all, a mark, and an answer of the same length: T = 2 n + 1.

    Chance: one of all symbols.
    """

    num_symbols: int = 16
    """Symbols to draw from."""
    count: int | None = None
    """n; None takes as many as there is room for, so that longer rows have longer sequences."""

    def __post_init__(self) -> None:
        self.require_positive("num_symbols", "count")

    @abc.abstractmethod
    def _answer(self, question: np.ndarray) -> np.ndarray:
        """Ids [n, m] of the answers to questions."""

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return (*SIGNS, *(f"s{number}" for number in range(self.num_symbols)))

    @property
    @override
    def min_length(self) -> int:
        return 2 * (self.count or 1) + 1

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        question = _FIRST + draws.integers(self.num_symbols, self.count or (length - 1) // 2)
        return _question_and_answer(question, self._answer(question), length)

    @override
    def chance(self, length: int) -> float:
        return 1 / self.num_symbols


@dataclasses.dataclass(frozen=True)
class Copying(_OfSymbols):
    """Random symbols, a mark, and the symbols again."""

    name: ClassVar[str] = "copying"

    @override
    def _answer(self, question: np.ndarray) -> np.ndarray:
        return question


@dataclasses.dataclass(frozen=True)
class Reversal(_OfSymbols):
    """Random symbols, a mark, and the symbols from last to first."""

    name: ClassVar[str] = "reversal"

    @override
    def _answer(self, question: np.ndarray) -> np.ndarray:
        return question[:, ::-1]


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(Task):
    """Selective copying (arXiv 2312.00752): symbols at random places among blanks, a mark, and the symbols in order.

    Chance: one of all symbols.
    """

    name: ClassVar[str] = "selective_copying"

    num_symbols: int = 16
    """Symbols to draw from."""
    count: int = 8
    """Symbols in a row; the rest are blanks, T - 1 - count of them and of the symbols before the mark."""

    def __post_init__(self) -> None:
        self.require_positive("num_symbols", "count")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return (*SIGNS, *(f"s{number}" for number in range(self.num_symbols)))

    @property
    @override
    def min_length(self) -> int:
        return 2 * self.count + 1

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        answer = _FIRST + draws.integers(self.num_symbols, self.count)
        room = length - 1 - self.count
        question = np.full((draws.num_rows, room), BLANK)
        np.put_along_axis(question, np.sort(draws.distinct(room, self.count), axis=1), answer, axis=1)
        return _question_and_answer(question, answer, length)

    @override
    def chance(self, length: int) -> float:
        return 1 / self.num_symbols


@dataclasses.dataclass(frozen=True)
class Sorting(Task):
    """Different numbers in random order, a mark, and the numbers from smallest to largest: T = 2 n + 1.

    Chance: with the answers before in the row, the likeliest guess without having read the numbers is always the next
    number after the last answer.
    """

    name: ClassVar[str] = "sorting"

    num_values: int = 32
    """Numbers to draw from, 0 to num_values - 1."""
    count: int | None = None
    """n; None takes as many as there is room for."""

    def __post_init__(self) -> None:
        self.require_positive("num_values", "count")
        if self.count is not None:
            self.require(self.count <= self.num_values, "count", f"must not exceed num_values = {self.num_values}")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return (*SIGNS, *map(str, range(self.num_values)))

    @property
    @override
    def min_length(self) -> int:
        return 2 * (self.count or 1) + 1

    @override
    def check_length(self, field: str, length: int) -> None:
        super().check_length(field, length)
        most = 2 * self.num_values + 2
        enough = self.count is not None or length <= most
        require(enough, field, length, f"must not exceed {most}: {self} has no more numbers that differ")

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        numbers = draws.distinct(self.num_values, self.count or (length - 1) // 2)
        return _question_and_answer(_FIRST + numbers, _FIRST + np.sort(numbers, axis=1), length)

    @override
    def chance(self, length: int) -> float:
        size, count = self.num_values, self.count or (length - 1) // 2
        total = count / size  # that the smallest one is 0
        # After `value`, the next one is value + 1 if that is one of those left, out of size - 1 - value.
        for done in range(1, count):
            for value in range(done - 1, size - (count - done)):
                ways = math.comb(value, done - 1) * math.comb(size - 1 - value, count - done)
                total += ways / math.comb(size, count) * (count - done) / (size - 1 - value)
        return total / count


@dataclasses.dataclass(frozen=True)
class Addition(Task):
    """Sums of two numbers of d random digits, such as `1 2 + 9 3 | 1 0 5`: T = 3 d + 3. The sum has d + 1 digits.

    Chance: the likeliest next digit given those of the sum before it, without having read the summands.
    """

    name: ClassVar[str] = "addition"

    digits: int | None = None
    """d; None takes as many as there is room for."""
    reverse_sum: bool = True
    """Write the sum from its lowest digit on, in the order in which carries are known (arXiv 2307.03381)."""

    def __post_init__(self) -> None:
        self.require_positive("digits")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return (*SIGNS, *map(str, range(10)), "+")

    @property
    @override
    def min_length(self) -> int:
        return 3 * (self.digits or 1) + 3

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        count = self.digits or (length - 3) // 3
        first, second = draws.integers(10, count), draws.integers(10, count)
        carry, lowest_first = np.zeros(draws.num_rows, np.int64), []
        for place in reversed(range(count)):
            carry, digit = np.divmod(first[:, place] + second[:, place] + carry, 10)
            lowest_first.append(digit)
        total = np.stack([*lowest_first, carry], axis=1)
        if not self.reverse_sum:
            total = total[:, ::-1]
        plus = np.full((draws.num_rows, 1), len(self.symbols))
        question = np.concatenate([_FIRST + first, plus, _FIRST + second], axis=1)
        return _question_and_answer(question, _FIRST + total, length)

    @override
    def chance(self, length: int) -> float:
        count = self.digits or (length - 3) // 3
        if self.reverse_sum:
            # All digits but the highest are uniform. With n = 10^d and the sum modulo n = r known, r + 1 of the n pairs
            # have no carry.
            carry = _mean_of_larger(10**count)
            return (count / 10 + carry) / (count + 1)
        return float(np.mean([_likeliest_digit(place, count) for place in range(count + 1)]))


_FEW_PLACES = 4


def _mean_of_larger(size: int) -> float:
    """Mean of max(r + 1, size - r - 1) / size over r in range(size), for an even size."""
    half = size // 2
    return (2 * _sum(half + 1, size) + half + size) / size**2


def _likeliest_digit(place: int, count: int) -> float:
    """Mean probability of the likeliest digit at a place of the sum, from the highest, given the digits above it."""
    if place > _FEW_PLACES:
        return 0.1  # to 1e-4
    size, block = 10**count, 10 ** (count - place)
    ends = [min(number * block, 2 * size - 1) for number in range(2 * 10**place + 1)]
    # Pairs of summands whose sum is less than each end.
    below = [_sum(1, end + 1) if end <= size else size**2 - _sum(1, 2 * size - end) for end in ends]
    shares = np.diff(np.array(below, object)).astype(float) / float(size) ** 2
    return float(shares.reshape(-1, 10 if place else 2).max(axis=1).sum())


def _sum(first: int, end: int) -> int:
    """The sum of first, ..., end - 1."""
    return (end - first) * (first + end - 1) // 2
