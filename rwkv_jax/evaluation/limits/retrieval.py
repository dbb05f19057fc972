"""Needles in a text: a grid of how often a fact is found, by the length of the text and by how far back it stands.

Two kinds. `passkey`: five digits, with other numbers of five digits in the text; `needle`: who has what, with other
people and things. The likeliest of eight choices, all of them in the text, counts: chance is 1/8, a model without
instructions can be asked, and one that only says again what it has seen is no better than chance. Sources: Mohtashami
& Jaggi 2023 (arXiv:2305.16300) for the pass key; Kamradt's needle in a haystack (2023) for the grid.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.encoding import Encoder
from rwkv_jax.evaluation.limits.material import FILLER, Question, draw_facts, is_right
from rwkv_jax.evaluation.requests import Scorer
from rwkv_jax.evaluation.statistics import Estimate, estimate

Kind = Literal["passkey", "needle"]

NUM_CHOICES = 8


class Grid(NamedTuple):
    """How often a fact is found."""

    lengths: tuple[int, ...]
    """Tokens of the text, about."""
    depths: tuple[float, ...]
    """Where the fact stands: 0 at the beginning, 1 right before the question."""
    accuracy: tuple[tuple[Estimate, ...], ...]
    """[lengths][depths]."""
    chance: float


def retrieval_grid(
    scorer: Scorer,
    tokenizer: Encoder,
    kind: Kind,
    lengths: Sequence[int] = (256, 1024, 4096),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    samples: int = 8,
    seed: int = 0,
) -> Grid:
    """Asks for a fact in texts of each length, at each depth.

    Args:
      tokenizer: counts the tokens of the text around the fact.
      samples: texts for each cell of the grid.

    Raises:
      ConfigError: a length without room for the fact, or a depth outside [0, 1].
    """
    if not lengths or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ConfigError(f"depths = {tuple(depths)}: must lie in [0, 1], and there must be a length, too")
    questions: list[Question] = []
    for length, depth in itertools.product(lengths, depths):
        generator = random.Random(f"{seed} {kind} {length} {depth}")
        questions += [make_question(tokenizer, kind, length, depth, generator) for _ in range(samples)]
    right = iter(is_right(scorer, questions))
    cells = [[estimate([float(next(right)) for _ in range(samples)]) for _ in depths] for _ in lengths]
    return Grid(tuple(lengths), tuple(depths), tuple(map(tuple, cells)), 1 / NUM_CHOICES)


def make_question(tokenizer: Encoder, kind: Kind, length: int, depth: float, generator: random.Random) -> Question:
    """One text with a fact at a depth, and what is asked behind it."""
    if kind == "passkey":
        keys = generator.sample(range(10_000, 100_000), NUM_CHOICES)
        fact, asked = f"The pass key is {keys[0]}. ", "What is the pass key? The pass key is"
        others = [f"The number of the house is {key}. " for key in keys[1:]]
        choices = [f" {key}" for key in keys]
    else:
        facts = draw_facts(generator, NUM_CHOICES)
        fact, asked = facts[0].sentence, f"What does {facts[0].name} have? {facts[0].name} has the"
        others = [each.sentence for each in facts[1:]]
        choices = [f" {each.thing}" for each in facts]
    room = length - len(tokenizer.encode("".join([fact, *others, asked])))
    if room < 0:
        raise ConfigError(f"lengths = {length}: has no room for the facts and the question; at least {length - room}")
    sentences = filler(tokenizer, room, generator)
    for other in others:
        sentences.insert(generator.randrange(len(sentences) + 1), other)
    place = round(depth * len(sentences))
    text = "".join([*sentences[:place], fact, *sentences[place:], asked])
    order = generator.sample(range(NUM_CHOICES), NUM_CHOICES)
    return Question(text, tuple(choices[i] for i in order), order.index(0))


def filler(tokenizer: Encoder, num_tokens: int, generator: random.Random) -> list[str]:
    """Sentences that say nothing, of at most so many tokens, in an order drawn anew for each round of all of them."""
    costs = {sentence: len(tokenizer.encode(sentence)) for sentence in FILLER}
    sentences: list[str] = []
    while True:
        for sentence in generator.sample(FILLER, len(FILLER)):
            num_tokens -= costs[sentence]
            if num_tokens < 0:
                return sentences
            sentences.append(sentence)
