"""Sentences of which the probes are made: facts about invented people, and what stands between them.

They are written for this project, so that no model has read them with their answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from rwkv_jax.evaluation.requests import Loglikelihood, Scorer
from rwkv_jax.evaluation.statistics import Estimate, estimate

NAMES = (
    "Anna", "Boris", "Clara", "David", "Emma", "Frank", "Greta", "Henry", "Irene", "Jacob", "Karla", "Louis",
    "Maria", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tina", "Ulrich", "Vera", "Walter", "Xenia", "Yann",
    "Agnes", "Bruno", "Celia", "Dario", "Elsa", "Felix", "Gina", "Hugo",
)  # fmt: skip
THINGS = (
    "lamp", "key", "book", "coin", "rope", "drum", "bell", "kite", "plate", "spoon", "chair", "clock",
    "hat", "ring", "map", "knife", "brush", "glass", "shoe", "ball", "stone", "flute", "comb", "box",
    "candle", "pen", "scarf", "wheel", "mirror", "basket", "hammer", "blanket",
)  # fmt: skip
FILLER = (
    "The road went on between the fields. ",
    "A cart passed, and nobody looked up. ",
    "It rained a little, then the clouds left. ",
    "Two dogs slept in front of the mill. ",
    "Somebody was singing behind the wall. ",
    "The bread was warm and the water cold. ",
)


class Question(NamedTuple):
    """A context and what may follow it, of which one is right."""

    context: str
    choices: tuple[str, ...]
    """Each with the blank before it."""
    answer: int


class Fact(NamedTuple):
    """Who has what."""

    name: str
    thing: str

    @property
    def sentence(self) -> str:
        """Anna has the lamp."""
        return f"{self.name} has the {self.thing}. "


def draw_facts(generator: random.Random, num: int) -> list[Fact]:
    """Facts about different people who have different things. Raises ValueError for more than there are names."""
    if num > len(NAMES):
        raise ValueError(f"num = {num}: there are {len(NAMES)} names")
    return list(map(Fact, generator.sample(NAMES, num), generator.sample(THINGS, num)))


def is_right(scorer: Scorer, questions: Sequence[Question]) -> list[bool]:
    """Whether the likeliest choice of each question is the right one."""
    asked = [Loglikelihood(each.context, choice) for each in questions for choice in each.choices]
    results = iter(scorer.loglikelihood(asked))
    found = []
    for question in questions:
        logprobs = [next(results).logprob for _ in question.choices]
        found.append(max(range(len(logprobs)), key=logprobs.__getitem__) == question.answer)
    return found


def accuracy(scorer: Scorer, questions: Sequence[Question]) -> Estimate:
    """The share of questions whose likeliest choice is the right one."""
    return estimate([float(right) for right in is_right(scorer, questions)])
