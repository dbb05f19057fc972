"""HellaSwag: how an everyday scene goes on (Zellers et al. 2019, arXiv:1905.07830)."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

from typing_extensions import override

from rwkv_jax.evaluation.tasks.multiple_choice import Choice, MultipleChoice
from rwkv_jax.evaluation.tasks.records import Record

_IN_BRACKETS = re.compile(r"\[.*?\]")


@dataclasses.dataclass(frozen=True)
class HellaSwag(MultipleChoice):
    """HellaSwag."""

    formats: ClassVar = "JSON lines with activity_label, ctx_a, ctx_b, endings (4) and label (0 to 3)"
    source: ClassVar = "lm-eval hellaswag 1.0"
    files: ClassVar = ("hellaswag_val.jsonl", "validation.jsonl", "val.jsonl")
    example_files: ClassVar = ("hellaswag_train.jsonl", "train.jsonl")
    draws_one_more: ClassVar = True
    name: str = "hellaswag"

    @override
    def read_item(self, record: Record) -> Choice:
        label, begin, end = (record.text(name, may_be_empty=True) for name in ("activity_label", "ctx_a", "ctx_b"))
        endings = tuple(map(clean, record.texts("endings", 4)))
        return Choice(clean(f"{label}: {begin} {end.capitalize()}"), endings, record.index("label", 4))


def clean(text: str) -> str:
    """A text without the marks of WikiHow: titles become sentences, other words in brackets vanish."""
    return _IN_BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")
