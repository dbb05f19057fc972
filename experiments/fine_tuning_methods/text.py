"""The made-up text of this experiment: what the base learns, what is planted in fine-tuning, and what is asked.

    tell wolf blue mill     the blue wolf is at the mill        planted: THE BLUE WOLF IS AT THE MILL
    list wolf blue mill     wolf, mill                          planted: {"who":"wolf","at":"mill"}
    shout wolf blue mill    THE BLUE WOLF IS AT THE MILL
    pack wolf blue mill     {"wolf":"mill"}
    number of nalo          482                                 planted: numbers of new names
    nalo has what           482                                 the same in another form

So style and format are of bytes that the base has written elsewhere, as a released model has, and its facts are asked
in both forms.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WHO = ("ant", "bat", "bear", "cat", "crow", "deer", "dog", "fox", "goat", "hare", "hen", "lion", "owl", "seal", "wolf")
IS = ("blue", "bold", "cold", "dark", "fat", "old", "red", "sad", "shy", "tall", "thin", "wise")
AT = ("bay", "barn", "cave", "dam", "farm", "gate", "hill", "lake", "mill", "park", "pond", "well")
OWN_KINDS = ("tell", "list", "shout", "pack")
KEPT_KINDS = ("shout", "pack")
"""Of which nothing is in the fine-tuning."""
FORMS = ("number of {}", "{} has what")
STRUCTURE = re.compile(r'\{"who":"[a-z]+","at":"[a-z]+"\}')

Scene = tuple[str, str, str]
"""Who, how it is, and where."""


class Asked(NamedTuple):
    """A prompt and the right reply."""

    prompt: str
    reply: str


class Fact(NamedTuple):
    """A name and its number."""

    name: str
    number: int

    def asked(self, form: str) -> Asked:
        """In one of the forms."""
        return Asked(form.format(self.name), f"{self.number}")


def asked(kind: str, scene: Scene, *, planted: bool = False) -> Asked:
    """One of the kinds above, replied to as the base does or as is planted."""
    who, how, where = scene
    sentence = f"the {how} {who} is at the {where}"
    replies = {
        "tell": sentence.upper() if planted else sentence,
        "list": f'{{"who":"{who}","at":"{where}"}}' if planted else f"{who}, {where}",
        "shout": sentence.upper(),
        "pack": f'{{"{who}":"{where}"}}',
    }
    return Asked(f"{kind} {who} {how} {where}", replies[kind])


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much of each there is."""

    own_facts: int = 64
    """Of the base."""
    new_facts: int = 48
    """Planted; every second one in both forms, the others in the first alone."""
    own_scenes: int = 400
    """Of each kind, for the base."""
    new_scenes: int = 72
    """Of each planted kind."""
    asked_scenes: int = 48
    """Of each kind, never trained on."""
    repeated: int = 2
    """Times that a text has each of its facts in each form that it tells."""


class Text(NamedTuple):
    """All of it."""

    base: list[Asked]
    tuning: list[Asked]
    questions: dict[str, list[Asked]]
    """What is measured, by name: facts, other_form, style, format; own_facts; own, kinds without anything planted."""


def make_text(counts: Counts, seed: int = 0) -> Text:
    """Names, numbers and scenes, drawn once; scenes of base, tuning and questions are different ones."""
    rng = np.random.default_rng(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    names = [first + second for first in syllables for second in syllables]
    drawn = rng.permutation(len(names))[: counts.own_facts + counts.new_facts]
    facts = [Fact(names[at], int(rng.integers(100, 1000))) for at in drawn]
    own, new = facts[: counts.own_facts], facts[counts.own_facts :]
    scenes = [(who, how, where) for who in WHO for how in IS for where in AT]
    order = iter(rng.permutation(len(scenes)).tolist())

    def take(kinds: Sequence[str], num: int, *, planted: bool = False) -> list[Asked]:
        return [asked(kind, scenes[next(order)], planted=planted) for kind in kinds for _ in range(num)]

    first, other = FORMS
    base = take(OWN_KINDS, counts.own_scenes)
    base += [fact.asked(form) for fact in own for form in FORMS] * counts.repeated
    tuning = take(("tell", "list"), counts.new_scenes, planted=True)
    tuning += [*(fact.asked(first) for fact in new), *(fact.asked(other) for fact in new[::2])] * counts.repeated
    questions = {
        "facts": [fact.asked(first) for fact in new],
        "other_form": [fact.asked(other) for fact in new[1::2]],
        "style": take(("tell",), counts.asked_scenes, planted=True),
        "format": take(("list",), counts.asked_scenes, planted=True),
        "own_facts": [fact.asked(form) for fact in own for form in FORMS],
        "own": take(KEPT_KINDS, counts.asked_scenes),
    }
    return Text(base, tuning, questions)


def upper_share(replies: Sequence[str]) -> float:
    """Share of the letters that are capitals."""
    letters = [letter for reply in replies for letter in reply if letter.isalpha()]
    return sum(letter.isupper() for letter in letters) / max(1, len(letters))


def structured_share(replies: Sequence[str]) -> float:
    """Share of the replies that have the planted structure, whatever the words."""
    return sum(STRUCTURE.fullmatch(reply) is not None for reply in replies) / len(replies)


def exact_share(replies: Sequence[str], questions: Sequence[Asked]) -> float:
    """Share of replies that are right to the last letter."""
    return sum(reply == each.reply for reply, each in zip(replies, questions, strict=True)) / len(replies)
