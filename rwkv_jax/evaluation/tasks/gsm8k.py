"""GSM8K: word problems of grade school, answered step by step (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from rwkv_jax.evaluation.requests import Generate
from rwkv_jax.evaluation.tasks.base import Score, Task
from rwkv_jax.evaluation.tasks.multiple_choice import ACCURACY
from rwkv_jax.evaluation.tasks.records import Record

UNTIL = ("Question:", "</s>", "<|im_end|>")
MAX_TOKENS = 256
_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem and its solution, which ends in #### and the number."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Gsm8k(Task[Problem]):
    """Whether the number is right that follows the first #### (strict), or that stands last (flexible)."""

    formats: ClassVar = "JSON lines with question and answer, which ends in #### and the number"
    source: ClassVar = "lm-eval gsm8k 3.0"
    files: ClassVar = ("test.jsonl",)
    example_files: ClassVar = ("train.jsonl",)
    metrics: ClassVar = {"exact_match_strict": ACCURACY, "exact_match_flexible": ACCURACY}
    default_num_fewshot: ClassVar = 5
    name: str = "gsm8k"

    @override
    def read_item(self, record: Record) -> Problem:
        answer = record.text("answer")
        if _MARKED.search(answer) is None:
            raise record.error("answer", "must end in #### and the number")
        return Problem(record.text("question"), answer)

    @override
    def requests(self, item: Problem, prefix: str = "") -> tuple[Generate, ...]:
        return (Generate(f"{prefix}Question: {item.question}\nAnswer:", UNTIL, MAX_TOKENS),)

    @override
    def score(self, item: Problem, results: Sequence[str]) -> dict[str, Score]:
        found = {"strict": strict_answer(results[0]), "flexible": flexible_answer(results[0])}
        right = comparable(item.answer)
        return {f"exact_match_{kind}": float(comparable(answer) == right) for kind, answer in found.items()}

    @override
    def example(self, item: Problem) -> str:
        return f"Question: {item.question}\nAnswer: {item.answer}\n\n"


def strict_answer(text: str) -> str:
    """The number behind the first ####; "[invalid]" if there is none."""
    found = _MARKED.search(text)
    return found[1] if found else "[invalid]"


def flexible_answer(text: str) -> str:
    """The last thing that looks like a number or a price; "[invalid]" if there is none."""
    found = _NUMBER.findall(text)
    return found[-1] if found else "[invalid]"


def comparable(answer: str) -> str:
    """An answer in the form that is compared: only what follows ####, without thousands' commas, $ and a full stop."""
    number = answer.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", number).lower()
