"""MMLU: exams of 57 subjects (Hendrycks et al. 2020, arXiv:2009.03300)."""

from __future__ import annotations

import csv
import dataclasses
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, TextIO

from typing_extensions import override

from rwkv_jax.checks import ConfigError
from rwkv_jax.data.text.files import COMPRESSED, inner_suffix, open_text
from rwkv_jax.evaluation.tasks.multiple_choice import ACCURACY, Choice, MultipleChoice
from rwkv_jax.evaluation.tasks.records import Record, find_file, find_in_folder, read_records

LETTERS = ("A", "B", "C", "D")
_SPLIT = re.compile(r"_(test|dev|val)$")
_PLACES = ("*_test.csv", "test/*_test.csv", "data/test/*_test.csv")
_COLUMNS = ("question", *LETTERS, "answer")


@dataclasses.dataclass(frozen=True)
class Mmlu(MultipleChoice):
    """The letter of the right answer, by subject and over all questions; examples are the first of the dev split."""

    formats: ClassVar = (
        "the released folder (test/SUBJECT_test.csv, dev/SUBJECT_dev.csv), one such CSV file (question, four choices, "
        "letter; no header), or JSON lines with question, subject, choices (4) and answer (0 to 3, or A to D)"
    )
    source: ClassVar = "lm-eval mmlu 1.0"
    files: ClassVar = ("test.jsonl",)
    example_files: ClassVar = ("dev.jsonl",)
    metrics: ClassVar = {"acc": ACCURACY}
    name: str = "mmlu"

    @override
    def read(self, path: Path) -> list[Choice]:
        found = _subjects(path, "test") or [find_file(path, (*self.files, *_PLACES), self.name)]
        return [item for file in found for item in self.read_file(file)]

    @override
    def read_examples(self, path: Path) -> list[Choice] | None:
        found = _subjects(path, "dev") or [find_in_folder(path, self.example_files, self.name)]
        items = [item for file in found if file is not None for item in self.read_file(file)]
        return items or None

    @override
    def read_file(self, file: Path) -> list[Choice]:
        if inner_suffix(file.name) != ".csv":
            return [self.read_item(record) for record in read_records(file)]
        subject, items = _SPLIT.sub("", file.name.partition(".")[0]), []
        with open_text(file) as text:
            for place, row in _rows(file, text):
                if len(row) != len(_COLUMNS):
                    wanted = ", ".join(_COLUMNS)
                    raise ConfigError(f"{place}: has {len(row)} columns, must have {len(_COLUMNS)}: {wanted}")
                values = dict(zip(_COLUMNS, row, strict=True))
                values |= {"choices": row[1:5], "subject": subject}
                items.append(self.read_item(Record(values, place)))
        return items

    @override
    def read_item(self, record: Record) -> Choice:
        choices, answer = record.texts("choices", 4, may_be_empty=True), record.get("answer")
        index = LETTERS.index(answer) if answer in LETTERS else record.index("answer", 4)
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
        context = "\n".join([record.text("question").strip(), *lines, "Answer:"])
        return Choice(context, LETTERS, index, record.text("subject"))

    @override
    def description(self, item: Choice) -> str:
        subject = str(item.group).replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {subject}.\n\n"

    @override
    def choose_examples(
        self, item: Choice, pool: Sequence[Choice], num: int, generator: random.Random, *, is_own: bool
    ) -> list[Choice]:
        """The first ones of the item's own subject; none is drawn."""
        own = [each for each in pool if each.group == item.group and not (is_own and each == item)]
        if len(own) < num:
            raise ConfigError(f"num_fewshot = {num}: {self.name} has {len(own)} examples of {item.group}; give more")
        return own[:num]


def _rows(file: Path, text: TextIO) -> Iterator[tuple[str, list[str]]]:
    """Rows of a CSV file, each with its place for messages."""
    rows = csv.reader(text)
    try:
        for row in rows:
            yield f"{file}, line {rows.line_num}", row
    except csv.Error as error:
        raise ConfigError(
            f"{file}, line {rows.line_num}: is not CSV ({error}); is a quotation mark missing?"
        ) from error


def _subjects(path: Path, split: str) -> list[Path]:
    """The CSV files of a split, one a subject and possibly compressed, in the released folder or above it."""
    for folder in (path, path / split, path / "data" / split):
        found: dict[str, Path] = {}
        for ending in ("", *COMPRESSED):  # of several forms of a file the first one counts
            for file in folder.glob(f"*_{split}.csv{ending}"):
                found.setdefault(file.name.removesuffix(ending), file)
        if found:
            return [file for _, file in sorted(found.items())]
    return []
