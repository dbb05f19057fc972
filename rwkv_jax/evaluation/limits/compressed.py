"""What compressed weights cost: bits a byte beside what they may hide, recall of words and equality of choices.

Bits a byte are a mean over all tokens, most of which any model predicts. Where a text says a rare word again, a model
must have kept it: there small errors of the matrices show first.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
from flax import nnx

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.engine_scorer import EngineScorer
from rwkv_jax.evaluation.requests import Loglikelihood
from rwkv_jax.evaluation.statistics import Estimate, estimate
from rwkv_jax.inference.engine.engine import Engine

_WORD = re.compile(r"[A-Za-z_]{4,}")
_GENERATED = 64


class LastWord(NamedTuple):
    """A passage, and the word with which it goes on, which it has had before."""

    context: str
    word: str


class CompressedRow(NamedTuple):
    """One way to hold the weights."""

    name: str
    weight_bytes: int
    """Of all parameters, as they are held."""
    bits_per_byte: float
    """Of the texts."""
    agreement: float
    """Share of tokens after which the likeliest next token is the first row's."""
    last_word: Estimate
    """Share of passages whose next word the model has as the likeliest tokens."""
    decode_rate: float
    """Tokens a second, one text alone; the median of three."""


def last_words(text: str, num: int, *, seed: int = 0, context_bytes: int = 512) -> list[LastWord]:
    """Passages that end before a word of four letters or more that stands in the passage already.

    After LAMBADA (Paperno et al. 2016, arXiv:1606.06031), whose last words are guessed from the whole passage; here
    they are found by rule, so that any text will do.

    Raises:
      ConfigError: the text has none.
    """
    found = []
    for match in _WORD.finditer(text):
        context = text[max(0, match.start() - context_bytes) : match.start()]
        blank = context.endswith(" ")
        if blank and match.start() >= context_bytes and match.group() in _WORD.findall(context):
            found.append(LastWord(context[:-1], f" {match.group()}"))
    if not found:
        raise ConfigError("texts: none says a word of four letters or more again; give longer ones")
    return random.Random(seed).sample(found, min(num, len(found)))


def compressed(
    engines: Iterable[tuple[str, Callable[[], Engine]]], texts: Sequence[str], *, num_words: int = 128, seed: int = 0
) -> list[CompressedRow]:
    """A row for each way to hold the weights; the first is what others are compared with.

    Args:
      engines: names, and functions that load one, which is closed before the next.
      texts: of which bits a byte are measured, and from which passages are taken.
    """
    words = last_words("\n".join(texts), num_words, seed=seed)
    rows: list[CompressedRow] = []
    first: list[int] = []
    for name, load in engines:
        with load() as engine:
            scores = engine.score(list(texts), top_logprobs=1)
            likeliest = [top[0][0] for score in scores for top in score.top]
            first = first or likeliest
            results = EngineScorer(engine).loglikelihood([Loglikelihood(*word) for word in words])
            nats = -math.fsum(score.logprob for score in scores)
            rows.append(
                CompressedRow(
                    name,
                    sum(x.nbytes for x in jax.tree.leaves(nnx.state(engine.model))),
                    nats / math.log(2) / sum(len(text.encode()) for text in texts),
                    sum(a == b for a, b in zip(first, likeliest, strict=True)) / len(first),
                    estimate([float(result.is_greedy) for result in results]),
                    _decode_rate(engine),
                )
            )
    return rows


def _decode_rate(engine: Engine) -> float:
    prompt = [engine.tokenizer.end_of_text]
    stop_ids = ()
    times = []
    for _ in range(4):
        start = time.perf_counter()
        engine.generate(prompt, max_tokens=_GENERATED, sampling="greedy", stop_ids=stop_ids)
        times.append(time.perf_counter() - start)
    return _GENERATED / sorted(times[1:])[1]  # the first one compiles
