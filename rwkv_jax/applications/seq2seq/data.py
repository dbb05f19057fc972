"""Pairs of texts, made by rules.

    reversal          "abca"                           "acba"
    transliteration   "gentschoss"                     "jentqos"; what a letter becomes depends on its neighbors
    number_words      "seven hundred forty-two"        "742"
    dates             "tuesday, 1st of december 2026"  "2026-12-01"

A target that is held out is trained on in no form: dates, for one, are held out by day, however they are written.
Numbers below 100 are all trained on: the rule for longer ones is made of them, and held out they would be rarer.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rwkv_jax.applications.seq2seq.config import ALPHABET, END, FIRST, Seq2Seq
from rwkv_jax.config import ConfigError
from rwkv_jax.training.examples import Examples

Pair = tuple[str, str]
IDS = {character: FIRST + index for index, character in enumerate(ALPHABET)}


class Batch(NamedTuple):
    """Sources and targets, padded with zeros."""

    source: Any
    """Integers [B, S]."""
    source_length: Any
    """[B], at least 1."""
    target: Any
    """Integers [B, U]; the last one that counts is the end."""
    target_length: Any
    """[B], at least 1."""
    weight: Any


def encode(texts: list[str], size: int, *, has_end: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n, size], zeros beyond each text, and lengths [n], with the end if there is one.

    Raises:
      ConfigError: a text that is empty, too long, or has other characters.
    """
    ids = np.full((len(texts), size), END, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        other = sorted(set(text) - set(ALPHABET))
        if other or len(text) + has_end > size or not (text or has_end):
            reason = f"has {other}, which are not in {ALPHABET!r}" if other else f"must have 1 to {size - has_end}"
            raise ConfigError(f"text {text!r} of {len(text)} characters: {reason}")
        ids[row, : len(text)] = [IDS[character] for character in text]
        lengths[row] = len(text) + has_end
    return ids, lengths


def decode(ids: np.ndarray) -> str:
    """The text of token ids [U], up to the end; ids of no character are left out."""
    end = np.flatnonzero(np.asarray(ids) == END)
    own = np.asarray(ids)[: end[0] if len(end) else None]
    return "".join(ALPHABET[i - FIRST] for i in own if FIRST <= i < FIRST + len(ALPHABET))


def reversal(draws: np.random.Generator, settings: Seq2Seq) -> Pair:
    """Up to ten different letters, any number of times, and the same from their end."""
    count = int(draws.integers(settings.min_symbols, settings.max_symbols + 1))
    text = "".join(ALPHABET[15 + i] for i in draws.integers(0, 10, count))
    return text, text[::-1]


RULES = (
    (r"sch|sh", "x"),
    (r"ch|tj", "q"),
    (r"ph", "f"),
    (r"c(?=[ei])", "s"),
    (r"c", "k"),
    (r"g(?=[ei])", "j"),
    (r"(?<=[aeiou])s(?=[aeiou])", "z"),
    (r"(?<=[^aeiou])e$", ""),
    (r"n(?=[bp])", "m"),
    (r"(.)\1", r"\1"),
    (r"y(?=[^aeiou]|$)", "i"),
)
"""From the first to the last, over the whole word."""


def transliterate(word: str) -> str:
    """The word by `RULES`."""
    for pattern, replacement in RULES:
        word = re.sub(pattern, replacement, word)
    return word


def transliteration(draws: np.random.Generator, settings: Seq2Seq) -> Pair:
    """A made-up word of two to five syllables, and what the rules make of it."""
    del settings
    onsets = ("b", "c", "ch", "g", "l", "m", "n", "p", "ph", "s", "sch", "sh", "t", "tj", "ss", "tt", "")
    vowels, codas = ("a", "e", "i", "o", "u", "y"), ("", "", "n", "s", "t", "l")
    syllables = ("".join(str(draws.choice(part)) for part in (onsets, vowels, codas)) for _ in range(5))
    word = ""
    for syllable in tuple(syllables)[: int(draws.integers(2, 6))]:
        if len(word + syllable) <= 16:
            word += syllable
    return word, transliterate(word)


ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A number from 0 to 99,999 in English."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {in_words(number % unit)}" if number % unit else ""
    return f"{in_words(number // unit)} {name}{rest}"


def number_words(draws: np.random.Generator, settings: Seq2Seq) -> Pair:
    """A number of one to five digits, each as likely, in words and in digits."""
    del settings
    number = int(draws.integers(0, 10 ** int(draws.integers(1, 6))))
    return in_words(number), str(number)


def dates(draws: np.random.Generator, settings: Seq2Seq) -> Pair:
    """A day from 1900 to 2099 in one of eight forms, and in that of ISO 8601."""
    del settings
    day = datetime.date(1900, 1, 1) + datetime.timedelta(int(draws.integers(0, 73049)))
    month, weekday = day.strftime("%B").lower(), day.strftime("%A").lower()
    tenth = 0 if 10 < day.day < 20 else day.day % 10
    ordinal = f"{day.day}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(tenth, 'th') }"
    forms = (
        f"{day.day} {month} {day.year}",
        f"{month} {day.day}, {day.year}",
        f"{day.day}.{day.month}.{day.year}",
        f"{day.month}/{day.day}/{day.year}",
        f"{ordinal} of {month} {day.year}",
        f"{month[:3]} {day.day} {day.year}",
        f"{weekday}, {ordinal} of {month} {day.year}",
        f"{weekday[:3]}, {day.day:02} {month[:3]} {day.year}",
    )
    return forms[int(draws.integers(len(forms)))], day.isoformat()


TASKS: dict[str, Callable[[np.random.Generator, Seq2Seq], Pair]] = {
    "reversal": reversal,
    "transliteration": transliteration,
    "number_words": number_words,
    "dates": dates,
}


def may_be_held_out(task: str, target: str) -> bool:
    """Whether a target is one of enough that some can be left out of training."""
    return task != "number_words" or len(target) > 2


def batch_of(pairs: list[Pair], settings: Seq2Seq) -> Batch:
    """Pairs as arrays."""
    source_size, target_size = settings.sizes
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    source, source_length = encode(sources, source_size)
    target, target_length = encode(targets, target_size, has_end=True)
    return Batch(source, source_length, target, target_length, np.ones(len(pairs), np.float32))


def examples(settings: Seq2Seq, seed: int) -> tuple[Examples, Examples]:
    """Pairs to train on, and held-out ones, of different targets.

    Raises:
      ConfigError: the task has too few different targets.
    """
    draws, draw = np.random.default_rng([seed, 0x5E9]), TASKS[settings.task]
    held_out: dict[str, Pair] = {}
    wanted, drawn = settings.num_held_out, 0
    while len(held_out) < wanted:
        pair = draw(draws, settings)
        if may_be_held_out(settings.task, pair[1]):
            held_out.setdefault(pair[1], pair)
        drawn += 1
        if drawn > 100 * wanted + 1000:
            raise ConfigError(
                f"seq2seq.num_held_out = {wanted}: {settings.task} has too few different targets; take fewer"
            )
    training: list[Pair] = []
    drawn = 0
    while len(training) < settings.num_examples:
        pair = draw(draws, settings)
        drawn += 1
        if pair[1] not in held_out:
            training.append(pair)
        elif drawn > 100 * (len(training) + 10):
            raise ConfigError(f"seq2seq.num_held_out = {wanted}: leaves nothing of {settings.task} to train on")
    return Examples(batch_of(training, settings), name="pair"), Examples(
        batch_of(list(held_out.values()), settings), name="pair"
    )
