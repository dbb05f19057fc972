"""How a CPU multiplies many rows by packed matrices: by int8 digits or by converted matrices, whichever it does faster.

Processors with int8 matrix instructions multiply digits faster, others floating point. So both are timed once on each
processor, and the result is kept with the other measurements (docs/autotune.md).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rwkv_jax import autotune
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.packed import GROUP_SIZE, Int4Matrix, Int8Matrix, ManyRows, PackedMatrix, product
from rwkv_kernels import dispatch
from rwkv_kernels.autotune import BOUND, Trial, Tuning, Workload, median_seconds, relative_error

MIN_WIDTH = 256
"""Smaller models are fast in either form, and keep to digits."""

_MARGIN = 1.2  # times as fast as digits: what is nearly as fast would be chosen by chance
_FORMS: tuple[ManyRows, ...] = ("digits", "converted")


def choose_form(model: LanguageModel, platform: str) -> ManyRows:
    """The faster form for a model on this processor, measured at most once; `digits` where nothing is packed."""
    width = model.config.width
    packed = next((x for x in _leaves(model) if isinstance(x, PackedMatrix)), None)
    if platform != "cpu" or packed is None or width < MIN_WIDTH:
        return "digits"
    return faster_form("int4" if isinstance(packed, Int4Matrix) else "int8", width // GROUP_SIZE * GROUP_SIZE)


def with_form(model: LanguageModel, form: ManyRows) -> LanguageModel:
    """The same model, sharing its arrays, with that form of its packed matrices' products."""
    if form == "digits":
        return model
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: _with_form(x, form), params, is_leaf=_is_packed))


@functools.cache
def faster_form(kind: str, width: int) -> ManyRows:
    """`converted` if it is a good deal faster than `digits` for 512 rows and a matrix [width, width].

    Args:
      kind: int8 or int4.
    """
    rows = autotune.PREFILL_STEPS
    problem = dispatch.problem_here((1, rows, 1, width, width), "float32")
    workload = Workload(f"{kind} product", problem, "float32", gradients=False, packed=False)
    tuning = autotune.find_or_measure(workload, lambda workload: Tuning(workload, measure(kind, rows, width)))
    seconds = {trial.name: trial.seconds or math.inf for trial in tuning.trials}
    return "converted" if _MARGIN * seconds["converted"] < seconds["digits"] else "digits"


def measure(kind: str, rows: int, width: int, clock: Callable[[], float] = time.perf_counter) -> tuple[Trial, ...]:
    """Error and time of both forms; one that is wrong has no time, and is not taken."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    scale = jnp.full((width,), 1 / 127, jnp.float32)
    if kind == "int8":
        matrix: PackedMatrix = Int8Matrix(jnp.asarray(rng.integers(-127, 128, (width, width)), jnp.int8), scale)
    else:
        groups = (width, width // GROUP_SIZE)
        codes = jnp.asarray(rng.integers(0, 256, (*groups, GROUP_SIZE // 2)), jnp.uint8)
        matrix = Int4Matrix(codes, scale, jnp.full(groups, 17, jnp.int8), jnp.full(groups, -128, jnp.int8))
    exact = x.astype(np.float64) @ np.asarray(matrix.dequantized(), np.float64).T
    given = jnp.asarray(x)
    trials = []
    for form in _FORMS:
        held = _with_form(matrix, form)
        run = functools.partial(jax.jit(product).lower(given, held).compile(), given, held)
        error = relative_error(np.asarray(run(), np.float64), exact)
        if error > BOUND:
            trials.append(Trial(form, error, None, f"WRONG: it is off by {error:.0e}, at most {BOUND:.0e}"))
            continue
        trials.append(Trial(form, error, median_seconds(run, 5, math.inf, clock), None))
    return tuple(trials)


def _leaves(model: LanguageModel) -> list[object]:
    return jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=_is_packed)


def _is_packed(x: object) -> bool:
    return isinstance(x, PackedMatrix)


def _with_form(x: Any, form: ManyRows) -> Any:
    return dataclasses.replace(x, many_rows=form) if isinstance(x, PackedMatrix) else x
