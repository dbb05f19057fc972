"""Tasks that ask for something said before: MQAR, recall at a distance or in either order, induction, a needle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from typing_extensions import override

from rwkv_jax.data.synthetic.draws import Draws
from rwkv_jax.data.synthetic.task import BEGIN, BLANK, MARK, SIGNS, Task, rows_of_text
from rwkv_jax.data.tokens.rows import Rows


def _keys_and_values(num_keys: int, num_values: int) -> tuple[str, ...]:
    keys, values = (f"k{number}" for number in range(num_keys)), (f"v{number}" for number in range(num_values))
    return (*SIGNS, *keys, *values)


@dataclasses.dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall: pairs of keys and values, then each key once more, where its value is asked for.

    The layout of zoology (arXiv 2312.04927): end_of_text, k v k v ..., then (T - 2 n) // 2 places of two symbols, of
    which n have a key; early places are likelier, by a power law. All keys and all values differ.

    Chance: with the answers in the row, a model that knows which values have not been asked for yet, but not which key
    each belongs to, scores H_n / n, with H_n = 1 + 1/2 + ... + 1/n: 52.1% for 4 pairs. Without them it is 1 / n.
    """

    name: ClassVar[str] = "mqar"

    num_pairs: int = 4
    """n."""
    num_keys: int = 32
    """Keys to draw from."""
    num_values: int = 32
    """Values to draw from."""
    power: float = 0.01
    """a in the weight a k^(a - 1) of the k-th place."""
    show_answers: bool = True
    """Whether the value follows the key that asks for it, as in a text. False leaves zoology's gap there."""
    random_gaps: bool = False
    """Fill gaps with symbols of the whole vocabulary, as zoology does, and not with blanks."""

    def __post_init__(self) -> None:
        self.require_positive("num_pairs")
        for field in ("num_keys", "num_values"):
            enough = getattr(self, field) >= self.num_pairs
            self.require(enough, field, f"must be at least num_pairs = {self.num_pairs}, since all differ")
        self.require(0 < self.power < np.inf, "power", "must be greater than zero")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return _keys_and_values(self.num_keys, self.num_values)

    @property
    @override
    def min_length(self) -> int:
        return 4 * self.num_pairs

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        pairs = self.num_pairs
        keys = len(SIGNS) + 1 + draws.distinct(self.num_keys, pairs)
        values = len(SIGNS) + 1 + self.num_keys + draws.distinct(self.num_values, pairs)
        places = np.arange(1, (length - 2 * pairs) // 2 + 1)
        asked = 1 + 2 * pairs + 2 * draws.distinct_weighted(self.power * places ** (self.power - 1), pairs)
        if self.random_gaps:
            tokens = 1 + draws.integers(len(self.symbols), length + 1)
        else:
            tokens = np.full((draws.num_rows, length + 1), BLANK)
        tokens[:, 0] = BEGIN
        tokens[:, 1 : 2 * pairs : 2], tokens[:, 2 : 2 * pairs + 1 : 2] = keys, values
        np.put_along_axis(tokens, asked, keys, axis=1)
        mask = np.zeros((draws.num_rows, length), np.float32)
        np.put_along_axis(mask, asked, np.float32(1), axis=1)
        targets = None
        if self.show_answers:
            np.put_along_axis(tokens, asked + 1, values, axis=1)
        else:
            targets = tokens[:, 1:].astype(np.int32)
            np.put_along_axis(targets, asked, values, axis=1)
        return Rows(tokens.astype(np.int32), mask, targets)

    @override
    def chance(self, length: int) -> float:
        if not self.show_answers:
            return 1 / self.num_pairs
        return sum(1 / number for number in range(1, self.num_pairs + 1)) / self.num_pairs


@dataclasses.dataclass(frozen=True)
class Recall(Task):
    """Associative recall at a distance: pairs of keys and values, then blanks, and one key again, that of the question.

    Evaluated at each distance besides.

    Chance: one of the values in the row.
    """

    name: ClassVar[str] = "recall"

    num_pairs: int = 4
    """Pairs in a row; one of them is asked for."""
    num_keys: int = 16
    """Keys to draw from."""
    num_values: int = 16
    """Values to draw from."""
    distances: tuple[int, ...] = (8, 16, 32)
    """Symbols from a value to the key that asks for it; each row has one of them, equally likely."""
    noise: bool = False
    """Fill the distance with keys that are in no pair of the row, and not with blanks."""

    def __post_init__(self) -> None:
        self.require_positive("num_pairs")
        for field in ("num_keys", "num_values"):
            enough = getattr(self, field) >= self.num_pairs
            self.require(enough, field, f"must be at least num_pairs = {self.num_pairs}, since all differ")
        self.require(not self.noise or self.num_keys > self.num_pairs, "noise", "needs keys in no pair; raise num_keys")
        least = 2 * self.num_pairs - 1
        self.require(
            bool(self.distances) and min(self.distances) >= least,
            "distances",
            f"give at least one, each at least {least}, so that the question comes after all {self.num_pairs} pairs",
        )
        self.require(len(set(self.distances)) == len(self.distances), "distances", "names one twice")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return _keys_and_values(self.num_keys, self.num_values)

    @property
    @override
    def min_length(self) -> int:
        return 2 * self.num_pairs + max(self.distances) + 1

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        pairs = self.num_pairs
        shuffled = len(SIGNS) + 1 + draws.distinct(self.num_keys, self.num_keys)
        keys, others = shuffled[:, :pairs], shuffled[:, pairs:]
        values = len(SIGNS) + 1 + self.num_keys + draws.distinct(self.num_values, pairs)
        asked = draws.integers(pairs, 1)
        distances = np.array(self.distances)[draws.integers(len(self.distances), 1)]
        tokens = np.full((draws.num_rows, length + 1), BLANK)
        if self.noise:
            tokens = np.take_along_axis(others, draws.integers(others.shape[1], length + 1), axis=1)
        tokens[:, 0] = BEGIN
        tokens[:, 1 : 2 * pairs : 2], tokens[:, 2 : 2 * pairs + 1 : 2] = keys, values
        question = 2 * asked + 2 + distances
        np.put_along_axis(tokens, question, np.take_along_axis(keys, asked, axis=1), axis=1)
        np.put_along_axis(tokens, question + 1, np.take_along_axis(values, asked, axis=1), axis=1)
        return rows_of_text(tokens, np.arange(length + 1) == question + 1, length)

    @override
    def chance(self, length: int) -> float:
        return 1 / self.num_pairs

    @override
    def variants(self) -> Mapping[str, Task]:
        if len(self.distances) == 1:
            return {}
        return {f"distance_{distance}": dataclasses.replace(self, distances=(distance,)) for distance in self.distances}


@dataclasses.dataclass(frozen=True)
class Lookup(Task):
    """A question before or behind the pairs that answer it: `| k0` and pairs, or pairs and `| k0`, then a mark.

    Both orders have the same symbols and as many, and the answer comes last. With the question behind the pairs a model
    must keep all of them; with the question before them, one. Evaluated besides with each number of pairs and order.

    Chance: one of the values in the row.
    """

    name: ClassVar[str] = "lookup"

    nums_pairs: tuple[int, ...] = (4, 8)
    """Pairs in a row; each row has one of these numbers, equally likely."""
    num_keys: int = 32
    """Keys to draw from."""
    num_values: int = 32
    """Values to draw from."""
    question: str = "either"
    """`first`, `last`, or `either`: each row has one of the two, equally likely."""

    def __post_init__(self) -> None:
        self.require(
            bool(self.nums_pairs) and min(self.nums_pairs) >= 1, "nums_pairs", "give at least one, each at least 1"
        )
        self.require(len(set(self.nums_pairs)) == len(self.nums_pairs), "nums_pairs", "names one twice")
        for field in ("num_keys", "num_values"):
            enough = getattr(self, field) >= max(self.nums_pairs)
            self.require(
                enough, field, f"must be at least {max(self.nums_pairs)}, the pairs of a row, which all differ"
            )
        self.require(self.question in ("first", "last", "either"), "question", "must be 'first', 'last' or 'either'")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return _keys_and_values(self.num_keys, self.num_values)

    @property
    @override
    def min_length(self) -> int:
        return 2 * max(self.nums_pairs) + 4

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        most = max(self.nums_pairs)
        keys = len(SIGNS) + 1 + draws.distinct(self.num_keys, most)
        values = len(SIGNS) + 1 + self.num_keys + draws.distinct(self.num_values, most)
        pairs = np.array(self.nums_pairs)[draws.integers(len(self.nums_pairs), 1)]  # [n, 1]
        asked = np.minimum((draws.uniform(1) * pairs).astype(np.int64), pairs - 1)
        is_first = draws.integers(2, 1) == 0
        if self.question != "either":
            is_first = np.full_like(is_first, self.question == "first")
        tokens = np.full((draws.num_rows, length + 1), BLANK)
        tokens[:, 0] = BEGIN
        facts = np.stack([keys, values], axis=-1).reshape(-1, 2 * most)
        told = np.arange(2 * most) < 2 * pairs
        places = np.where(is_first, 3, 1) + np.arange(2 * most)
        np.put_along_axis(tokens, places, np.where(told, facts, BLANK), axis=1)
        question = np.where(is_first, 1, 2 * pairs + 1)
        np.put_along_axis(tokens, question, MARK, axis=1)
        np.put_along_axis(tokens, question + 1, np.take_along_axis(keys, asked, axis=1), axis=1)
        answer = 2 * pairs + 4
        np.put_along_axis(tokens, answer - 1, MARK, axis=1)
        np.put_along_axis(tokens, answer, np.take_along_axis(values, asked, axis=1), axis=1)
        return rows_of_text(tokens, np.arange(length + 1) == answer, length)

    @override
    def chance(self, length: int) -> float:
        return sum(1 / pairs for pairs in self.nums_pairs) / len(self.nums_pairs)

    @override
    def variants(self) -> Mapping[str, Task]:
        orders = ("first", "last") if self.question == "either" else (self.question,)
        if len(orders) == len(self.nums_pairs) == 1:
            return {}
        return {
            f"{order}_{pairs}": dataclasses.replace(self, nums_pairs=(pairs,), question=order)
            for order in orders
            for pairs in self.nums_pairs
        }


@dataclasses.dataclass(frozen=True)
class Induction(Task):
    """Induction heads (arXiv 2212.14052): random symbols with one mark; after a second mark the symbol after the first.

    Chance: one of all symbols.
    """

    name: ClassVar[str] = "induction"

    num_symbols: int = 16
    """Symbols to draw from."""

    def __post_init__(self) -> None:
        self.require_positive("num_symbols")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return (*SIGNS, *(f"s{number}" for number in range(self.num_symbols)))

    @property
    @override
    def min_length(self) -> int:
        return 4

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        tokens = len(SIGNS) + 1 + draws.integers(self.num_symbols, length + 1)
        tokens[:, 0], tokens[:, length - 1] = BEGIN, MARK
        first = 1 + draws.integers(length - 3, 1)
        np.put_along_axis(tokens, first, MARK, axis=1)
        tokens[:, length] = np.take_along_axis(tokens, first + 1, axis=1)[:, 0]
        return rows_of_text(tokens, np.arange(length + 1) == length, length)

    @override
    def chance(self, length: int) -> float:
        return 1 / self.num_symbols


@dataclasses.dataclass(frozen=True)
class Needle(Task):
    """A needle in a haystack: a mark and some digits within random words, and after a second mark the digits again.

    Evaluated besides with the needle at the beginning, at the quarters, and at the end of the haystack.

    Chance: one of ten digits.
    """

    name: ClassVar[str] = "needle"

    num_digits: int = 5
    """Digits of the needle."""
    num_words: int = 16
    """Words of the haystack to draw from."""
    depth: float | None = None
    """Share of the haystack before the needle; None draws it for each row."""

    def __post_init__(self) -> None:
        self.require_positive("num_digits", "num_words")
        self.require(self.depth is None or 0 <= self.depth <= 1, "depth", "must lie in 0 to 1")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        return (*SIGNS, *map(str, range(10)), *(f"w{number}" for number in range(self.num_words)))

    @property
    @override
    def min_length(self) -> int:
        return 2 * self.num_digits + 2

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        digits = len(SIGNS) + 1 + draws.integers(10, self.num_digits)
        haystack = length - 2 - 2 * self.num_digits
        tokens = len(SIGNS) + 11 + draws.integers(self.num_words, length + 1)
        tokens[:, 0] = BEGIN
        if self.depth is None:
            first = 1 + draws.integers(haystack + 1, 1)
        else:
            first = np.full((draws.num_rows, 1), 1 + round(self.depth * haystack))
        needle = np.concatenate([np.full((draws.num_rows, 1), MARK), digits], axis=1)
        np.put_along_axis(tokens, first + np.arange(needle.shape[1]), needle, axis=1)
        tokens[:, -needle.shape[1] :] = needle
        return rows_of_text(tokens, np.arange(length + 1) > length - self.num_digits, length)

    @override
    def chance(self, length: int) -> float:
        return 1 / 10

    @override
    def variants(self) -> Mapping[str, Task]:
        if self.depth is not None:
            return {}
        return {f"depth_{depth}": dataclasses.replace(self, depth=depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)}
