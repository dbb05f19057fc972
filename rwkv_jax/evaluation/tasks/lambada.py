"""LAMBADA: the last word of a passage that only the whole passage tells (Paperno et al. 2016, arXiv:1606.06031)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from rwkv_jax.checks import ConfigError
from rwkv_jax.data.text.files import inner_suffix, read_text
from rwkv_jax.evaluation.requests import Loglikelihood, LoglikelihoodResult
from rwkv_jax.evaluation.statistics import perplexity
from rwkv_jax.evaluation.tasks.base import Metric, Score, Task
from rwkv_jax.evaluation.tasks.multiple_choice import ACCURACY
from rwkv_jax.evaluation.tasks.records import Record, read_records


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage without its last word, and that word behind a blank."""

    context: str
    target: str


@dataclasses.dataclass(frozen=True)
class Lambada(Task[Passage]):
    """Whether each token of the last word is the most likely one (acc); exp of the mean -log p(word) (perplexity)."""

    formats: ClassVar = "JSON lines with text (OpenAI's form), or .txt with one passage on each line (the original)"
    source: ClassVar = "lm-eval lambada_openai 1.0"
    files: ClassVar = ("lambada_test.jsonl", "test.jsonl", "lambada_test_plain_text.txt")
    metrics: ClassVar = {"perplexity": Metric(perplexity, higher_is_better=False, unit="per word"), "acc": ACCURACY}
    name: str = "lambada"

    @override
    def read_file(self, file: Path) -> list[Passage]:
        if inner_suffix(file.name) != ".txt":
            return [self.read_item(record) for record in read_records(file)]
        lines = enumerate(read_text(file).split("\n"), start=1)
        return [_divided(line, f"{file}, line {number}") for number, line in lines if line.strip()]

    @override
    def read_item(self, record: Record) -> Passage:
        return _divided(record.text("text"), f"{record.place}: text")

    @override
    def requests(self, item: Passage, prefix: str = "") -> tuple[Loglikelihood, ...]:
        return (Loglikelihood(prefix + item.context, item.target),)

    @override
    def score(self, item: Passage, results: Sequence[LoglikelihoodResult]) -> dict[str, Score]:
        (logprob, is_greedy), *_ = results
        return {"perplexity": float(logprob), "acc": float(is_greedy)}

    @override
    def example(self, item: Passage) -> str:
        return f"{item.context} {item.target}\n\n"  # two blanks, as lm-eval has them


def _divided(text: str, place: str) -> Passage:
    context, blank, word = text.rpartition(" ")
    if not blank:
        raise ConfigError(f"{place}: must have a blank before its last word")
    return Passage(context, " " + word)
