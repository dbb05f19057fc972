"""Vectors of texts are those of the model's hidden states, in chunks and batches of any sizes."""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.embedder import Embedder, Pooling
from rwkv_jax.inference.engine.driver import EngineClosedError
from rwkv_jax.models.decoding import unstacked
from tests.inference.models import CONFIGS, VOCAB_SIZE, prompts, quick_engine, random_model
from tests.programs import compiled_quickly

TEXTS = [*prompts(0, 6, longest=13), (5,)]


@pytest.fixture(scope="module", params=["7", "transformer"])
def hidden(request: pytest.FixtureRequest) -> Any:
    """The generation, and the hidden states of each text, read whole by the stacked model."""
    model = random_model(CONFIGS[request.param])
    tokens = np.zeros((len(TEXTS), max(map(len, TEXTS))), np.int32)
    for row, ids in enumerate(TEXTS):
        tokens[row, : len(ids)] = ids
    with compiled_quickly():
        states = np.asarray(jax.jit(lambda tokens: model.hidden(tokens)[0])(tokens), np.float64)
    return request.param, [states[row, : len(ids)] for row, ids in enumerate(TEXTS)]


def unit(vectors: NDArray[Any]) -> NDArray[Any]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_vectors_are_the_models(hidden: Any) -> None:
    generation, states = hidden
    with compiled_quickly():
        embedder = Embedder(
            unstacked(random_model(CONFIGS[generation])), num_rows=3, chunk_length=8, short_chunk_length=2
        )
        cases: tuple[tuple[Pooling, Any], ...] = (("mean", np.mean), ("last", lambda x, axis: x[-1]))
        for pooling, pooled in cases:
            expected = unit(np.stack([pooled(state, axis=0) for state in states]))
            np.testing.assert_allclose(embedder.embed(TEXTS, pooling), expected, atol=2e-5)
        long = [index for index, ids in enumerate(TEXTS) if len(ids) > 3]
        expected = unit(np.stack([states[index][3:].mean(axis=0) for index in long]))
        np.testing.assert_allclose(embedder.embed([TEXTS[index] for index in long], skip=3), expected, atol=2e-5)


def test_an_engine_reads_texts_in_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the steps of what it generates."""
    model = random_model(CONFIGS["7"])
    with compiled_quickly():
        expected = Embedder(unstacked(model)).embed(TEXTS)
    with quick_engine(model) as engine:
        read, threads = engine._embedder._read, []

        def noted(*arguments: Any) -> Any:
            threads.append(threading.current_thread().name)
            return read(*arguments)

        monkeypatch.setattr(engine._embedder, "_read", noted)
        with engine.stream(TEXTS[0], max_tokens=100_000, stop_ids=()) as stream:
            next(stream)
            np.testing.assert_allclose(engine.embed(TEXTS), expected, atol=2e-5)
            next(stream)
        assert set(threads) == {"rwkv-engine"}
    with pytest.raises(EngineClosedError):
        engine.embed(TEXTS)


@pytest.mark.parametrize(
    ("texts", "pooling", "skip", "message"),
    [
        ([(1,), ()], "mean", 0, "text 1: has no tokens"),
        ([(1,)], "mean", 1, "text 0: has no tokens"),
        ([(1, VOCAB_SIZE)], "mean", 0, "text 0: token ids must lie from 0 to V - 1 = 255"),
        ([(-1,)], "last", 0, "text 0: token ids"),
        ([(1,)], "max", 0, "pooling = 'max': must be mean or last"),
        ([(1,) * 641], "last", 0, "text 0: has 641 tokens, this model's state holds 640"),
    ],
)
def test_what_cannot_be_embedded_is_named(texts: Any, pooling: Pooling, skip: int, message: str) -> None:
    embedder = Embedder(random_model(CONFIGS["transformer"]))
    with pytest.raises(ConfigError, match=message):
        embedder.embed(texts, pooling, skip=skip)
