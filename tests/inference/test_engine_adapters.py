"""Adapters in the engine: a batch that mixes them, loading without compiling, and states that are of one of them."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.checks import require_known
from rwkv_jax.config import ConfigError
from rwkv_jax.config.tuning import OFFICIAL_TARGETS
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.engine import adapters
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.inference.state.snapshot import StateError
from rwkv_jax.models import LanguageModel
from rwkv_jax.tuning.adapter import Adapter, AdapterError
from rwkv_jax.tuning.grafting import adapted_model
from rwkv_jax.tuning.pretrained_state import base_digest
from rwkv_jax.weights.official import official_shapes
from tests.inference.models import CONFIGS, GREEDY, IDS, OPTIONS, VOCAB_SIZE, random_model
from tests.programs import compiled_quickly
from tests.weights.files import logits_of

CONFIG = CONFIGS["7"]
SHAPES = official_shapes(CONFIG)
LONG = tuple(range(1, 30))
MAX_TOKENS = 9


def adapter(kind: Any, rank: int, seed: int, targets: Sequence[str] = OFFICIAL_TARGETS, **fields: Any) -> Adapter:
    """Random, of all layers, and large enough to change texts."""
    rng = np.random.default_rng(seed)
    parts: dict[str, dict[str, NDArray]] = {}
    for name in (f"blocks.{layer}.{target}" for layer in range(CONFIG.num_layers) for target in targets):
        num_outputs, num_inputs = SHAPES[f"{name}.weight"]
        shapes = {"lora_A": (rank, num_inputs), "lora_B": (num_outputs, rank)}
        shapes = {"miss_block": (rank, num_outputs)} if kind == "miss" else shapes
        shapes |= {"lora_magnitude_vector": (num_outputs,)} if kind == "dora" else {}
        parts[name] = {part: rng.standard_normal(shape).astype(np.float32) for part, shape in shapes.items()}
    scale = 1.0 if kind == "miss" else 0.7
    return Adapter(kind, parts, dict.fromkeys(parts, scale), **fields)


ADAPTERS = {
    "low": adapter("lora", 2, 1),
    "sums": adapter("miss", 3, 2),
    "part": adapter("rslora", 1, 3, ("att.value", "ffn.key")),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    options = EngineOptions(**OPTIONS, adapter_places=4, adapter_rank=4)
    with (
        compiled_quickly(),
        Engine(random_model(CONFIG), ByteTokenizer(VOCAB_SIZE), options, adapters=ADAPTERS) as engine,
    ):
        yield engine


def model_of(name: str | None) -> LanguageModel:
    """The model with an adapter that nobody else uses."""
    return random_model(CONFIG) if name is None else adapted_model(random_model(CONFIG), ADAPTERS[name])


def assert_greedy(name: str | None, prompt: Sequence[int], ids: Sequence[int], logprobs: Sequence[float]) -> None:
    """These are the most likely tokens after a prompt, as a model with that adapter alone has them."""
    logits = logits_of(model_of(name), np.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal(logits.argmax(axis=-1), ids)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    np.testing.assert_allclose(logprobs, logits.max(-1) - log_z, rtol=0, atol=1e-4)


def together(engine: Engine, texts: Sequence[tuple[str | None, Sequence[int]]]) -> list[Any]:
    """Tokens and logprobs of texts that start together, greedy."""
    with engine.hold():
        streams = [
            engine.stream(list(ids), adapter=name, sampling=GREEDY, max_tokens=MAX_TOKENS, stop_ids=())
            for name, ids in texts
        ]
    found = [list(stream) for stream in streams]
    return [
        ([token for chunk in chunks for token in chunk.ids], [x for chunk in chunks for x in chunk.logprobs])
        for chunks in found
    ]


def test_a_batch_mixes_adapters_and_none(engine: Engine) -> None:
    names = ("low", None, "sums", "part", "low", None)
    texts = [(name, (7 + i, *IDS, *([5] * i))) for i, name in enumerate(names)]
    mixed = together(engine, texts)
    alone = [together(engine, [text])[0] for text in texts]
    assert [ids for ids, _ in mixed] == [ids for ids, _ in alone]
    assert len({tuple(ids) for ids, _ in mixed}) > 3
    for (name, prompt), (ids, logprobs) in zip(texts[:4], mixed, strict=False):
        assert_greedy(name, prompt, ids, logprobs)


def test_the_prefix_cache_keeps_adapters_apart(engine: Engine) -> None:
    first = [together(engine, [(name, LONG)])[0] for name in ("low", None, "sums")]
    before = engine.stats()
    again = [together(engine, [(name, LONG)])[0] for name in ("low", None, "sums")]
    assert [ids for ids, _ in again] == [ids for ids, _ in first]
    assert engine.stats().cached_tokens - before.cached_tokens == 3 * len(LONG)
    misses = engine.stats().prefix_misses
    for name, (ids, logprobs) in zip(("low", None, "sums"), again, strict=True):
        assert_greedy(name, LONG, ids, logprobs)
    together(engine, [("part", LONG)])
    assert engine.stats().prefix_misses == misses + 1


def test_loading_and_removing_compiles_nothing(engine: Engine) -> None:
    programs: Any = engine._driver.scheduler.slots._programs
    counts = [each._cache_size() for each in (programs.decode, programs.prefill, programs.put)]
    third = adapter("lora", 4, 9)
    engine.adapters.load("new", third)
    assert engine.adapters.names == ("low", "sums", "part", "new")
    with pytest.raises(ConfigError, match="all 4 places are taken"):
        engine.adapters.load("newer", third)
    (ids, _), *_ = together(engine, [("new", IDS), ("low", IDS)])
    logits = logits_of(adapted_model(random_model(CONFIG), third), np.array([[*IDS, *ids]]))[0, len(IDS) - 1 : -1]
    np.testing.assert_array_equal(logits.argmax(axis=-1), ids)
    with engine.stream(IDS, adapter="new", max_tokens=10_000, stop_ids=()) as stream:
        next(stream)
        with pytest.raises(ConfigError, match="texts are being generated with it"):
            engine.adapters.remove("new")
    engine.adapters.remove("new")
    with pytest.raises(ConfigError, match=r"adapter = 'new': no such adapter of this engine; .*there are low, sums"):
        engine.generate(IDS, adapter="new")
    engine.adapters.load("next", adapter("lora", 1, 10, ("att.key",)))  # a place that others have left is empty else
    (ids, _), *_ = together(engine, [("next", IDS)])
    only_key = adapted_model(random_model(CONFIG), adapter("lora", 1, 10, ("att.key",)))
    logits = logits_of(only_key, np.array([[*IDS, *ids]]))[0, len(IDS) - 1 : -1]
    np.testing.assert_array_equal(logits.argmax(axis=-1), ids)
    engine.adapters.remove("next")
    assert [each._cache_size() for each in (programs.decode, programs.prefill, programs.put)] == counts


def test_states_are_of_one_adapter(engine: Engine, tmp_path: Path) -> None:
    states = {name: engine.prefill(None, IDS, adapter=name) for name in ("low", None)}
    for name, wrong in (("low", None), (None, "low"), ("low", "sums")):
        with pytest.raises(StateError, match="of another model"):
            engine.prefill(states[name], IDS, adapter=wrong)
    (ids, _), *_ = together(engine, [("low", (*IDS, *IDS))])
    found = engine.generate(
        list(IDS), state=states["low"], adapter="low", sampling=GREEDY, max_tokens=MAX_TOKENS, stop_ids=()
    )
    assert list(found.ids) == ids
    session = engine.session(adapter="low")
    session.append(IDS)
    session.save(tmp_path / "state.safetensors")
    for wrong in (None, "sums"):
        with pytest.raises(StateError, match=r"adapter: '[0-9a-f]{64}' in the file, .* here; choose the adapter"):
            engine.load_session(tmp_path / "state.safetensors", adapter=wrong)
    loaded = engine.load_session(tmp_path / "state.safetensors", adapter="low")
    assert list(loaded.generate(list(IDS), sampling=GREEDY, max_tokens=MAX_TOKENS, stop_ids=()).ids) == ids
    assert engine.conversation("x", adapter="low") is not engine.conversation("x")
    assert engine.conversation("x\0low") is not engine.conversation("x", adapter="low")
    count = len(engine.sessions)
    with pytest.raises(ConfigError, match="adapter = 'gone': no such adapter of this engine"):
        engine.conversation("x", adapter="gone")
    assert len(engine.sessions) == count
    assert engine.conversation("x", adapter="low") is engine.conversation("x", adapter="low")


def test_a_stop_string_rewinds_with_the_same_adapter(engine: Engine) -> None:
    (ids, _), *_ = together(engine, [("sums", IDS)])
    stream = engine.stream(IDS, adapter="sums", sampling=GREEDY, max_tokens=40, stop_ids=(), return_state=True)
    for _ in range(2):
        next(stream)
    stream.cancel()
    snapshot = stream.snapshot
    assert snapshot is not None
    expected = engine.prefill(None, (*IDS, *ids[:2]), adapter="sums")
    np.testing.assert_allclose(snapshot.logits, expected.logits, rtol=0, atol=1e-4)


def test_a_state_of_a_removed_adapter_fails_alone(engine: Engine) -> None:
    engine.adapters.load("brief", adapter("lora", 2, 11))
    with engine.stream(IDS, max_tokens=10_000, stop_ids=()) as other:
        ended = engine.stream(IDS, adapter="brief", max_tokens=40, stop_ids=(), return_state=True)
        for _ in range(2):  # the second is the first token of a burst
            next(ended)
        ended.cancel()
        engine.adapters.remove("brief")
        next(other)
        with pytest.raises(ConfigError, match="adapter = 'brief': was removed, and more of this text was to be read"):
            _ = ended.snapshot
        assert engine.stats().num_running == 1  # the other text goes on
        next(other)


def test_scores_are_those_of_the_adapter(engine: Engine) -> None:
    (score,) = engine.score([IDS], [LONG], adapter="sums")
    logits = jnp.asarray(logits_of(model_of("sums"), np.array([[*IDS, *LONG]]))[0, len(IDS) - 1 : -1])
    expected = np.take_along_axis(
        np.asarray(logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))), np.array(LONG)[:, None], 1
    )
    np.testing.assert_allclose(score.token_logprobs, expected[:, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (adapter("dora", 2, 1), "adapter x: kind = 'dora': does not only add to a matrix, .*rwkv merge"),
        (
            Adapter("lora", {}, {}, {"blocks.0.ln1.weight": np.ones(16)}),
            "blocks.0.ln1.weight: was trained in full, .*rwkv merge",
        ),
        (adapter("lora", 8, 1), "of rank 8: this engine was built for 12 matrices up to rank 4"),
        (adapter("lora", 17, 1), "rank 17 is above the matrix"),
    ],
)
def test_what_an_engine_does_not_mix_is_refused_by_name(engine: Engine, given: Adapter, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        engine.adapters.load("x", given)
    for name, why in (("low", "there is one of that name"), ("a b", "must be a name of letters"), ("", "must be a")):
        with pytest.raises(ConfigError, match=why):
            engine.adapters.load(name, ADAPTERS["low"])
    assert engine.adapters.names == ("low", "sums", "part")


def test_an_adapter_of_another_base_is_refused_unless_told(engine: Engine) -> None:
    other = dataclasses.replace(ADAPTERS["part"], base_digest="1" * 64)
    with pytest.raises(AdapterError, match=r"adapter x: base_digest = 1111.*another base than this one .*allow_other"):
        engine.adapters.load("x", other)
    assert engine.adapters.names == ("low", "sums", "part")
    engine.adapters.load("x", dataclasses.replace(other, base_digest=base_digest(random_model(CONFIG))))
    engine.adapters.remove("x")
    made = functools.partial(Engine, engine.model, engine.tokenizer, EngineOptions(**OPTIONS), adapters={"x": other})
    with pytest.raises(AdapterError, match=r"adapter x: base_digest = 1111"):
        made()
    with compiled_quickly(), made(allow_other_base=True) as told:
        assert told.adapters.names == ("x",)


def test_what_cannot_be_loaded_takes_no_place(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_set_place", mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        engine.adapters.load("x", ADAPTERS["part"])
    assert engine.adapters.names == ("low", "sums", "part")
    monkeypatch.undo()
    engine.adapters.load("x", ADAPTERS["part"])
    engine.adapters.remove("x")


def test_an_adapter_is_prepared_while_texts_go_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only taking its place is the engine's thread's."""
    threads: dict[str, str] = {}

    def noted(name: str, run: Any) -> Any:
        def call(*arguments: Any) -> Any:
            threads[name] = threading.current_thread().name
            return run(*arguments)

        return call

    for name in ("_padded", "_set_place"):
        monkeypatch.setattr(adapters, name, noted(name, getattr(adapters, name)))
    with engine.stream(IDS, max_tokens=10_000, stop_ids=()) as stream:
        next(stream)
        engine.adapters.load("x", ADAPTERS["part"])
        next(stream)
    assert threads == {"_padded": threading.current_thread().name, "_set_place": "rwkv-engine"}
    assert engine.generate(IDS, adapter="x", max_tokens=3) == engine.generate(IDS, adapter="part", max_tokens=3)
    engine.adapters.remove("x")


def test_an_adapter_is_found_while_others_remove_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.adapters.load("x", ADAPTERS["part"])

    def known_until_now(*arguments: Any) -> None:
        require_known(*arguments)
        monkeypatch.undo()
        engine.adapters.remove("x")

    monkeypatch.setattr(adapters, "require_known", known_until_now)
    found = engine.adapters.find("x")
    assert found is not None
    assert not found.is_loaded


def test_an_engine_without_adapters_says_so() -> None:
    with compiled_quickly():
        plain = Engine(random_model(CONFIG), ByteTokenizer(VOCAB_SIZE), EngineOptions(**OPTIONS))
    with pytest.raises(ConfigError, match=r"adapter = 'none': this engine has no adapters; load it first"):
        plain.generate(IDS, adapter="none")


def test_an_adapted_model_has_no_places() -> None:
    options = EngineOptions(**OPTIONS)
    with pytest.raises(AdapterError, match="the model has an adapter already"):
        Engine(model_of("low"), ByteTokenizer(VOCAB_SIZE), options, adapters=ADAPTERS)
    with pytest.raises(ConfigError, match="adapter_rank = 0: no adapter is given"):
        Engine(random_model(CONFIG), ByteTokenizer(VOCAB_SIZE), EngineOptions(**OPTIONS, adapter_places=1))
