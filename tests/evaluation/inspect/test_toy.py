"""On a trained toy: what its state knows, what an edited state makes it say, and where the fact passes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.evaluation.inspect import (
    causal_trace,
    edit_state,
    fit_probe,
    read_texts,
    state_direction,
    state_features,
)
from tests.evaluation.inspect.toy import NO, PLACE, QUESTION, TIME, YES, texts, trained_toy

TEXTS, ANIMATE = texts(np.random.default_rng(1), 256)
BEFORE = TEXTS[:, :-1]
"""Without the question."""
UNSEEN = slice(128, None)
"""Texts of which neither probe nor direction is made."""


@functools.cache
def answering() -> Callable[..., jax.Array]:
    """(state) -> the logits after the question."""
    model, question = trained_toy(), jnp.full((128, 1), QUESTION)
    return jax.jit(lambda state: model(question, state).logits[:, 0])


def sampled(state: object) -> NDArray:
    """The answers that are drawn, by the model's own probabilities."""
    return np.asarray(jax.random.categorical(jax.random.key(0), answering()(state)))


def test_a_probe_finds_what_was_planted_and_nothing_else() -> None:
    features = state_features(trained_toy(), BEFORE, batch_size=128)
    probe = fit_probe(features, ANIMATE.astype(int))
    assert probe.test_accuracy > 0.95
    assert probe.num_test == 64
    assert np.mean((probe.classes(features) == 1) == ANIMATE) > 0.95
    # As many labels that no text has anything to do with: what a probe of so many features finds by chance.
    unrelated = np.random.default_rng(2).integers(0, 2, len(TEXTS))
    assert fit_probe(features, unrelated).test_accuracy < 0.7


def test_a_state_moved_along_a_direction_says_the_other_class() -> None:
    model = trained_toy()
    inanimate, animate = (np.resize(BEFORE[:128][ANIMATE[:128] == kind], (128, TIME - 1)) for kind in (False, True))
    direction = state_direction(model, inanimate, animate)
    assert direction.shape == (2, 2, 8, 8)
    state, own = read_texts(model, BEFORE[UNSEEN]), np.where(ANIMATE[UNSEEN], YES, NO)
    assert np.mean(sampled(state) == own) > 0.95
    np.testing.assert_array_equal(sampled(edit_state(state, direction, 0.0)), sampled(state))
    assert np.mean(sampled(edit_state(state, direction, 2.0)) == YES) > 0.95
    assert np.mean(sampled(edit_state(state, direction, -2.0)) == NO) > 0.95


def test_the_fact_passes_from_the_thing_to_the_question() -> None:
    animate = TEXTS[np.flatnonzero(ANIMATE)[0]]
    trace = causal_trace(trained_toy(), animate, (PLACE, PLACE + 1), noise=10, samples=8)
    assert trace.answer == YES
    assert trace.clean > 0.95
    assert trace.corrupted < 0.75
    gained = trace.restored - trace.corrupted
    assert gained.shape == (2, TIME)
    assert gained[0, PLACE:].max() > 0.2, gained
    # Of the last block, only the last token is read; before the thing, nothing is corrupted.
    np.testing.assert_allclose(trace.restored[1, -1], trace.clean, atol=1e-5)
    np.testing.assert_allclose(gained[1, :-1], 0, atol=1e-5)
    np.testing.assert_allclose(gained[:, :PLACE], 0, atol=1e-5)
