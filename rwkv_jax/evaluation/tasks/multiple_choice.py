"""Tasks that ask which of several continuations of one context is the most likely."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from rwkv_jax.evaluation.requests import Loglikelihood, LoglikelihoodResult
from rwkv_jax.evaluation.tasks.base import Metric, Score, Task

ACCURACY = Metric()


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question with possible answers."""

    context: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right one."""
    group: str | None = None


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Task[Choice]):
    """The choice with the highest log-probability (acc), and with the highest by its characters (acc_norm)."""

    metrics: ClassVar = {"acc": ACCURACY, "acc_norm": ACCURACY}

    @override
    def requests(self, item: Choice, prefix: str = "") -> tuple[Loglikelihood, ...]:
        return tuple(Loglikelihood(prefix + item.context, f" {choice}") for choice in item.choices)

    @override
    def score(self, item: Choice, results: Sequence[LoglikelihoodResult]) -> dict[str, Score]:
        logprobs = np.array([result[0] for result in results], np.float64)
        lengths = np.array([len(choice) for choice in item.choices], np.float64)
        with np.errstate(divide="ignore"):  # a choice without characters is never the most likely
            chosen = {"acc": np.argmax(logprobs), "acc_norm": np.argmax(logprobs / lengths)}
        return {name: float(chosen[name] == item.answer) for name in self.metrics}

    @override
    def example(self, item: Choice) -> str:
        return f"{item.context} {item.choices[item.answer]}\n\n"

    @override
    def group(self, item: Choice) -> str | None:
        return item.group
