"""Conversations that the engine keeps by name: what they count with, which stay, and whose states they are."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.options import EngineOptions
from rwkv_jax.inference.state.snapshot import StateError
from tests.inference.models import CONFIGS, GREEDY, assert_free, prompts, quick_engine, random_model
from tests.models.parameters import in_dtype, merge, random_params

CONFIG = CONFIGS["7"]
IDS = (1, 40, 41, 42, 43)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return quick_engine(random_model(CONFIG))


def like(engine: Engine, **options: Any) -> Engine:
    """Another engine of the same model."""
    return quick_engine(random_model(engine.config), **options)


@pytest.fixture(scope="module")
def size(engine: Engine) -> int:
    """Bytes of a state."""
    return engine.prefill(None, IDS).nbytes


def test_one_that_is_larger_than_the_store_is_refused_before_any_work(engine: Engine, size: int) -> None:
    small = like(engine, session_bytes=size - 1)
    with pytest.raises(ConfigError, match=rf"^session_bytes = {size - 1}: a state of this model has {size}; build the"):
        small.generate("Hello", conversation="a", max_tokens=4)
    assert len(small.sessions) == 0


def test_one_that_has_outgrown_the_store_is_still_its_users(engine: Engine, size: int) -> None:
    small = like(engine, session_bytes=size + size // 2)
    session = small.conversation("a")
    session.append(IDS)
    session.mark("here")
    assert len(small.sessions) == 1
    found = session.generate("!", max_tokens=3, sampling=GREEDY, stop_ids=())
    assert session.num_tokens == len(IDS) + 1 + len(found.ids)
    assert len(small.sessions) == 0


def test_one_in_use_stays(engine: Engine, size: int) -> None:
    small = like(engine, session_bytes=2 * size + size // 2)
    session = small.conversation("a")
    session.append(IDS)
    stream = session.stream(max_tokens=20, stop_ids=())
    next(stream)
    for name in "bc":
        small.generate("Hi", conversation=name, max_tokens=1)
    assert small.conversation("a") is session
    list(stream)
    assert small.conversation("a").num_tokens == len(IDS) + 20
    for name in "bc":
        small.generate("Hi", conversation=name, max_tokens=1)
    assert small.conversation("a").num_tokens == 0


def test_a_forgotten_stream_frees_its_session(engine: Engine, size: int) -> None:
    other = like(engine, session_bytes=2 * size + size // 2)
    session = other.conversation("a")
    session.append(IDS)
    for _ in session.stream(max_tokens=50, stop_ids=()):
        break
    gc.collect()
    assert not session.is_in_use
    assert session.num_tokens == len(IDS)
    assert session.generate(max_tokens=3, sampling=GREEDY, stop_ids=()).finish_reason == "length"
    assert_free(other)
    for name in "bcd":
        other.generate("Hi", conversation=name, max_tokens=1)
    assert other.conversation("a").num_tokens == 0


def test_names_alone_do_not_fill_the_memory(engine: Engine, size: int) -> None:
    small = like(engine, session_bytes=max(size, 4096))
    for i in range(100):
        with pytest.raises(ConfigError, match="prompt"):
            small.generate([-1], conversation=str(i))
    assert len(small.sessions) <= max(size, 4096) // 1024


def test_going_back_counts_the_bytes_anew(engine: Engine, size: int) -> None:
    other = like(engine)
    session = other.conversation("a")
    session.append(IDS)
    session.mark("here")
    session.append(IDS)
    assert other.sessions.nbytes == 2 * size
    session.rewind("here")
    assert other.sessions.nbytes == size


@pytest.mark.parametrize("name", ["state", "return_state"])
def test_where_a_session_begins_is_its_own_business(engine: Engine, name: str) -> None:
    session = engine.session()
    session.append(IDS)
    given: dict[str, Any] = {name: None}
    for call in (session.generate, lambda **given: engine.generate("x", conversation="q", **given)):
        with pytest.raises(ConfigError, match=rf"^{name}: a session continues its own state"):
            call(**given)
    assert not session.is_in_use


def test_a_session_takes_one_text(engine: Engine) -> None:
    texts: Any = ["a", "b"]
    with pytest.raises(ConfigError, match=r"^prompt: a session continues with one text at a time"):
        engine.session().generate(texts)
    arguments: dict[str, Any] = {"best_of": 2}
    with pytest.raises(ConfigError, match=r"^best_of: no such argument; engine\.generate has it"):
        engine.session().generate("a", **arguments)
    with pytest.raises(ConfigError, match=r"^conversation: no such argument; .*engine\.conversation\(name\)\.stream"):
        engine.stream("a", **{"conversation": "x"})  # pyright: ignore[reportArgumentType]


def test_states_of_other_weights_are_refused_by_whichever_way(engine: Engine, tmp_path: Path) -> None:
    session = engine.session()
    session.append(IDS)
    session.save(tmp_path / "state.safetensors")
    params = jax.tree.map(lambda x: jnp.asarray(x) * 1.1, in_dtype(random_params(CONFIG), CONFIG))
    other = quick_engine(merge(CONFIG, params), min_prefix_tokens=1)
    for snapshot in (session.snapshot, engine.load_session(tmp_path / "state.safetensors").snapshot):
        with pytest.raises(StateError, match="is of another model"):
            other.generate("x", state=snapshot, max_tokens=1)
    expected = other.generate((*IDS, 7), max_tokens=5, sampling=GREEDY).logprobs
    other.prefix_cache = None
    again = quick_engine(merge(CONFIG, params), min_prefix_tokens=1)
    assert again.prefix_cache is not None
    assert session.snapshot is not None
    again.prefix_cache.put(IDS, session.snapshot)
    np.testing.assert_allclose(again.generate((*IDS, 7), max_tokens=5, sampling=GREEDY).logprobs, expected, rtol=1e-5)


def test_prompts_may_be_arrays_and_bad_ones_are_named(engine: Engine) -> None:
    ids = next(prompts(1, 1, 9))
    expected = engine.generate(ids, max_tokens=4, sampling=GREEDY).ids
    arrays: Any = [np.array(ids), jnp.array(ids)]
    assert [found.ids for found in engine.generate(arrays, max_tokens=4, sampling=GREEDY)] == [expected] * 2
    for array in arrays:
        assert engine.generate(array, max_tokens=4, sampling=GREEDY).ids == expected
    with pytest.raises(ConfigError, match=r"^prompt 2: token id 999 must lie"):
        engine.generate([[1], [2], [999]], max_tokens=1, best_of=2)
    with pytest.raises(ConfigError, match=r"^prompt 1: is empty"):
        engine.generate([[1], []], max_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 2.5}, r"num_slots = 2\.5: must be a whole number"),
        ({"num_slots": "8"}, r"num_slots = '8': must be a whole number"),
        ({"min_prefix_tokens": -5}, r"min_prefix_tokens = -5: must be a whole number, not less than 1"),
        ({"prefix_bytes": -1}, r"prefix_bytes = -1: must be a whole number, not less than 0"),
        ({"session_bytes": 0}, r"session_bytes = 0: must be a whole number, not less than 1"),
        ({"session_idle_seconds": -1}, r"session_idle_seconds = -1: must be a positive number"),
        ({"session_idle_seconds": float("nan")}, r"session_idle_seconds = nan: must be a positive number"),
        ({"batch_sizes": ()}, r"batch_sizes = \(\): must be several whole numbers, or None"),
        ({"batch_sizes": 4}, r"batch_sizes = 4: must be several whole numbers, or None"),
        ({"batch_sizes": (1, 2.0, 8)}, r"batch_sizes = 2\.0: must be a whole number"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        EngineOptions(**options)


def test_what_is_no_model_or_tokenizer_is_refused(engine: Engine) -> None:
    for arguments in ((engine.model, None), (engine.tokenizer, engine.model), (None, engine.tokenizer)):
        with pytest.raises(ConfigError, match=r"must be a model, and then its tokenizer"):
            Engine(*arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"^sampling = 0: must be a sequence"):
        engine.generate("x", sampling=0)  # pyright: ignore[reportCallIssue, reportArgumentType]
