"""What tasks ask of a model, and who answers: the protocol between tasks, which know no model, and scorers, no task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

Text = str | tuple[int, ...]
"""A text, or token ids, which are used unchanged."""


@dataclasses.dataclass(frozen=True)
class Loglikelihood:
    """How likely is this continuation of a context?"""

    context: Text
    """May be empty: the continuation then begins the text."""
    continuation: Text
    """What is scored; of the same kind as the context, and not empty. `encoding.encode_pair` divides the tokens."""


@dataclasses.dataclass(frozen=True)
class Rolling:
    """How likely is a whole text, from its first token?"""

    text: Text


@dataclasses.dataclass(frozen=True)
class Generate:
    """What does the model write, always the most likely token?"""

    context: Text
    until: tuple[str, ...]
    """The answer ends before the first of these; else at the end of text."""
    max_tokens: int = 256
    """Upper bound of the answer's length."""


Request = Loglikelihood | Rolling | Generate


class LoglikelihoodResult(NamedTuple):
    """The answer to a `Loglikelihood`."""

    logprob: float
    """Sum over the continuation's tokens, nats."""
    is_greedy: bool
    """Whether each of them is the most likely one where it stands."""


Result = LoglikelihoodResult | float | str
"""Of a `Loglikelihood`; of a `Rolling`, its log-probability in nats; of a `Generate`, the answer's text."""

AnyResult = TypeVar("AnyResult")
Reporter = Callable[[int, AnyResult], None]
"""Takes the index of a request and its result, as soon as that is known, in any order."""


class Scorer(Protocol):
    """A model that answers requests. Results are in the order of the requests; `report` hears of each early."""

    def loglikelihood(
        self, requests: Sequence[Loglikelihood], /, report: Reporter[LoglikelihoodResult] | None = None
    ) -> list[LoglikelihoodResult]:
        """Log-probabilities of continuations."""
        ...

    def rolling(self, requests: Sequence[Rolling], /, report: Reporter[float] | None = None) -> list[float]:
        """Log-probabilities of whole texts, nats; 0 of an empty one."""
        ...

    def generate(self, requests: Sequence[Generate], /, report: Reporter[str] | None = None) -> list[str]:
        """Texts of answers."""
        ...


def answer(scorer: Scorer, requests: Sequence[Request], report: Reporter[Any] | None = None) -> list[Any]:
    """Results of requests of any kinds, in their order: each kind is asked for at once."""
    results: list[Any] = [None] * len(requests)
    asks: tuple[tuple[type[Any], Callable[..., list[Any]]], ...] = (
        (Loglikelihood, scorer.loglikelihood),
        (Rolling, scorer.rolling),
        (Generate, scorer.generate),
    )
    for kind, ask in asks:
        places = [i for i, request in enumerate(requests) if isinstance(request, kind)]
        if not places:
            continue
        chosen: list[Any] = [requests[i] for i in places]
        for i, result in zip(places, ask(chosen, report and _renumbered(report, places)), strict=True):
            results[i] = result
    return results


def _renumbered(report: Reporter[Any], places: Sequence[int]) -> Reporter[Any]:
    return lambda i, result: report(places[i], result)
