"""Pairs of replies that prefer functions with a docstring, made of the running Python's standard library.

    python -m examples.docstrings.pairs        (writes runs/docstrings/pairs.jsonl, labeled.jsonl, undocumented.jsonl)

A prompt is the first line of a function, with its colon. The chosen reply is the summary of the docstring, on one line,
and the lines after it; the rejected one is these lines alone. Functions whose summary goes on in a second line are left
out. `labeled.jsonl` has the same replies one by one, for KTO, and `undocumented.jsonl` the first lines of functions
without a docstring, with which a model can be asked. A line that begins several functions goes by the first of them, so
some of these lines begin another function, too, which has a docstring.
"""

from __future__ import annotations

import ast
import itertools
import json
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_jax.atomic import replace_file
from rwkv_jax.config import DataConfig
from rwkv_jax.data.text.sources import read_documents

Record = Mapping[str, Any]

FOLDER = Path("runs/docstrings")
MAX_LINES = 6
"""Of a function's body."""
MAX_CHARACTERS = 320
"""Of a whole function: longer ones are left out."""
NUM_PAIRS = 1000
"""Taken from the whole library; the reference model reads all of them before the first step."""


class Function(NamedTuple):
    """The beginning of a function, whose first column is that of `def`."""

    header: str
    """Its first line."""
    summary: str | None
    """The first line of its docstring."""
    body: str
    """The lines after it."""


def functions(source: str) -> Iterator[Function]:
    """Those of a file of Python whose header is one line; each has at least one line besides its docstring."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # lib2to3 has files of Python 2
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node)
        statements = node.body if docstring is None else node.body[1:]
        if not statements or node.body[0].lineno != node.lineno + 1:
            continue
        before = statements[0].lineno - 1 if docstring is None else node.body[0].end_lineno
        body = textwrap.dedent("".join(lines[before : node.end_lineno][:MAX_LINES])).strip("\n")
        summary = None if docstring is None else docstring.partition("\n")[0].strip()
        function = Function(lines[node.lineno - 1].lstrip(), summary, textwrap.indent(body + "\n", "    "))
        is_plain = (summary is None or summary.endswith(".")) and '"""' not in f"{summary}{body}" and "'''" not in body
        if is_plain and sum(len(part or "") for part in function) <= MAX_CHARACTERS:
            yield function


def records(sources: Iterable[str]) -> tuple[list[Record], list[Record]]:
    """Pairs, and prompts of functions without a docstring; no header comes twice, its first function decides."""
    pairs, undocumented, seen = list[Record](), list[Record](), set[str]()
    for function in itertools.chain.from_iterable(map(functions, sources)):
        if function.header in seen:
            continue
        seen.add(function.header)
        if function.summary is None:
            undocumented.append({"prompt": function.header})
        else:
            chosen = f'    """{function.summary}"""\n{function.body}'
            pairs.append({"prompt": function.header, "chosen": chosen, "rejected": function.body})
    return pairs, undocumented


def labeled(pair: Record) -> list[Record]:
    """The two replies of a pair by themselves, the chosen one desirable."""
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for name in ("chosen", "rejected")
    ]


def evenly(some: Sequence[Record], number: int) -> list[Record]:
    """So many of them, from the whole list; all if there are fewer."""
    number = min(number, len(some))
    return [some[index * len(some) // number] for index in range(number)]


def write(folder: Path, sources: Iterable[str]) -> None:
    """Writes the three files."""
    pairs, undocumented = records(sources)
    pairs = evenly(pairs, NUM_PAIRS)
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (
        ("pairs", pairs),
        ("labeled", [each for pair in pairs for each in labeled(pair)]),
        ("undocumented", undocumented),
    ):
        replace_file(folder / f"{name}.jsonl", "".join(json.dumps(each) + "\n" for each in some).encode())
        print(f"{folder / name}.jsonl: {len(some):,} records")


if __name__ == "__main__":
    write(FOLDER, (document.text for document in read_documents(DataConfig(source="python-stdlib"))))
