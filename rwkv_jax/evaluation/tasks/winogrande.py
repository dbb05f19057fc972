"""Winogrande: whom or what a pronoun stands for (Sakaguchi et al. 2019, arXiv:1907.10641).

Partial scoring (Trinh and Le 2018, arXiv:1806.02847): what follows the blank is scored, behind either option.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from rwkv_jax.evaluation.requests import Loglikelihood, LoglikelihoodResult
from rwkv_jax.evaluation.tasks.base import Score, Task
from rwkv_jax.evaluation.tasks.multiple_choice import ACCURACY
from rwkv_jax.evaluation.tasks.records import Record


@dataclasses.dataclass(frozen=True)
class Blank:
    """A sentence with a blank that one of two options fills."""

    contexts: tuple[str, str]
    """The sentence up to the blank, with either option in its place."""
    rest: str
    """What follows."""
    answer: int
    """0 or 1."""


@dataclasses.dataclass(frozen=True)
class Winogrande(Task[Blank]):
    """Winogrande."""

    formats: ClassVar = "JSON lines with sentence (in which _ is the blank), option1, option2 and answer (1 or 2)"
    source: ClassVar = "lm-eval winogrande 1.0"
    files: ClassVar = ("dev.jsonl", "validation.jsonl")
    example_files: ClassVar = ("train_xl.jsonl", "train.jsonl")
    metrics: ClassVar = {"acc": ACCURACY}
    draws_one_more: ClassVar = True
    name: str = "winogrande"

    @override
    def read_item(self, record: Record) -> Blank:
        before, blank, after = record.text("sentence").partition("_")
        if not blank:
            raise record.error("sentence", "has no blank; one of the options must be missing, and _ be in its place")
        if str(record.get("answer")) not in ("1", "2"):
            raise record.error("answer", "must be 1 or 2; files without answers, as of test sets, cannot be scored")
        contexts = (before + record.text("option1"), before + record.text("option2"))
        return Blank(contexts, after.strip(), int(record.get("answer")) - 1)

    @override
    def requests(self, item: Blank, prefix: str = "") -> tuple[Loglikelihood, ...]:
        return tuple(Loglikelihood(prefix + context, f" {item.rest}") for context in item.contexts)

    @override
    def score(self, item: Blank, results: Sequence[LoglikelihoodResult]) -> dict[str, Score]:
        first, second = (result[0] for result in results)
        return {"acc": float((second > first) == item.answer)}

    @override
    def example(self, item: Blank) -> str:
        return f"{item.contexts[item.answer]} {item.rest}\n\n"
