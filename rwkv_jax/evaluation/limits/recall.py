"""How many facts does the state hold? Recall by the number of facts in a text, and by the order of fact and question.

A state of constant size cannot hold any number of facts, so accuracy must fall somewhere. A model that reads the
question first need keep one fact only (RWKV-4's paper, arXiv 2305.13048, section 9, reports such sensitivity to order).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.limits.material import NAMES, Question, accuracy, draw_facts
from rwkv_jax.evaluation.requests import Scorer
from rwkv_jax.evaluation.statistics import Estimate


class Recall(NamedTuple):
    """Accuracy with so many facts in the text; the choices are the things in it, so knowing those is not enough."""

    num_facts: int
    question_last: Estimate
    """Facts, then the question."""
    question_first: Estimate
    """The question, then facts, then the beginning of the answer."""
    chance: float


def recall(
    scorer: Scorer, nums: Sequence[int] = (2, 4, 8, 16, 32), *, samples: int = 64, seed: int = 0
) -> list[Recall]:
    """Accuracy by the number of facts, in both orders; the same facts and questions are asked in either.

    Args:
      nums: facts in a text, from 2 to 32.
      samples: texts for each number.

    Raises:
      ConfigError: a number that is not in this range.
    """
    check_nums(nums)
    found = []
    for num in nums:
        generator = random.Random(f"{seed} {num}")
        asked = [make_questions(generator, num) for _ in range(samples)]
        last, first = (accuracy(scorer, [each[order] for each in asked]) for order in range(2))
        found.append(Recall(num, last, first, 1 / num))
    return found


def check_nums(nums: Sequence[int]) -> None:
    """Raises ConfigError for a number of facts that is out of range."""
    for num in nums:
        if not 2 <= num <= len(NAMES):
            raise ConfigError(f"nums_facts = {num}: must lie between 2 and {len(NAMES)}")


def make_questions(generator: random.Random, num: int) -> tuple[Question, Question]:
    """A question behind some facts, and the same before them."""
    facts = draw_facts(generator, num)
    answer = generator.randrange(num)
    text = "".join(fact.sentence for fact in facts)
    name = facts[answer].name
    question, begin = f"What does {name} have? ", f"{name} has the"
    choices = tuple(f" {fact.thing}" for fact in facts)
    return Question(text + question + begin, choices, answer), Question(question + text + begin, choices, answer)
