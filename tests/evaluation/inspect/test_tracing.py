"""Causal tracing of a random model: what must hold of any."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.inspect import causal_trace, corrupt, restored_probability
from tests.evaluation.inspect.looked_into import TOKENS, small_model


@pytest.mark.parametrize("name", ["5.2", pytest.param("transformer", marks=pytest.mark.long)])
def test_restoring_all_gives_the_clean_probability_and_nothing_the_corrupted_one(name: str) -> None:
    model = small_model(name)
    trace = causal_trace(model, TOKENS[0], (1, 3), answer=7, samples=2, seed=5)
    logits = jax.jit(lambda tokens: model(tokens).logits[0, -1])(jax.numpy.asarray(TOKENS[:1]))
    np.testing.assert_allclose(trace.clean, jax.nn.softmax(logits)[7], rtol=1e-12)
    assert abs(trace.corrupted / trace.clean - 1) > 1e-3

    prompt = corrupt(model, TOKENS[0], (1, 3), samples=2, seed=5)
    restore = np.zeros((6, 2, 6), bool)  # as many runs as of a trace: the same programs
    restore[0] = True
    restore[1, 0] = True  # all tokens of the first block: all that those above it read
    restore[2, 1, 4] = True  # one that no prediction of the answer reads
    restore[3, 0, 2] = True
    np.testing.assert_allclose(
        restored_probability(model, prompt, 7, restore),
        [trace.clean, trace.clean, trace.corrupted, trace.restored[0, 2], trace.corrupted, trace.corrupted],
        rtol=1e-12,
    )
    # Seeded: the same again, and other noise with another seed.
    again = corrupt(model, TOKENS[0], (1, 3), samples=2, seed=5)
    np.testing.assert_array_equal(again.corrupted[1].streams[0], prompt.corrupted[1].streams[0])
    other = corrupt(model, TOKENS[0], (1, 3), samples=2, seed=6)
    assert np.any(other.corrupted[1].streams[0] != prompt.corrupted[1].streams[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": (2, 2)}, r"subject = \(2, 2\): must lie within the one prompt of 6 tokens"),
        ({"subject": (1, 7)}, "must lie within"),
        ({"tokens": TOKENS}, "must lie within the one prompt"),
        ({"tokens": [0, 41]}, "tokens: from 0 to 41 must lie from 0 to V - 1 = 40"),
        ({"tokens": [0.5]}, r"tokens: float64 of shape \(1, 1\) must be integers"),
        ({"noise": -1.0}, "noise = -1.0: must not be negative"),
        ({"samples": 0}, "samples = 0: must be at least 1"),
        ({"answer": 41}, "answer = 41: ids lie below V = 41"),
    ],
)
def test_what_cannot_be_traced_is_refused(changes: dict, message: str) -> None:
    arguments = {"tokens": TOKENS[0], "subject": (1, 3), "samples": 1} | changes
    with pytest.raises(ConfigError, match=message):
        causal_trace(small_model("5.2"), **arguments)
