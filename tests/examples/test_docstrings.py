"""Pairs of functions with and without docstrings, and how many replies have one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.docstrings.pairs import Function, evenly, functions, labeled, records, write
from examples.docstrings.rewards import parses, uses
from examples.docstrings.share import begins_with_docstring

SOURCE = '''
def documented(x):
    """Doubles x.

    More of it.
    """

    # Why.
    return 2 * x


class Some:
    @property
    def short(self):
        "One line."
        return 1

    def none(self):
        return 2

    def many_lines(
        self,
    ):
        """Left out."""
        return 3

    def nothing_else(self):
        """Left out."""

    def cut(self):
        """Its first line goes on
        in the next one."""
        return 4


async def other():
    """Left out."""
    return 5


def long(x):
    a = 1
    b = 2
    c = 3
    d = 4
    e = 5
    f = 6
    return 7
'''


def test_functions_of_a_file() -> None:
    found = {function.header: function for function in functions(SOURCE)}
    assert list(found) == ["def documented(x):\n", "def long(x):\n", "def short(self):\n", "def none(self):\n"]
    documented = found["def documented(x):\n"]
    assert documented == Function("def documented(x):\n", "Doubles x.", "    # Why.\n    return 2 * x\n")
    assert found["def short(self):\n"].summary == "One line."
    assert found["def none(self):\n"] == Function("def none(self):\n", None, "    return 2\n")
    assert found["def long(x):\n"].body.endswith("    f = 6\n")


def test_a_file_of_another_language_has_none() -> None:
    assert list(functions("print 'Python 2'\n")) == []


def test_the_first_of_functions_with_the_same_header_decides() -> None:
    without, with_one = "def f():\n    return 1\n", 'def f():\n    """One."""\n    return 1\n'
    assert [len(some) for some in records([without, with_one])] == [0, 1]
    assert [len(some) for some in records([with_one, without])] == [1, 0]


def test_pairs_differ_in_the_docstring_alone(tmp_path: Path) -> None:
    pairs, undocumented = records([SOURCE, SOURCE])  # the second time nothing is new
    assert [record["prompt"] for record in undocumented] == ["def long(x):\n", "def none(self):\n"]
    assert [pair["prompt"] for pair in pairs] == ["def documented(x):\n", "def short(self):\n"]
    for pair in pairs:
        first, _, rest = pair["chosen"].partition("\n")
        assert begins_with_docstring(first)
        assert rest == pair["rejected"]
        compile(pair["prompt"] + pair["chosen"], "chosen", "exec")
        compile(pair["prompt"] + pair["rejected"], "rejected", "exec")
    assert [each["label"] for each in labeled(pairs[0])] == [True, False]
    write(tmp_path, [SOURCE])
    for name, some in (("pairs", pairs), ("undocumented", undocumented)):
        assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == some
    assert len((tmp_path / "labeled.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("reply", ['    """Doubles', "    r'''Doubles", '\n    """'])
def test_replies_with_a_docstring(reply: str) -> None:
    assert begins_with_docstring(reply)


@pytest.mark.parametrize("reply", ["    return 1", "    # Why.", '    x = """text"""', "    'one quote'", ""])
def test_replies_without(reply: str) -> None:
    assert not begins_with_docstring(reply)


def test_prompts_are_taken_from_the_whole_list() -> None:
    some = [{"prompt": name} for name in "abcdef"]
    assert evenly(some, 3) == some[::2]
    assert evenly(some[:2], 3) == some[:2]


@pytest.mark.parametrize(
    ("header", "reply", "is_function", "share"),
    [
        ("def f(a, b):\n", "    return a + b\n", True, 1.0),
        ("def f(a, b):\n", "    a = 1\n    return b", True, 0.5),
        ("def f():\n", "    return 1", True, 1.0),
        ("def f(*rest, key=None, **more):\n", "    return rest, key, more", True, 1.0),
        ("def f(a):\n", '    """Only says what a is."""\n', False, 0.0),
        ("def f(a):\n", "    return a)", False, 0.0),
        ("def f(a):\n", "    return a\nx = 1", False, 0.0),
        ("def f(a):\n", "    return '\0'", False, 0.0),
        ("def f(a):\n", f"    return {'(' * 5000}a", False, 0.0),
    ],
)
def test_rewards_by_syntax(header: str, reply: str, is_function: bool, share: float) -> None:
    record = {"prompt": header}
    assert parses(record, reply) == is_function
    assert uses(record, reply) == share
