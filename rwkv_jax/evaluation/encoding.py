"""Tokens of requests, divided as lm-eval 0.4 divides them (`TemplateLM._encode_pair`, `get_rolling_token_windows`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from rwkv_jax.evaluation.requests import Text


class Encoder(Protocol):
    """What a tokenizer must have."""

    @property
    def begin(self) -> tuple[int, ...]:
        """Ids before the first of a text."""
        ...

    @property
    def beginning(self) -> tuple[int, ...]:
        """Ids of a text that has not begun, at least one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...


class Pair(NamedTuple):
    """Token ids to score, behind those that the model has read before."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def encode_pair(tokenizer: Encoder, context: Text, continuation: Text, *, begin: bool = True) -> Pair:
    """Tokens of a context and of its continuation.

    Blanks at the end of the context move to the continuation, and the two are encoded together: the continuation's
    tokens are those after as many as the context alone has. If that leaves none, the continuation is encoded by itself.

    Args:
      context, continuation: two texts, or ids of both, which are used unchanged.
      begin: as in `begun`.
    """
    if isinstance(context, str) and isinstance(continuation, str):
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        before = tuple(tokenizer.encode(context)) if context else ()
        after = tuple(tokenizer.encode(context + continuation))[len(before) :] or tuple(tokenizer.encode(continuation))
    elif isinstance(context, str) or isinstance(continuation, str):
        raise TypeError("context and continuation must be two texts, or token ids both")
    else:
        before, after = tuple(context), tuple(continuation)
    if not after:
        raise ValueError("the continuation is empty: there is nothing to score")
    return Pair(begun(tokenizer, before, begin=begin), after)


def begun(tokenizer: Encoder, ids: tuple[int, ...], *, begin: bool = True) -> tuple[int, ...]:
    """A context from its start.

    Args:
      begin: what begins texts, token 0 in World, begins the context, as in the official evaluations. It always does
        where the context is empty, since the first token has nothing else to follow.
    """
    return ((*tokenizer.begin, *ids) if begin else ids) or tokenizer.beginning


def rolling_windows(ids: Sequence[int], beginning: tuple[int, ...], window: int | None = None) -> list[Pair]:
    """A whole text as pieces, each to be read from an empty state, which together predict every token once.

    Args:
      ids: of the text; no pieces if there are none.
      beginning: ids that the first piece reads before the text, at least one.
      window: lm-eval's `max_length`. The first piece predicts `window` tokens, each later one the next, with as much
        earlier text as fills it, so that only the last has more than one token of context. None: one piece, whatever
        its length, since a state carries over all of it.
    """
    text = tuple(ids)
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: must be at least 1")
    length = window or max(1, len(text))
    pairs = [Pair(beginning, text[:length])] if text else []
    for start in range(length, len(text), length):
        end = min(start + length, len(text))
        pairs.append(Pair(text[end - length - 1 : start], text[start:end]))
    return pairs


def cut_at_stops(text: str, until: Sequence[str]) -> str:
    """A generated text up to the first of the stop strings."""
    ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
