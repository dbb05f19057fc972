"""What names and shapes say about a model, and parameters placed from official tensors and back."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.official import (
    check_tensors,
    official_shapes,
    official_tensors,
    place_params,
    read_config,
)
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, assert_same_bits, computed_in, random_tensors

each_generation = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each_generation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_config_is_read_from_names_shapes_and_dtype(config: ModelConfig, dtype: str) -> None:
    assert read_config(random_tensors(config, dtype)) == computed_in(config, dtype)


def test_the_names_are_those_of_the_official_files() -> None:
    # One of each kind, with its shape, from the official sources (facts, section 1).
    shapes = {key: official_shapes(config) for key, config in CONFIGS.items()}
    of_rosa = {key: shapes.pop(key) for key in list(shapes) if "rosa" in key}
    for every in of_rosa.values():
        assert every["blocks.1.rosa.q.weight"] == every["blocks.0.rosa.o.weight"] == (32, 32)
        assert every["blocks.0.rosa.k.bias"] == every["blocks.2.ln3.weight"] == (32,)
        assert every["blocks.2.rosa.rosa_qkv.emb"] == every["blocks.0.rosa.x_v"] == (1, 1, 32)
    assert [key for key, every in of_rosa.items() if "blocks.1.ln0.weight" in every] == ["8-rosa, official"]
    assert [key for key, every in of_rosa.items() if "blocks.0.ln0.weight" not in every] == ["7-rosa"]
    for every in shapes.values():
        assert next(iter(every)) == "emb.weight"
        assert list(every)[-1] == "head.weight"
        assert every["emb.weight"] == every["head.weight"] == (29, 32)
        assert every["blocks.0.ln0.bias"] == every["blocks.2.ln2.weight"] == every["ln_out.weight"] == (32,)
        assert every["blocks.1.att.output.weight"] == (32, 32)
        assert every["blocks.2.ffn.value.weight"] == (32, 48)
        assert "blocks.1.ln0.weight" not in every
    assert shapes["4"]["blocks.0.att.time_decay"] == shapes["4"]["blocks.1.att.time_first"] == (32,)
    assert shapes["4"]["blocks.0.att.time_mix_k"] == shapes["4"]["blocks.0.ffn.time_mix_r"] == (1, 1, 32)
    assert shapes["5.0"]["blocks.0.att.time_first"] == shapes["5.1"]["blocks.0.att.time_faaaa"] == (4,)
    assert "blocks.0.att.gate.weight" not in shapes["5.0"]
    assert shapes["5.1"]["blocks.0.att.gate.weight"] == (32, 32)
    assert shapes["5.2"]["blocks.0.att.time_decay"] == shapes["6"]["blocks.0.att.time_faaaa"] == (4, 8)
    assert shapes["6"]["blocks.0.att.time_maa_w1"] == (32, 15)
    assert shapes["6"]["blocks.0.att.time_maa_w2"] == (5, 3, 32)
    assert shapes["6"]["blocks.0.att.time_decay"] == shapes["6"]["blocks.0.ffn.time_maa_k"] == (1, 1, 32)
    assert shapes["6"]["blocks.0.att.time_decay_w2"] == (5, 32)
    assert shapes["7"]["blocks.0.att.x_r"] == shapes["7"]["blocks.1.att.v0"] == (1, 1, 32)
    assert shapes["7"]["blocks.0.att.r_k"] == (4, 8)
    assert shapes["7"]["blocks.2.att.g2"] == (7, 32)
    assert not [name for name in shapes["7"] if name.startswith("blocks.0.att.v") and name[-1].isdecimal()]
    assert shapes["7, from the trainer"]["blocks.0.att.v1"] == (32, 6)


@each_generation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_goes_in_comes_out_again_bit_for_bit(config: ModelConfig, dtype: str) -> None:
    tensors = random_tensors(config, dtype)
    tensors["emb.weight"][0, :3] = [np.nan, -0.0, np.inf]
    released = []
    params = place_params(tensors, config, drop_pages=lambda: released.append(None))
    assert len(released) == len(tensors)
    assert_same_bits(dict(official_tensors(config, params)), tensors)


def test_parameters_do_not_share_memory_with_the_file() -> None:
    config = CONFIGS["4"]
    tensors = random_tensors(config)
    params = place_params(tensors, config)
    before = np.array(params["emb"]["weight"])
    for tensor in tensors.values():
        tensor[...] = 0
    np.testing.assert_array_equal(params["emb"]["weight"], before)


def test_a_dtype_is_given_to_every_parameter() -> None:
    config = CONFIGS["6"]
    tensors = random_tensors(config)
    params = place_params(tensors, config, dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    expected = {name: x.astype(params["emb"]["weight"].dtype) for name, x in tensors.items()}
    assert_same_bits(dict(official_tensors(config, params)), expected)


@pytest.mark.parametrize(
    ("first", "second", "widest"),
    [("bfloat16", "float32", "float32"), ("float16", "bfloat16", "float32"), ("float16", "float16", "float16")],
)
def test_layers_of_several_dtypes_are_held_exactly(first: str, second: str, widest: str) -> None:
    config = CONFIGS["5.2"]
    tensors = random_tensors(config, first)
    name = "blocks.2.att.key.weight"
    tensors[name] = random_tensors(config, second)[name]
    found = dict(official_tensors(config, place_params(tensors, config)))
    for layer, dtype in (("0", first), ("1", widest), ("2", widest)):
        key = f"blocks.{layer}.att.key.weight"
        assert found[key].dtype.name == dtype
        np.testing.assert_array_equal(found[key].astype(np.float32), tensors[key].astype(np.float32))
    assert found["blocks.1.att.value.weight"].dtype.name == first
    assert place_params(tensors, config, dtype="float16")["blocks"]["att"]["key"]["weight"].dtype == np.float16


def test_float64_needs_to_be_switched_on() -> None:
    config = CONFIGS["5.2"]
    tensors = {name: x.astype(np.float64) for name, x in random_tensors(config).items()}
    with pytest.raises(WeightsError, match=r"float64, which JAX has switched off; set jax_enable_x64, or give a dtype"):
        place_params(tensors, read_config(tensors))


# Wrong tensors


@each_generation
def test_everything_that_does_not_fit_is_listed_at_once(config: ModelConfig) -> None:
    tensors = random_tensors(config)
    del tensors["blocks.1.ln2.weight"], tensors["ln_out.bias"]
    tensors["blocks.0.att.extra"] = np.zeros((2, 3), np.float32)
    square = next(name for name in ("blocks.2.att.value.weight", "blocks.2.rosa.v.weight") if name in tensors)
    tensors[square] = np.zeros((32, 31), np.float32)
    tensors["blocks.0.ffn.key.weight"] = tensors["blocks.0.ffn.key.weight"].astype(np.int32)
    with pytest.raises(WeightsError) as caught:
        check_tensors(tensors, read_config(tensors))
    message = str(caught.value)
    for expected in (
        f"{config.title} model of 3 layers of width 32",
        "missing      blocks.1.ln2.weight [32]",
        "missing      ln_out.bias [32]",
        "not expected blocks.0.att.extra [2, 3]",
        f"misshapen    {square} is [32, 31], must be [32, 32]",
        "wrong dtype  blocks.0.ffn.key.weight is int32, must be float32",
    ):
        assert expected in message
    assert message.count("\n") == 5


@each_generation
def test_each_tensor_is_missed(config: ModelConfig) -> None:
    tensors = random_tensors(config)
    for name in tensors:
        others = {other: x for other, x in tensors.items() if other != name}
        with pytest.raises(WeightsError):
            check_tensors(others, read_config(others))


def test_a_long_list_is_cut() -> None:
    tensors = random_tensors(CONFIGS["7"]) | {f"blocks.0.att.extra{i}": np.zeros(1, np.float32) for i in range(50)}
    with pytest.raises(WeightsError, match=r"and 10 more$"):
        check_tensors(tensors, read_config(tensors))


def test_a_name_cannot_make_a_billion_layers() -> None:
    tensors = random_tensors(CONFIGS["4"]) | {"blocks.999999999.ln1.weight": np.zeros(32, np.float32)}
    with pytest.raises(WeightsError, match=r"a name has layer 999999999, but there are \d+ tensors"):
        read_config(tensors)


@pytest.mark.parametrize(
    "names", [[], ["model.layers.0.self_attn.q_proj.weight"], ["blocks.0.ln1.weight", "emb.weight"]], ids=str
)
def test_what_is_no_rwkv_is_said_to_be_none(names: list[str]) -> None:
    with pytest.raises(WeightsError, match="no generation of RWKV has such names"):
        read_config({name: np.zeros(1) for name in names})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.att.v0": None}, "not expected blocks.0.att.v0"),
        ({"emb.weight": np.zeros((29, 33), np.float32)}, "RWKV-7 model that cannot be: model.width = 33"),
        ({"blocks.0.att.r_k": np.zeros((3, 8), np.float32)}, "RWKV-7 model that cannot be: model.width = 32"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_sizes_that_contradict_each_other(change: dict[str, np.ndarray], message: str) -> None:
    if "v0" in next(iter(change)):  # only some of the first layer's unused tensors
        tensors = random_tensors(CONFIGS["7, from the trainer"])
        del tensors["blocks.0.att.v1"]
        message = "missing      blocks.0.att.v1"
    else:
        tensors = random_tensors(CONFIGS["7"]) | change
    with pytest.raises(WeightsError, match=message):
        check_tensors(tensors, read_config(tensors))


@pytest.mark.parametrize(
    ("key", "name", "value", "wanted"),
    [
        ("7", "negative_eigenvalues", "TRUE", "true or false"),
        ("7", "negative_eigenvalues", "1", "true or false"),
        ("7", "negative_eigenvalues", "", "true or false"),
        ("8-rosa", "rosa_bits", "true", "a whole number"),
        ("8-rosa", "rosa_bits", "-4", "a whole number"),
        ("8-rosa", "rosa_bits", "4" * 400, "a whole number"),
    ],
)
def test_metadata_that_say_neither_are_refused(key: str, name: str, value: str, wanted: str) -> None:
    """They decide what is computed."""
    with pytest.raises(WeightsError, match=rf"{name} = '{value[:80]}' in its metadata: must be {wanted}; write"):
        read_config(random_tensors(CONFIGS[key]), {name: value})


def test_metadata_say_what_is_computed() -> None:
    tensors = random_tensors(CONFIGS["7"])
    for value in (True, False):
        assert read_config(tensors, {"negative_eigenvalues": str(value).lower()}).negative_eigenvalues is value
