"""Scores of given tokens: groups of logits, pairs of texts, and the engine against one parallel pass of the model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.engine import scoring
from rwkv_jax.inference.engine.prompts import build_score_requests
from tests.inference.models import log_softmax

# The device's part


@pytest.mark.parametrize("group", [1, 7, 64])
def test_groups_of_logits_are_scored_as_one(float64: None, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Ragged rows, of which one is empty: whatever the group, of each token by the logits before it."""
    draws = np.random.default_rng(0)
    rows, length, width, vocab = 3, 9, 4, 11
    hidden, head = draws.normal(size=(rows, length, width)), draws.normal(size=(vocab, width))
    before, tokens = draws.normal(size=(rows, vocab)), draws.integers(0, vocab, (rows, length)).astype(np.int32)
    lengths = np.array([9, 0, 4], np.int32)
    monkeypatch.setattr(scoring, "_MAX_LOGITS", group * vocab)
    score = jax.jit(functools.partial(scoring.score_tokens, lambda x: x @ head.T), static_argnums=4)
    found = score(hidden, before, tokens, lengths, 3)
    logits = np.concatenate([before[:, None], hidden[:, :-1] @ head.T], axis=1)
    expected = log_softmax(logits)
    for row, size in enumerate(lengths):
        own = np.arange(size)
        np.testing.assert_allclose(found.logprobs[row, :size], expected[row, own, tokens[row, :size]], atol=1e-12)
        np.testing.assert_array_equal(
            found.is_argmax[row, :size], logits[row, :size].argmax(axis=-1) == tokens[row, :size]
        )
        best = np.argsort(-expected[row, :size], axis=-1)[:, :3]
        np.testing.assert_array_equal(found.top_tokens[row, :size], best)
        np.testing.assert_allclose(
            found.top_logprobs[row, :size], np.take_along_axis(expected[row, :size], best, axis=-1), atol=1e-12
        )


# Texts to tokens


def encode(text: str, *, begins: bool) -> list[int]:
    """Bytes, of which `ab` is one token, 200."""
    assert not begins
    return [200 if character == "\1" else ord(character) for character in text.replace("ab", "\1")]


@pytest.mark.parametrize(
    ("context", "continuation", "ids", "scored"),
    [
        ("x", "y", (0, 120), (121,)),
        ("x", "ab", (0, 120), (200,)),
        ("xa", "b", (0, 120, 97), (98,)),  # together they would be x and ab: no token of its own for b
        ("", "xab", (0,), (120, 200)),
        ("x", None, (0,), (120,)),
        ((5, 6), "ab", (5, 6), (200,)),
        ("xa", (98,), (0, 120, 97), (98,)),
        ((), (7, 8), (0,), (7, 8)),
        (np.array([5, 6]), None, (0,), (5, 6)),
    ],
)
def test_a_pair_is_encoded_together_where_the_context_stays(
    context: Any, continuation: Any, ids: tuple[int, ...], scored: tuple[int, ...]
) -> None:
    continuations = None if continuation is None else [continuation]
    (request,) = build_score_requests(encode, 0, [context], continuations, top_logprobs=2)
    assert (request.ids, request.scored_ids, request.max_tokens, request.top_logprobs) == (ids, scored, 0, 2)


@pytest.mark.parametrize(
    ("contexts", "continuations", "message"),
    [
        ([], None, "contexts: there are none"),
        (7, None, "must be a text"),
        ("", None, "context 0 = '': is empty"),
        (["a", ""], None, "context 1 = '': is empty"),
        ("a", "", "continuation 0 = '': is empty"),
        (["a"], "b", "one for one, or a list of as many"),
        (["a", "b"], ["c"], "continuations: 1 for 2 contexts"),
        (["a"], [b"x"], "continuation 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(contexts: Any, continuations: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_score_requests(encode, 0, contexts, continuations)
