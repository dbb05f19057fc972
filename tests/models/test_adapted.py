"""Adapted matrices against what other people's trainers gave (tests/golden/tuning), and against their merged ones."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import AdapterKind
from rwkv_jax.models import abstract_model
from rwkv_jax.models.adapted import AdaptedMatrix
from rwkv_jax.models.layers import linear
from rwkv_jax.training.loss import sum_losses
from rwkv_jax.weights.official import place_params, read_config
from rwkv_jax.weights.pth.file import read_torch_file
from rwkv_jax.weights.quantized import pack, packed_matrix
from rwkv_jax.weights.safetensors import read_safetensors
from tests.golden import AS_USERS, GOLDEN_DIR, QUICK, assert_close, load_golden, relative_error

LORA = GOLDEN_DIR / "tuning" / "lora"


class Case(NamedTuple):
    """A variant: its kind, and its factor, with that of some matrices."""

    kind: AdapterKind
    factor: float = 1.0
    factors: Mapping[str, float] = MappingProxyType({})


CASES = {
    "rwkvpeft_lora": Case("lora", 12 / 8),
    "rwkvpeft_pissa": Case("pissa"),
    "rwkvpeft_bone": Case("miss"),
    "rwkvpeft_bat": Case("bat"),
    "hfpeft_lora": Case("lora", 12 / 8),
    "hfpeft_rslora": Case("rslora", 12 / 8**0.5, {"att.key": 12 / 4**0.5, "att.value": 5 / 8**0.5}),
    "hfpeft_dora": Case("dora", 12 / 8),
    "hfpeft_miss": Case("miss"),
    "hfpeft_bat": Case("bat"),
}


@functools.cache
def base(dtype: str) -> tuple[Any, dict[str, NDArray]]:
    tensors = read_safetensors(GOLDEN_DIR / "eval" / "base_v7_s0.safetensors")
    return read_config(tensors), {name: np.asarray(x, dtype) for name, x in tensors.items()}


@functools.cache
def adapter_of(name: str) -> dict[str, dict[str, NDArray]]:
    """{official name of a matrix: {part: float64}}."""
    if name.startswith("rwkvpeft"):
        tensors = dict(read_torch_file(LORA / f"{name}_s0.pth").tensors)
        if name == "rwkvpeft_pissa":
            first = read_torch_file(LORA / "rwkvpeft_pissa_init_s0.pth").tensors
            tensors |= {key.removeprefix("model."): x for key, x in first.items()}
    else:
        official = {theirs: ours for ours, theirs in json.loads((LORA / "hf_names_s0.json").read_text()).items()}
        tensors = {}
        for key, x in read_safetensors(LORA / f"{name}_s0" / "adapter_model.safetensors").items():
            found = re.fullmatch(
                r"base_model\.model\.(.*?)\.(lora_[AB]|miss_block|lora_magnitude_vector)(\.weight)?", key
            )
            assert found is not None
            tensors[f"{official[f'{found[1]}.weight'].removesuffix('.weight')}.{found[2]}"] = x
    parts: dict[str, dict[str, NDArray]] = {}
    for key, x in tensors.items():
        matrix, _, part = key.rpartition(".")
        part = "miss_block" if part == "disha" and CASES[name].kind == "miss" else part
        parts.setdefault(matrix, {})[part] = np.asarray(x, np.float64)
    return parts


def adapted_params(name: str, dtype: str, parts: Any, *, merge: bool = False) -> Any:
    """The base with a variant's adapter in it, whose parts these are."""
    config, tensors = base(dtype)
    case = CASES[name]
    if case.kind == "pissa":
        lacks = {f"{key}.weight": x["init_lora_B"] @ x["init_lora_A"] for key, x in adapter_of(name).items()}
        tensors = {key: (x - lacks[key]).astype(dtype) if key in lacks else x for key, x in tensors.items()}
    params = place_params(tensors, config, dtype=dtype)
    for matrix, own in parts.items():
        _, layer, mixing, last = matrix.split(".")
        folder, stacked = ("first_block", False) if layer == "0" else ("blocks", True)
        arrays = {part: jnp.asarray(x, dtype) for part, x in own.items()}
        scale = jnp.asarray(case.factors.get(f"{mixing}.{last}", case.factor), dtype)
        if stacked:  # one of them, in a model of two layers
            arrays, scale = jax.tree.map(lambda x: x[None], (arrays, scale))
        adapted = AdaptedMatrix(params[folder][mixing][last]["weight"], arrays, scale, kind=case.kind)
        params[folder][mixing][last]["weight"] = adapted.merged() if merge else adapted
    return params


@functools.cache
def program(dtype: str, *, differentiates: bool) -> Any:
    config, _ = base(dtype)
    graphdef, _ = abstract_model(dataclasses.replace(config, dtype=dtype))

    def loss(parts: Any, params: Any, tokens: Array, targets: Array) -> Any:
        for (folder, mixing, last), own in parts.items():
            weight = params[folder][mixing][last]["weight"]
            params[folder][mixing][last]["weight"] = dataclasses.replace(weight, parts=own)
        logits, _ = nnx.merge(graphdef, params)(tokens)
        total = sum_losses(lambda x: x, logits, targets, None)
        return total.nll / total.count, logits

    of = jax.value_and_grad(loss, has_aux=True) if differentiates else loss
    return jax.jit(of, compiler_options=QUICK if dtype == "float64" else AS_USERS)


def check_logits(name: str, logits: Array, bound: float) -> None:
    golden = load_golden("tuning/lora/lora_s0.npz")
    found = np.asarray(logits)[:, golden["pos"]]
    wanted = golden.get(f"{name}.logits_at_pos")
    assert relative_error(found, golden[f"{name}.logits"][:, golden["pos"]] if wanted is None else wanted) < bound


def run(name: str, dtype: str, *, merge: bool, differentiates: bool = False) -> Any:
    golden = load_golden("tuning/lora/lora_s0.npz")
    params = adapted_params(name, dtype, adapter_of(name), merge=merge)
    parts = {}
    if differentiates:
        for folder in ("first_block", "blocks"):
            for mixing in ("att", "ffn"):
                for last, part in params[folder][mixing].items():
                    if isinstance(part, dict) and isinstance(weight := part.get("weight"), AdaptedMatrix):
                        parts[folder, mixing, last] = weight.parts
    call = program(dtype, differentiates=differentiates)
    return call(parts, params, golden["tokens"], golden["labels"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("float64")
def test_logits_in_float64(name: str) -> None:
    """Of adapted matrices, and of merged ones."""
    for merge in (False, True):
        check_logits(name, run(name, "float64", merge=merge)[1], 1e-11)


@pytest.mark.parametrize("name", ["rwkvpeft_lora", "rwkvpeft_bone", "rwkvpeft_bat"])
@pytest.mark.usefixtures("float64")
def test_gradients_in_float64(name: str) -> None:
    golden = load_golden("tuning/lora/lora_s0.npz")
    (loss, _), gradients = run(name, "float64", merge=False, differentiates=True)
    assert abs(loss - golden[f"{name}.loss"]) < 1e-11
    found: dict[str, NDArray] = {}
    for (folder, mixing, last), parts in gradients.items():
        for part, x in parts.items():
            own = np.asarray(x)[0] if folder == "blocks" else np.asarray(x)
            part = "disha" if name == "rwkvpeft_bone" else part
            found[f"blocks.{int(folder == 'blocks')}.{mixing}.{last}.{part}"] = own
    norms = {key.partition(".gradN.")[2]: x for key, x in golden.items() if key.startswith(f"{name}.gradN.")}
    assert_close({key: np.linalg.norm(found[key]) for key in norms}, norms, 1e-9)
    whole = {key.partition(".grad.")[2]: x for key, x in golden.items() if key.startswith(f"{name}.grad.")}
    assert whole
    assert_close({key: found[key] for key in whole}, whole, 1e-9)


@pytest.mark.parametrize(
    "name", [name if name == "rwkvpeft_lora" else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_logits_in_float32(name: str) -> None:
    for merge in (False, True):
        check_logits(name, run(name, "float32", merge=merge)[1], 1e-5)


def normal(*shape: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def adapted(kind: AdapterKind, out: int, width: int, rank: int, *leading: int) -> AdaptedMatrix:
    weight, low = normal(*leading, out, width), normal(*leading, rank, width, seed=1)
    parts = {"lora_A": low, "lora_B": normal(*leading, out, rank, seed=2)}
    if kind == "dora":
        parts["lora_magnitude_vector"] = jnp.abs(normal(*leading, out, seed=3))
    elif kind == "miss":
        parts = {"miss_block": normal(*leading, rank, out, seed=4)}
    elif kind == "bat":
        parts = {"miss_block": normal(*leading, out // rank, rank, rank, seed=5)}
    return AdaptedMatrix(weight, parts, jnp.full(leading, 0.7, jnp.float32), kind=kind)


KINDS: list[AdapterKind] = ["lora", "dora", "miss", "bat"]


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_layers_are_merged_as_each_layer(kind: AdapterKind) -> None:
    stacked = adapted(kind, 12, 8, 4, 3)
    np.testing.assert_allclose(stacked.merged(), jnp.stack([one.merged() for one in stacked]), rtol=1e-5, atol=1e-6)
    x = normal(2, 5, 8, seed=9)
    for one in stacked:
        np.testing.assert_allclose(linear(x, one), linear(x, one.merged()), rtol=1e-4, atol=1e-4)


def test_inputs_that_blocks_do_not_divide() -> None:
    weight = adapted("miss", 12, 10, 4)
    x = normal(3, 10, seed=9)
    np.testing.assert_allclose(linear(x, weight), linear(x, weight.merged()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_zero_is_the_base(kind: AdapterKind) -> None:
    weight = adapted(kind, 12, 8, 4)
    off = AdaptedMatrix(weight.base, weight.parts, jnp.zeros(()), kind=kind)
    x = normal(3, 8, seed=9)
    np.testing.assert_array_equal(linear(x, off), linear(x, weight.base))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_base(kind: AdapterKind, quantization: Any) -> None:
    plain = adapted(kind, 16, 64, 8)
    packed = packed_matrix(jax.tree.map(jnp.asarray, pack(np.asarray(plain.base), quantization)), transposed=False)
    weight = AdaptedMatrix(packed, plain.parts, plain.scale, kind=kind)
    x = normal(2, 3, 64, seed=9)
    assert relative_error(linear(x, weight), linear(x, weight.merged())) < 2e-6


@pytest.mark.parametrize("kind", ["lora", "miss"])
def test_each_row_has_its_own_adapter(kind: AdapterKind) -> None:
    several = [adapted(kind, 12, 8, 4), adapted(kind, 12, 8, 4)]
    several[1] = AdaptedMatrix(
        several[0].base, jax.tree.map(lambda x: 2 - x, several[1].parts), jnp.asarray(0.3), kind=kind
    )
    parts, scale = jax.tree.map(lambda *x: jnp.stack(x), *[(each.parts, each.scale) for each in several])
    scale = jnp.append(scale, 0.0)  # the third is none
    parts = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:1])]), parts)
    mixed = AdaptedMatrix(several[0].base, parts, scale, jnp.asarray([1, 2, 0]), kind=kind)
    x = normal(3, 5, 8, seed=9)
    wanted = [linear(x[0], several[1]), linear(x[1], several[0].base), linear(x[2], several[0])]
    np.testing.assert_allclose(linear(x, mixed), jnp.stack(wanted), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear(x.reshape(15, 8), mixed), jnp.concatenate(wanted), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(linear(x, mixed)[1], wanted[1])
    with pytest.raises(ValueError, match="3 adapters of the rows of a batch"):
        mixed.merged()


@pytest.mark.parametrize("kind", ["dora", "bat"])
def test_kinds_that_do_not_only_add_refuse_rows(kind: AdapterKind) -> None:
    one = adapted(kind, 12, 8, 4)
    parts, scale = jax.tree.map(lambda x: x[None], (one.parts, one.scale))
    mixed = AdaptedMatrix(one.base, parts, scale, jnp.zeros(3, jnp.int32), kind=kind)
    with pytest.raises(ValueError, match=f"kind = '{kind}': does not only add to a matrix"):
        linear(normal(3, 5, 8), mixed)


def test_dropout_keeps_the_mean_and_is_a_function_of_the_keys() -> None:
    lora = adapted("lora", 12, 256, 4)
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (2, 64), np.uint32))
    weight = AdaptedMatrix(lora.base, lora.parts, lora.scale, dropout_keys=keys, kind="lora", dropout=0.25)
    x = jnp.ones((2, 64, 256))
    kept = weight._dropped(x)
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(jnp.mean(kept)) - 1) < 0.02
    assert float(jnp.std(jnp.mean(kept, axis=2))) < 0.05  # of a token
    np.testing.assert_array_equal(weight._dropped(x), kept)
    later = dataclasses.replace(weight, dropout_keys=keys[:, 8:])
    np.testing.assert_array_equal(later._dropped(x[:, 8:]), kept[:, 8:])
