"""ARC: questions of science tests, easy and challenging ones (Clark et al. 2018, arXiv:1803.05457)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from typing_extensions import override

from rwkv_jax.evaluation.tasks.multiple_choice import Choice, MultipleChoice
from rwkv_jax.evaluation.tasks.records import Record


@dataclasses.dataclass(frozen=True)
class _Arc(MultipleChoice):
    """Questions with three to five choices."""

    formats: ClassVar = (
        "JSON lines with question, choices and answerKey: choices of text and label (as on Hugging Face), or question "
        "of stem and choices (as released)"
    )

    @override
    def read_item(self, record: Record) -> Choice:
        if isinstance(record.get("question"), dict):
            question, texts, labels = _as_released(record)
        else:
            choices = record.record("choices")
            question, texts, labels = record.text("question"), choices.texts("text"), choices.texts("label")
        if len(labels) != len(texts):
            raise record.error("choices", f"has {len(texts)} texts and {len(labels)} labels")
        key = record.get("answerKey")
        if key not in labels:
            raise record.error("answerKey", f"must be the label of a choice: {', '.join(labels)}")
        return Choice(f"Question: {question}\nAnswer:", texts, labels.index(key))


def _as_released(record: Record) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    question = record.record("question")
    choices = question.records("choices")
    texts = tuple(choice.text("text") for choice in choices)
    return question.text("stem"), texts, tuple(choice.text("label") for choice in choices)


@dataclasses.dataclass(frozen=True)
class ArcEasy(_Arc):
    """ARC's easy questions."""

    source: ClassVar = "lm-eval arc_easy 1.0"
    files: ClassVar = ("ARC-Easy-Test.jsonl", "ARC-Easy/ARC-Easy-Test.jsonl", "ARC-Easy/test.jsonl", "test.jsonl")
    example_files: ClassVar = (
        "ARC-Easy-Train.jsonl",
        "ARC-Easy/ARC-Easy-Train.jsonl",
        "ARC-Easy/train.jsonl",
        "train.jsonl",
    )
    name: str = "arc_easy"


@dataclasses.dataclass(frozen=True)
class ArcChallenge(_Arc):
    """ARC's questions that simple methods answer wrongly."""

    source: ClassVar = "lm-eval arc_challenge 1.0"
    files: ClassVar = tuple(name.replace("Easy", "Challenge") for name in ArcEasy.files)
    example_files: ClassVar = tuple(name.replace("Easy", "Challenge") for name in ArcEasy.example_files)
    name: str = "arc_challenge"
