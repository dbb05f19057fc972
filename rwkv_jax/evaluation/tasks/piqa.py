"""PIQA: which of two solutions reaches a goal (Bisk et al. 2019, arXiv:1911.11641)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from rwkv_jax.checks import ConfigError
from rwkv_jax.data.text.files import read_text
from rwkv_jax.evaluation.tasks.multiple_choice import Choice, MultipleChoice
from rwkv_jax.evaluation.tasks.records import find_file, find_in_folder, read_records


@dataclasses.dataclass(frozen=True)
class Piqa(MultipleChoice):
    """PIQA."""

    formats: ClassVar = "JSON lines with goal, sol1, sol2 and label (0 or 1), or with labels in NAME-labels.lst beside"
    source: ClassVar = "lm-eval piqa 1.0"
    draws_one_more: ClassVar = True
    name: str = "piqa"

    @override
    def read(self, path: Path) -> list[Choice]:
        return self._read(find_file(path, ("valid.jsonl", "dev.jsonl", "validation.jsonl"), self.name))

    @override
    def read_examples(self, path: Path) -> list[Choice] | None:
        found = find_in_folder(path, ("train.jsonl",), self.name)
        return None if found is None else self._read(found)

    def _read(self, path: Path) -> list[Choice]:
        beside = path.with_name(f"{path.name.partition('.')[0]}-labels.lst")
        labels = read_text(beside).split() if beside.is_file() else None
        items = []
        for i, record in enumerate(read_records(path)):
            if "label" in record or labels is None:
                answer = record.index("label", 2)
            elif i < len(labels) and labels[i] in ("0", "1"):
                answer = int(labels[i])
            else:
                there = labels[i] if i < len(labels) else "missing"
                raise ConfigError(f"{beside}, line {i + 1}: label is {there}; must be 0 or 1, one for each item")
            choices = (record.text("sol1"), record.text("sol2"))
            items.append(Choice(f"Question: {record.text('goal', may_be_empty=True)}\nAnswer:", choices, answer))
        return items
