"""Engines in which every text begins in a tuned state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.evaluation.report import describe_model, machine, shared_settings, versions
from rwkv_jax.inference import Engine
from rwkv_jax.inference.embedder import Pooling
from rwkv_jax.inference.engine.options import EngineOptions
from rwkv_jax.inference.state.snapshot import StateError
from rwkv_jax.tuning import TunedState, load_initial_state, save_tuned_state
from rwkv_jax.tuning.pretrained_state import base_digest
from tests.inference.models import (
    CONFIGS,
    GREEDY,
    IDS,
    LONG_IDS,
    OPTIONS,
    VOCAB_SIZE,
    log_softmax,
    quick_engine,
    random_model,
    shared_programs,
)

MODEL = random_model(CONFIGS["7"])


def arrays() -> Any:
    draws = np.random.default_rng(3)
    return {
        "first_block": {"wkv": draws.standard_normal((2, 8, 8)).astype(np.float32)},
        "blocks": {"wkv": draws.standard_normal((1, 2, 8, 8)).astype(np.float32)},
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "state.safetensors"
    save_tuned_state(path, arrays(), base_digest=base_digest(MODEL))
    return path


def tuned_engine(initial_state: Any, **arguments: Any) -> Engine:
    with shared_programs(MODEL):
        options: dict[str, Any] = OPTIONS | {"min_prefix_tokens": 4}
        return Engine(
            MODEL, ByteTokenizer(VOCAB_SIZE), EngineOptions(**options), initial_state=initial_state, **arguments
        )


@pytest.fixture(scope="module")
def engine(file: Path) -> Iterator[Engine]:
    with tuned_engine(file) as engine:
        yield engine


def expected(ids: tuple[int, ...], file: Path) -> Any:
    logits, _ = MODEL(jnp.asarray([ids]), load_initial_state(file, MODEL))
    return log_softmax(np.asarray(logits[0]))


def test_every_text_begins_with_it(engine: Engine, file: Path) -> None:
    for ids in (IDS, LONG_IDS):
        (score,) = engine.score(ids[:1], ids[1:])
        own = expected(ids, file)[np.arange(len(ids) - 1), list(ids[1:])]
        np.testing.assert_allclose(score.token_logprobs, own, rtol=1e-4, atol=1e-5)
    with quick_engine(MODEL) as plain:
        (other,) = plain.score(LONG_IDS[:1], LONG_IDS[1:])
    assert abs(other.logprob - score.logprob) > 0.01


def test_evaluations_tell_engines_with_one_from_others(engine: Engine) -> None:
    with quick_engine(MODEL) as plain:
        own, other = describe_model(engine), describe_model(plain)
    assert "initial_state" not in other
    about = {"settings": {"begin": True, "window": None}, "versions": versions(), "machine": machine()}
    of_own, of_other = (shared_settings({"model": model, **about}) for model in (own, other))
    assert of_other["model"] == own["hash"] == other["hash"]
    assert of_own == of_other | {"model": f"state {own['initial_state']} of {own['hash']}"}


def test_prompts_that_share_a_beginning_and_sessions_begin_with_it_too(engine: Engine, file: Path) -> None:
    best = int(expected(LONG_IDS, file)[-1].argmax())
    for _ in range(2):  # the second time from the prefix cache
        assert engine.generate(LONG_IDS, max_tokens=1, sampling=GREEDY, stop_ids=()).ids[0] == best
    assert engine.stats().prefix_hits > 0
    session = engine.session()
    session.append(LONG_IDS[:20])
    assert session.generate(LONG_IDS[20:], max_tokens=1, sampling=GREEDY, stop_ids=()).ids[0] == best


def test_vectors_of_texts_begin_with_it_too(engine: Engine, file: Path) -> None:
    hidden, _ = MODEL.hidden(jnp.asarray([LONG_IDS]), load_initial_state(file, MODEL))
    vectors: dict[Pooling, Any] = {"mean": hidden[0].mean(0), "last": hidden[0, -1]}
    for pooling, vector in vectors.items():
        own = engine.embed([LONG_IDS, IDS], pooling)[0]
        np.testing.assert_allclose(own, vector / np.linalg.norm(vector), atol=2e-5)


def test_a_tuned_state_of_another_model_is_refused_unless_told(tmp_path: Path) -> None:
    save_tuned_state(tmp_path / "other.safetensors", arrays(), base_digest="1" * 64)
    with pytest.raises(StateError, match=r"was trained with another base \(1111"):
        tuned_engine(tmp_path / "other.safetensors")
    tuned_engine(tmp_path / "other.safetensors", allow_other_base=True).close()
    with pytest.raises(StateError, match="missing      blocks"):
        tuned_engine(TunedState({"blocks.0.att.time_state": np.zeros((2, 8, 8), np.float32)}))
