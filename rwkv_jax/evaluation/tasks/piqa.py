"""PIQA: which of two solutions reaches a goal (Bisk et al. 2019, arXiv:1911.11641)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from rwkv_jax.checks import ConfigError
from rwkv_jax.data.text.files import read_text
from rwkv_jax.evaluation.tasks.multiple_choice import Choice, MultipleChoice
from rwkv_jax.evaluation.tasks.records import Record, read_records


@dataclasses.dataclass(frozen=True)
class Piqa(MultipleChoice):
    """PIQA."""

    formats: ClassVar = "JSON lines with goal, sol1, sol2 and label (0 or 1), or with labels in NAME-labels.lst beside"
    source: ClassVar = "lm-eval piqa 1.0"
    files: ClassVar = ("valid.jsonl", "dev.jsonl", "validation.jsonl")
    example_files: ClassVar = ("train.jsonl",)
    draws_one_more: ClassVar = True
    name: str = "piqa"

    @override
    def read_file(self, file: Path) -> list[Choice]:
        beside = file.with_name(f"{file.name.partition('.')[0]}-labels.lst")
        labels = read_text(beside).split() if beside.is_file() else None
        items, num_labeled = [], 0
        for i, record in enumerate(read_records(file)):
            if "label" in record or labels is None:
                items.append(_item(record, record.index("label", 2)))
                continue
            label = labels[i] if i < len(labels) else "missing"
            if label not in ("0", "1"):
                raise ConfigError(f"{beside}, line {i + 1}: label is {label}; must be 0 or 1, one for each item")
            items.append(_item(record, int(label)))
            num_labeled += 1
        if labels is not None and num_labeled and len(labels) != len(items):
            raise ConfigError(f"{beside}: has {len(labels)} labels for {len(items)} items; must have one for each item")
        return items


def _item(record: Record, answer: int) -> Choice:
    goal = record.text("goal", may_be_empty=True)  # a few are
    return Choice(f"Question: {goal}\nAnswer:", (record.text("sol1"), record.text("sol2")), answer)
