"""Prompts and options of any type are taken where they mean one thing, and refused by name where they do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.checks import shown
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.snapshot import Snapshot
from tests.inference.models import CONFIGS, GREEDY, random_model


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class _TakenError(Exception):
    """The arguments were fine."""


NUMPY_SETTINGS: dict[str, Any] = {"temperature": np.float32(0.5), "banned": np.array([3]), "top_k": np.int64(4)}
NUMPY_OPTIONS: dict[str, Any] = {
    "num_slots": np.int64(4),
    "burst_length": np.uint8(200),
    "batch_sizes": (np.int32(2), 4),
}

HUGE = 10**5000  # has no repr: Python prints no integer of more than 4300 digits

ODD: dict[str, Any] = {
    "none": None,
    "a boolean": True,
    "NumPy's boolean": np.bool_(True),
    "a float": 1.5,
    "NumPy's float": np.float32(1.5),
    "not a number": float("nan"),
    "a complex number": 1j,
    "a negative number": -3,
    "a huge number": HUGE,
    "a number as text": "3",
    "bytes": b"abc",
    "an empty list": [],
    "a nested list": [[1], [2]],
    "a deep list": _nested(100_000),
    "a mixed list": [1, "a", None],
    "a dict": {"a": 1},
    "a set": {1, 2},
    "a scalar array": np.array(3),
    "an array": np.array([1, 2]),
    "an array of floats": np.array([1.5, 2.5]),
    "an array of huge numbers": np.array([HUGE, 1], dtype=object),
    "an array of two axes": np.ones((2, 2), np.int32),
    "an empty array": np.array([]),
    "a scalar of JAX": jnp.int32(3),
    "an array of JAX": jnp.array([1, 2]),
    "a type": int,
    "a function": len,
    "what has no repr": _Unprintable(),
}

_ARGUMENTS = (
    *("prompts", "max_tokens", "sampling", "seed", "stop", "stop_ids", "top_logprobs", "guidance_scale"),
    *("negative_prompt", "client_id", "state", "return_state", "best_of", "conversation", "adapter"),
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Its programs are never compiled: nothing here is run."""
    return Engine(random_model(CONFIGS["7"]), ByteTokenizer(256), EngineOptions(num_slots=2))


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_arguments_of_any_type_are_taken_or_named(engine: Engine, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is taken would be run; the engine's loop is left out."""

    def run(requests: Any) -> None:
        raise _TakenError

    monkeypatch.setattr(engine._collector, "run", run)
    generate: Any = engine.generate
    for name in _ARGUMENTS:
        if name == "conversation" and isinstance(value, str):
            continue  # a name, whose session would run
        with pytest.raises((ConfigError, _TakenError)) as caught:
            generate(**({"prompts": "abc", "max_tokens": 1} | {name: value}))
        assert len(str(caught.value)) < 1200, name


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_settings_of_any_type_are_taken_or_named(value: Any) -> None:
    for kind in (SamplingParams, EngineOptions, Snapshot):
        for field in dataclasses.fields(kind):
            try:
                made = kind(
                    **({"state": (), "logits": value, "num_tokens": 1} if kind is Snapshot else {field.name: value})
                )
            except ConfigError as error:
                named = str(error)
            else:
                named, _ = field.name, hash(made)
            assert field.name in named


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_parts_of_a_state_of_any_type_are_named(engine: Engine, value: Any) -> None:
    for field in dataclasses.fields(Snapshot):
        state = dataclasses.replace(Snapshot((), jnp.zeros(256), 1), **{field.name: value})
        with pytest.raises(ConfigError, match=r"^state: "):
            engine.stream("abc", state=state)


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_an_engine_is_made_of_what_it_needs(engine: Engine, value: Any) -> None:
    for name in ("model", "tokenizer", "options", "mesh"):
        if name in ("options", "mesh") and value is None:
            continue
        given: dict[str, Any] = {"model": engine.model, "tokenizer": engine.tokenizer, name: value}
        with pytest.raises(ConfigError):
            Engine(**given)


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_names_of_marks_and_conversations_are_strings(engine: Engine, value: Any) -> None:
    session = engine.session()
    for use in (session.mark, session.rewind, engine.conversation):
        if isinstance(value, str) and use != session.rewind:
            continue
        with pytest.raises(ConfigError):
            use(value)


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        ({"prompts": np.array([1, 40, 41])}, {"prompts": [1, 40, 41]}),
        ({"prompts": jnp.array([1, 40, 41])}, {"prompts": [1, 40, 41]}),
        ({"prompts": np.array([[1, 40], [2, 41]], np.uint8)}, {"prompts": [[1, 40], [2, 41]]}),
        ({"prompts": jnp.array([[1, 40], [2, 41]])}, {"prompts": [[1, 40], [2, 41]]}),
        ({"prompts": [jnp.array([1, 40]), np.array([2, 41])]}, {"prompts": [[1, 40], [2, 41]]}),
        ({"prompts": (1, np.int64(40), np.uint8(41))}, {"prompts": [1, 40, 41]}),
        ({"prompts": range(1, 4)}, {"prompts": [1, 2, 3]}),
        ({"prompts": np.str_("abc")}, {"prompts": "abc"}),
        ({"prompts": np.array(["abc", "de"])}, {"prompts": ["abc", "de"]}),
        ({"max_tokens": np.uint8(200)}, {"max_tokens": 200}),
        ({"seed": np.uint8(255), "prompts": ["a", "b"]}, {"seed": 255, "prompts": ["a", "b"]}),
        ({"seed": np.array([3, 4]), "prompts": ["a", "b"]}, {"seed": [3, 4], "prompts": ["a", "b"]}),
        ({"top_logprobs": np.int32(3)}, {"top_logprobs": 3}),
        ({"stop_ids": np.array([3, 4])}, {"stop_ids": [3, 4]}),
        ({"stop_ids": jnp.array([3, 4])}, {"stop_ids": [3, 4]}),
        ({"stop": np.array(["x"])}, {"stop": ["x"]}),
        (
            {"guidance_scale": np.float32(2), "negative_prompt": np.array([5])},
            {"guidance_scale": 2.0, "negative_prompt": [5]},
        ),
        ({"return_state": np.bool_(True)}, {"return_state": True}),
        (
            {"sampling": SamplingParams(**NUMPY_SETTINGS)},
            {"sampling": SamplingParams(temperature=0.5, banned=[3], top_k=4)},
        ),
    ],
)
def test_numbers_of_numpy_are_numbers(engine: Engine, arguments: dict[str, Any], same: dict[str, Any]) -> None:
    """The requests are the same, and of Python's types: NumPy's overflow."""
    requests, expected = (
        engine._requests(**{"copies": 1, "prompts": given.pop("prompts", "abc"), "arguments": given})
        for given in (dict(arguments), dict(same))
    )
    assert requests == expected
    for request in requests:
        assert {type(request.max_tokens), type(request.seed), type(request.top_logprobs)} == {int}
        assert type(request.guidance_scale) is float


def test_options_of_numpy_are_options() -> None:
    options = EngineOptions(**NUMPY_OPTIONS)
    assert options == EngineOptions(num_slots=4, burst_length=200, batch_sizes=(2, 4))
    assert type(options.burst_length) is int


def test_what_a_message_shows_is_short() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown(np.ones((2, 2))) == "array([[1., 1.],        [1., 1.]])"
    assert shown(HUGE) == "<int>"
    assert shown(_Unprintable()) == "<_Unprintable>"
    assert len(shown("x" * 10**6)) == 503
    assert shown(GREEDY) == repr(GREEDY)
