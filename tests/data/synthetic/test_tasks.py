"""Every task: its answers are those that a reader of the row gives, and chance is what may be had without reading."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.data.synthetic.draws import Draws
from rwkv_jax.data.synthetic.facts import Facts
from rwkv_jax.data.synthetic.recall import MQAR, Induction, Lookup, Needle, Recall
from rwkv_jax.data.synthetic.sequences import Addition, Copying, Reversal, SelectiveCopying, Sorting
from rwkv_jax.data.synthetic.state_tracking import ModularAddition, Parity, WordProblem
from rwkv_jax.data.synthetic.task import BEGIN, Task, prompt_and_answer
from rwkv_jax.data.synthetic.tasks import TASKS

Words = Sequence[str]


def after_the_mark(solve: Callable[[Words], Words]) -> Callable[[Words, Task], dict[int, str]]:
    """Answers {position: word} where the words before the mark are the question."""

    def answers(words: Words, task: Task) -> dict[int, str]:
        del task
        mark = words.index("|")
        return {mark + 1 + step: word for step, word in enumerate(solve(words[:mark]))}

    return answers


def recalled(words: Words, task: Task) -> dict[int, str]:
    """The values of keys that have been seen with a value."""
    assert isinstance(task, MQAR | Recall)
    pairs = dict(zip(words[: 2 * task.num_pairs : 2], words[1 : 2 * task.num_pairs : 2], strict=True))
    assert len(pairs) == len(set(pairs.values())) == task.num_pairs
    questions = range(2 * task.num_pairs, len(words))
    return {at + 1: pairs[words[at]] for at in questions if words[at] in pairs}


def looked_up(words: Words, task: Task) -> dict[int, str]:
    """What the pairs say of the key behind the first mark, behind the second one."""
    assert isinstance(task, Lookup)
    first, second = (at for at, word in enumerate(words) if word == "|")
    said = words[2:second] if first == 0 else words[:first]
    pairs = dict(zip(said[::2], said[1::2], strict=True))
    assert len(pairs) == len(set(pairs.values())) in task.nums_pairs
    assert task.question in ("first" if first == 0 else "last", "either")
    return {second + 1: pairs[words[first + 1]]}


def known(words: Words, task: Task) -> dict[int, str]:
    """The value of a key, by its number, the first time that the row has it."""
    assert isinstance(task, Facts)
    found: dict[str, int] = {}
    for at in range(0, len(words) - 1, 2):
        found.setdefault(words[at], at + 1)
    return {at: f"v{task.values[int(key[1:])]}" for key, at in found.items()}


def needle(words: Words, task: Task) -> dict[int, str]:
    assert isinstance(task, Needle)
    first, second = (at for at, word in enumerate(words) if word == "|")
    assert second == len(words) - task.num_digits - 1
    return {second + 1 + step: words[first + 1 + step] for step in range(task.num_digits)}


def induction(words: Words, task: Task) -> dict[int, str]:
    del task
    first, second = (at for at, word in enumerate(words) if word == "|")
    return {second + 1: words[first + 1]}


def added(question: Words) -> Words:
    """`1 2 + 9 3` -> 0105, or 5010 with the lowest digit first."""
    plus = question.index("+")
    total = int("".join(question[:plus])) + int("".join(question[plus + 1 :]))
    return f"{total:0{plus + 1}d}"


def sums(words: Words, task: Task) -> dict[int, str]:
    assert isinstance(task, Addition)
    order = -1 if task.reverse_sum else 1
    return after_the_mark(lambda question: added(question)[::order])(words, task)


def running(modulus: Callable[[Task], int]) -> Callable[[Words, Task], dict[int, str]]:
    """Sums of all words so far."""
    return lambda words, task: {at: str(sum(map(int, words[: at + 1])) % modulus(task)) for at in range(len(words))}


def modulus_of(task: Task) -> int:
    assert isinstance(task, ModularAddition)
    return task.modulus


def orders(words: Words, task: Task) -> dict[int, str]:
    """The order of the items after each rearrangement."""
    assert isinstance(task, WordProblem)
    items, found = "123456"[: task.items], {}
    for at, word in enumerate(words):
        items = "".join(items[int(place) - 1] for place in word)
        found[at] = items
    return found


SOLVERS: dict[str, Callable[[Words, Task], dict[int, str]]] = {
    "mqar": recalled,
    "recall": recalled,
    "lookup": looked_up,
    "facts": known,
    "induction": induction,
    "needle": needle,
    "copying": after_the_mark(lambda question: question),
    "reversal": after_the_mark(lambda question: question[::-1]),
    "selective_copying": after_the_mark(lambda question: [word for word in question if word != "."]),
    "sorting": after_the_mark(lambda question: sorted(question, key=int)),
    "addition": sums,
    "parity": running(lambda task: 2),
    "modular_addition": running(modulus_of),
    "word_problem": orders,
}

CASES: list[tuple[Task, int]] = [
    (MQAR(), 32),
    (MQAR(num_pairs=3, num_keys=3, num_values=4), 13),
    (MQAR(show_answers=False), 16),
    (Recall(), 41),
    (Recall(num_pairs=2, distances=(3,), noise=True), 20),
    (Lookup(), 20),
    (Lookup(nums_pairs=(1, 3), num_keys=3, num_values=4, question="last"), 13),
    (Facts(), 16),
    (Facts(num_facts=9, num_values=3, power=0.0, ranks=(2, 5)), 9),
    (Induction(), 4),
    (Induction(num_symbols=3), 30),
    (Needle(), 12),
    (Needle(num_digits=2), 40),
    (Needle(depth=1.0), 40),
    (Copying(), 33),
    (Copying(count=3), 12),
    (Reversal(), 16),
    (SelectiveCopying(), 17),
    (SelectiveCopying(count=2), 32),
    (Sorting(), 66),
    (Sorting(num_values=5, count=5), 12),
    (Addition(), 12),
    (Addition(digits=2, reverse_sum=False), 9),
    (Parity(), 24),
    (ModularAddition(modulus=7), 9),
    (WordProblem(items=3, inputs="all"), 12),
    (WordProblem(), 12),
]
with_case = pytest.mark.parametrize(("task", "length"), CASES, ids=lambda value: str(value))


def test_every_task_has_a_case() -> None:
    assert {task.name for task, _ in CASES} == set(TASKS) == set(SOLVERS)


@with_case
def test_the_answers_are_those_of_a_reader(task: Task, length: int) -> None:
    rows = task.rows(Draws("rows 3", np.arange(50)), length)
    assert rows.mask is not None
    assert (rows.tokens.shape, rows.mask.shape) == ((50, length + 1), (50, length))
    assert (rows.tokens.dtype, rows.mask.dtype) == (np.int32, np.float32)
    assert task.labels <= (rows.targets is not None)
    targets = rows.tokens[:, 1:] if rows.targets is None else rows.targets
    assert targets.shape == (50, length)
    assert targets.dtype == np.int32
    assert len(np.unique(rows.tokens, axis=0)) > 1
    shift = 0 if task.labels else 1  # a label is that of the input itself, an answer the token after
    for tokens, answers, counts in zip(rows.tokens.tolist(), targets, rows.mask, strict=True):
        assert tokens[0] == BEGIN
        assert BEGIN not in tokens[1:]
        words = task.tokenizer.decode(tokens[1 : length + 1 if shift else length]).split()
        expected = SOLVERS[task.name](words, task)
        assert np.flatnonzero(counts).tolist() == [at + 1 - shift for at in expected]
        assert task.tokenizer.decode(answers[counts > 0].tolist()).split() == list(expected.values())
    assert max(rows.tokens.max(), targets.max()) < task.vocab_size


@with_case
def test_the_shortest_rows_are_right_and_shorter_ones_refused(task: Task, length: int) -> None:
    rows = task.rows(Draws("rows", np.arange(3)), task.min_length)
    assert rows.tokens.shape == (3, task.min_length + 1)
    assert rows.mask is not None
    assert rows.mask.any(axis=1).all()
    task.check_length("training.sequence_length", length)
    short = task.min_length - 1
    with pytest.raises(ConfigError, match=rf"^training.sequence_length = {short}: {task.name}\(.* at least"):
        task.check_length("training.sequence_length", short)


def test_longer_rows_than_there_are_numbers_to_sort_are_refused() -> None:
    Sorting(num_values=5).rows(Draws("rows", np.arange(3)), 12)
    with pytest.raises(ConfigError, match=r"^evaluation.lengths = 13: must not exceed 12: sorting\("):
        Sorting(num_values=5).check_length("evaluation.lengths", 13)


def test_gaps_of_zoology_hold_any_symbol_but_where_something_stands() -> None:
    task = MQAR(random_gaps=True)
    rows = task.rows(Draws("rows", np.arange(200)), 32)
    gaps = rows.tokens[:, 9:]
    assert len(np.unique(gaps)) == task.vocab_size - 1  # all but end_of_text
    assert rows.mask is not None
    keys, values = rows.tokens[:, 1:9:2], rows.tokens[:, 2:9:2]
    for row, counts in enumerate(rows.mask):
        asked = np.flatnonzero(counts)
        pairs = dict(zip(keys[row], values[row], strict=True))
        assert [pairs[key] for key in rows.tokens[row, asked]] == rows.tokens[row, asked + 1].tolist()


def test_the_first_places_of_mqar_are_the_likeliest() -> None:
    rows = MQAR().rows(Draws("rows", np.arange(4000)), 32)
    assert rows.mask is not None
    asked = rows.mask.sum(axis=0)
    assert asked[9:32:2].sum() == 16_000
    assert asked[9] > 2 * asked[19] > 2 * asked[31] > 0


def test_a_needle_lies_at_its_depth() -> None:
    for depth, first in ((0.0, 1), (0.5, 15), (1.0, 29)):
        rows = Needle(depth=depth).rows(Draws("rows", np.arange(5)), 40)
        assert (rows.tokens[:, first] == 2).all()
    assert list(Needle().variants()) == ["depth_0.0", "depth_0.25", "depth_0.5", "depth_0.75", "depth_1.0"]
    assert not Needle(depth=0.5).variants()


def test_each_distance_of_recall_is_asked_and_is_a_variant() -> None:
    task = Recall(distances=(8, 20))
    rows = task.rows(Draws("rows", np.arange(400)), 40)
    assert rows.mask is not None
    found = Counter()
    for tokens, counts in zip(rows.tokens, rows.mask, strict=True):
        (asked,) = np.flatnonzero(counts)
        found[int(asked - np.flatnonzero(tokens == tokens[asked + 1])[0])] += 1
    assert set(found) == {8, 20}
    assert min(found.values()) > 160
    assert task.variants() == {"distance_8": Recall(distances=(8,)), "distance_20": Recall(distances=(20,))}


def test_both_orders_and_each_number_of_pairs_are_asked_and_are_variants() -> None:
    task = Lookup(nums_pairs=(2, 5))
    rows = task.rows(Draws("rows", np.arange(400)), 20)
    assert rows.mask is not None
    ends = rows.mask.argmax(axis=1)
    found = Counter(zip((rows.tokens[:, 1] == 2).tolist(), ends.tolist(), strict=True))
    assert set(found) == {(first, end) for first in (True, False) for end in (7, 13)}
    assert min(found.values()) > 70
    answers = np.take_along_axis(rows.tokens, ends[:, None] + 1, axis=1)
    place = (rows.tokens == answers).argmax(axis=1) - np.where(rows.tokens[:, 1] == 2, 4, 2)
    assert set(place.tolist()) == {0, 2, 4, 6, 8}  # any of the pairs is asked for
    variants = task.variants()
    assert list(variants) == ["first_2", "first_5", "last_2", "last_5"]
    assert variants["last_5"] == Lookup(nums_pairs=(5,), question="last")
    assert not variants["last_5"].variants()


def test_facts_never_change_and_follow_zipf() -> None:
    task = Facts(num_facts=20, num_values=5)
    rows = task.rows(Draws("rows", np.arange(2000)), 9)
    keys, values = rows.tokens[:, 1:9:2] - 3, rows.tokens[:, 2:9:2] - 23
    assert all(len(np.unique(values[keys == key])) == 1 for key in range(20))
    assert (values == task.values[keys]).all()
    assert len(np.unique(task.values)) == 5
    np.testing.assert_array_equal(Facts(num_facts=30, num_values=5).values[:20], task.values)
    shares = np.bincount(keys.ravel(), minlength=20) / keys.size
    np.testing.assert_allclose(shares, task.probabilities, atol=0.015)
    np.testing.assert_allclose(task.probabilities[[0, 1, 9]] / task.probabilities[0], [1, 1 / 2, 1 / 10])


def test_facts_are_evaluated_by_rank() -> None:
    variants = Facts(num_facts=20).variants()
    assert list(variants) == ["ranks_0_3", "ranks_4_15", "ranks_16_19"]
    rare = variants["ranks_16_19"]
    assert isinstance(rare, Facts)
    np.testing.assert_allclose(
        rare.probabilities[16:], Facts(num_facts=20).probabilities[16:] / sum(Facts(num_facts=20).probabilities[16:])
    )
    tokens = rare.rows(Draws("rows", np.arange(50)), 9).tokens
    assert set((tokens[:, 1:9:2] - 3).ravel().tolist()) == {16, 17, 18, 19}
    assert not rare.variants()


@pytest.mark.parametrize("pairs", [1, 2, 4, 8])
def test_chance_of_mqar_is_that_of_a_guess_among_the_values_not_yet_asked_for(pairs: int) -> None:
    assert MQAR(num_pairs=pairs).chance(64) == pytest.approx(
        float(sum(Fraction(1, left) for left in range(1, pairs + 1)) / pairs)
    )
    assert MQAR(num_pairs=pairs, show_answers=False).chance(64) == pytest.approx(1 / pairs)


def test_the_chances_that_are_known() -> None:
    assert MQAR().chance(32) == pytest.approx(0.521, abs=5e-4)
    assert [task.chance(41) for task in (Parity(), ModularAddition(modulus=8), Recall(), Needle())] == [
        *(0.5, 0.125, 0.25, 0.1)
    ]
    assert [task.chance(20) for task in (Lookup(), Lookup(nums_pairs=(5,)), Facts())] == [3 / 16, 1 / 5, 1 / 32]
    assert WordProblem(items=3, inputs="all").chance(20) == pytest.approx(1 / 6)
    assert WordProblem().chance(10_000) == pytest.approx(1 / 120, rel=0.01)


def best_without_reading(answers: Sequence[Sequence[object]], *, sees_answers: bool) -> float:
    """Accuracy of the best guesses over equally likely rows, by position and, if seen, the answers before."""
    right = 0
    for place in range(len(answers[0])):
        seen = Counter((tuple(answer[:place]) if sees_answers else (), answer[place]) for answer in answers)
        best: Counter[object] = Counter()
        for (before, _), count in seen.items():
            best[before] = max(best[before], count)
        right += sum(best.values())
    return right / len(answers) / len(answers[0])


@pytest.mark.parametrize(("items", "length"), [(2, 5), (3, 5), (4, 4)])
def test_chance_of_swaps_is_that_of_the_likeliest_order(items: int, length: int) -> None:
    task, identity = WordProblem(items=items), "123456"[:items]
    swaps = [word for word in task.symbols if sum(a != b for a, b in zip(word, identity, strict=True)) in (0, 2)]
    words = itertools.product(swaps, repeat=length - 1)
    answers = [list(SOLVERS["word_problem"](word, task).values()) for word in words]
    assert task.chance(length) == pytest.approx(best_without_reading(answers, sees_answers=False))


@pytest.mark.parametrize(("size", "count"), [(5, 5), (6, 3), (7, 1)])
def test_chance_of_sorting_is_that_of_the_likeliest_number(size: int, count: int) -> None:
    answers = list(itertools.combinations(range(size), count))
    expected = best_without_reading(answers, sees_answers=True)
    assert Sorting(num_values=size, count=count).chance(99) == pytest.approx(expected)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("digits", [1, 2])
def test_chance_of_addition_is_that_of_the_likeliest_digit(digits: int, reverse: bool) -> None:
    sums = (f"{a + b:0{digits + 1}d}" for a, b in itertools.product(range(10**digits), repeat=2))
    expected = best_without_reading([total[:: -1 if reverse else 1] for total in sums], sees_answers=True)
    found = Addition(digits=digits, reverse_sum=reverse).chance(99)
    assert found == pytest.approx(expected)
    assert Addition(digits=30, reverse_sum=reverse).chance(99) == pytest.approx(0.1, abs=0.03)


def test_prompts_end_where_the_first_answer_begins() -> None:
    prompt, answer = prompt_and_answer(Copying(), 13)
    assert prompt == f"{answer} |"
    assert len(answer.split()) == 6
    prompt, answer = prompt_and_answer(MQAR(), 32)
    words = prompt.split()
    assert words[words.index(words[-1]) + 1] == answer
    with pytest.raises(ConfigError, match=r"^parity\(\): labels"):
        prompt_and_answer(Parity(), 12)
