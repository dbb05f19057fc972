"""Operators against numbers from other people's implementations; tests/golden/README.md explains the keys."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tests.golden import AS_USERS, QUICK, assert_close, load_golden
from tests.kernels.operators import WAYS, Way

Arrays = dict[str, Array]

CASES = {
    "wkv4": ("c0_basic", "c1_zero", "c2_extreme", "c3_basic", "c4_basic"),
    "wkv5": ("c0_basic", "c1_zero", "c2_extreme", "c3_basic", "c4_basic"),
    "wkv6": ("c0_basic", "c1_zero", "c2_extreme", "c3_basic", "c4_basic"),
    # `beyond` has decays below any that a model makes.
    "wkv7": ("c0_basic", "c1_zero", "c2_extreme", "c3_generic", "c4_beyond", "c5_basic", "c6_basic"),
}

FLOAT32_BOUNDS = {
    # Of values and of gradients: five times what the README says that a naive loop in float32 reaches.
    "wkv4": (3.5e-5, 4.5e-5),
    "wkv5": (2.5e-6, 5e-6),
    "wkv6": (2.5e-6, 5e-6),
    "wkv7": (2.5e-6, 5e-6),
}


def run_wkv4(way: Way, inputs: Arrays) -> Arrays:
    state = inputs["aa"], inputs["bb"], inputs["pp"]
    y, final = way.run(log_w=log_decay(inputs), **{name: inputs[name] for name in ("u", "k", "v")}, state=state)
    return {"y": y} | dict(zip(("aa_T", "bb_T", "pp_T"), final, strict=True))


def run_keys_first(way: Way, inputs: Arrays) -> Arrays:
    """WKV-5 and 6, whose states the files hold with the key axis first."""
    arguments = {name: inputs[name] for name in ("r", "k", "v", "u")}
    y, state = way.run(log_w=log_decay(inputs), **arguments, state=inputs["S"].swapaxes(-1, -2))
    return {"y": y, "S_T": state.swapaxes(-1, -2)}


def run_wkv7(way: Way, inputs: Arrays) -> Arrays:
    arguments = {name: inputs[name] for name in ("r", "k", "v", "a", "b")}
    y, state = way.run(log_w=log_decay(inputs), **arguments, state=inputs["S"])
    return {"y": y, "S_T": state}


def log_decay(inputs: Arrays) -> Array:
    """The files hold w_raw with decay = e^{-e^{w_raw}}."""
    return -jnp.exp(inputs["w_raw"])


RUN = {"wkv4": run_wkv4, "wkv5": run_keys_first, "wkv6": run_keys_first, "wkv7": run_wkv7}


def rows(*kinds: str) -> list:
    """Every way with its operator's cases of these kinds."""
    return [
        pytest.param(way, case, id=f"{way}-{case}", marks=marks(way, case))
        for way in WAYS
        for case in CASES[way.operator.name]
        if case.endswith(kinds)
    ]


def marks(way: Way, case: str) -> tuple[pytest.MarkDecorator, ...]:
    """Always all cases of what runs on a CPU, and a telling one of the others."""
    always = way.name in ("scan", "chunked") or case.endswith("extreme" if way.operator.name == "wkv4" else "generic")
    return () if always else (pytest.mark.long,)


@functools.cache
def compiled(way: Way, quick: bool) -> Callable[..., tuple[Arrays, Arrays]]:
    def results(inputs: Arrays, cotangents: Arrays) -> tuple[Arrays, Arrays]:
        values, pull_back = jax.vjp(functools.partial(RUN[way.operator.name], way), inputs)
        return values, pull_back(cotangents)[0]

    return jax.jit(results, compiler_options=QUICK if quick else AS_USERS)


def check(way: Way, case: str, dtype: type, value_bound: float, gradient_bound: float) -> None:
    golden = load_golden(f"op/{way.operator}_s0.npz")

    def part(kind: str) -> dict[str, np.ndarray]:
        prefix = f"{case}.{kind}."
        return {key.removeprefix(prefix): x for key, x in golden.items() if key.startswith(prefix)}

    run = compiled(way, quick=dtype == np.float64 or way.is_pallas)
    inputs, given = ({name: jnp.asarray(x, dtype) for name, x in part(kind).items()} for kind in ("in", "ct"))
    zeros = {name: jnp.zeros_like(inputs[name.removesuffix("_T")]) for name in part("out") if name != "y"}
    values, from_y = run(inputs, zeros | {"y": given["gy"]})
    assert_close(values, part("out"), value_bound)
    check_gradients(from_y, part("g"), gradient_bound)
    if expected := part("h"):  # some cases have no gradients through the final state
        if "gS" in given:
            from_state = {"S_T": given["gS"]}
        else:  # what they differentiate is e^{pp_T} (aa_T gnum + bb_T gden)
            scale = jnp.exp(values["pp_T"])
            from_state = {"aa_T": scale * given["gnum"], "bb_T": scale * given["gden"]}
        check_gradients(run(inputs, zeros | {"y": given["gy"]} | from_state)[1], expected, gradient_bound)


def check_gradients(gradients: Arrays, expected: dict[str, np.ndarray], bound: float) -> None:
    """Some files lack the gradient of an empty WKV-4 state."""
    assert expected.keys() <= gradients.keys()
    assert_close({name: gradients[name] for name in expected}, expected, bound)


@pytest.mark.parametrize(("way", "case"), [row for row in rows("") if not row.values[0].is_pallas])  # pyright: ignore
def test_float64_equals_other_implementations(float64: None, way: Way, case: str) -> None:
    check(way, case, np.float64, value_bound=1e-12, gradient_bound=1e-12)


@pytest.mark.long  # in float32, test_against_definition.py looks each time
@pytest.mark.parametrize(("way", "case"), rows("extreme", "generic", "beyond"))
def test_float32_is_close_to_other_implementations(way: Way, case: str) -> None:
    check(way, case, np.float32, *FLOAT32_BOUNDS[way.operator.name])
