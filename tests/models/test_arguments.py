"""What a model of any generation is called with: as a module, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.config import ConfigError
from rwkv_jax.models import RWKV4, RWKV5, RWKV6, RWKV7, model_type
from rwkv_jax.models.rc00 import RC00
from rwkv_jax.models.rosa import Rosa
from rwkv_jax.models.rwkv7_rosa import RWKV7Rosa
from rwkv_jax.models.rwkv7a import RWKV7a
from rwkv_jax.models.rwkv7b import RWKV7b
from tests.models.parameters import SMALL, abstract, merge
from tests.models.small_models import FLOAT32, TOKENS, every_class, every_generation, small_float32


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 3), np.float32), r"tokens: float32 of shape \(2, 3\) must be integers of shape \[B, T\]"),
        (np.zeros(3, np.int32), r"tokens: int32 of shape \(3,\) must be integers of shape \[B, T\]"),
        (np.zeros((1, 2, 3), np.int32), r"tokens: int32 of shape \(1, 2, 3\) must be integers"),
        (np.zeros((1, 0), np.int32), r"tokens: int32 of shape \(1, 0\) must be integers of shape \[B, T\], T from 1"),
        (np.array([[3, 41]]), r"tokens: from 3 to 41 must lie from 0 to V - 1 = 40"),
        (np.array([[-1, 4]]), r"tokens: from -1 to 4 must lie from 0 to V - 1 = 40"),
    ],
)
def test_wrong_tokens_are_named(tokens: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_float32("7")(jnp.asarray(tokens))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment_ids": np.zeros((4, 21), int)}, r"segment_ids: shape \(4, 21\) must be \(4, 20\), \[B, T\]"),
        ({"segment_ids": np.zeros((4, 20))}, "segment_ids: dtype .* must be an integer one"),
        ({"lengths": [20, 1, 2, 21]}, "lengths: values from 1 to 21 must lie from 0 to T = 20"),
        ({"lengths": np.zeros((1, 2), int)}, r"lengths: shape \(1, 2\) must be \(4,\), \[B\]"),
        ({"lengths": [1.0, 2.0, 3.0, 4.0]}, "lengths: dtype .* must be an integer one"),
    ],
    ids=["too long", "no integers", "out of range", "no vector", "fractions"],
)
def test_wrong_rows_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_float32("7")(jnp.asarray(TOKENS), **arguments)


def test_a_state_of_another_model_or_batch_is_refused() -> None:
    model, other = small_float32("7"), small_float32("4")
    tokens = jnp.asarray(TOKENS)
    with pytest.raises(
        ValueError, match=r"state: is none of RWKV-7, whose states have the form of model\.initial_state"
    ):
        model(tokens, other.initial_state(4))
    with pytest.raises(ValueError, match=r"state\.att_shift: shape \(3, 1, 32\) must be \(3, 4, 32\)"):
        model(tokens, model.initial_state(1))
    shallow = jax.tree.map(lambda x: x[:2], model.initial_state(4))
    with pytest.raises(ValueError, match=r"state\.att_shift: shape \(2, 4, 32\) must be \(3, 4, 32\)"):
        model(tokens, shallow)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 31), (1, 2, 3, 32)], ids=str)
def test_wrong_embeddings_are_named(shape: tuple[int, ...]) -> None:
    named_shape = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"inputs_embeds: shape {named_shape} must be \[B, T, C = 32\]"):
        small_float32("4")(None, inputs_embeds=jnp.zeros(shape))


@pytest.mark.parametrize("method", ["__call__", "hidden", "residual_stream"])
def test_tokens_and_embeddings_are_one_or_the_other(method: str) -> None:
    call = getattr(small_float32("6"), method)
    for arguments in ((None, {}), (jnp.zeros((1, 2), jnp.int32), {"inputs_embeds": jnp.zeros((1, 2, 32))})):
        with pytest.raises(ValueError, match="give tokens, or inputs_embeds in their place, and not both"):
            call(arguments[0], **arguments[1])


@every_class
def test_an_unknown_implementation_is_refused(generation: str) -> None:
    config = dataclasses.replace(FLOAT32[generation], wkv_implementation="cuda")
    with pytest.raises(ValueError, match=f"implementation = 'cuda': wkv{generation[0]} has .*scan"):
        jax.eval_shape(lambda params: merge(config, params)(jnp.asarray(TOKENS)), abstract(config)[1])


@pytest.mark.parametrize(
    ("kind", "generation", "remedy"),
    [
        (RWKV4, "5.2", "RWKV4 is 4;"),
        (RWKV5, "6", r"RWKV5 is 5.0, 5.1, 5.2;"),
        (RWKV6, "7", "RWKV6 is 6;"),
        (RWKV7, "4", "RWKV7 is 7;"),
    ],
)
def test_a_class_refuses_other_generations(kind: Any, generation: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.generation = '{generation}': {remedy} .*model_type\(config\)"):
        kind(SMALL[generation], rngs=nnx.Rngs(0))


def test_every_generation_has_its_class() -> None:
    expected = {"4": RWKV4, "5.0": RWKV5, "5.1": RWKV5, "5.2": RWKV5, "6": RWKV6, "7": RWKV7}
    expected |= {"7-rosa": RWKV7Rosa, "8-rosa": Rosa}
    expected |= {"7a": RWKV7a, "7b": RWKV7b, "8-rc00": RC00}
    assert {name: model_type(config) for name, config in SMALL.items()} == expected


@pytest.mark.long  # without jit every operation is compiled by itself
@every_generation
def test_a_model_is_a_module_that_can_be_called(generation: str) -> None:
    config = dataclasses.replace(FLOAT32[generation], num_layers=2)
    model = model_type(config)(config, rngs=nnx.Rngs(0))
    logits, state = model(jnp.asarray(TOKENS[:, :3]))
    more, _ = model(jnp.asarray(TOKENS[:, 3:4]), state)
    whole, _ = model(jnp.asarray(TOKENS[:, :4]))
    np.testing.assert_allclose(jnp.concatenate([logits, more], axis=1), whole, rtol=0, atol=1e-5)
