"""A forecaster: patches of a normalized window, causal layers, and a linear map to the horizon.

    past -> (past - mean) / deviation, of the window -> patches, each with its gaps -> layers
    [the layers' last output; the last patch] -> horizon -> back

Channels are rows of their own. What a forecast reads is the last patch and its output, so all before is in the layers'
state, and a stream of patches needs no window (`Stream`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.applications.series.config import SeriesConfig
from rwkv_jax.applications.series.data import Batch, Table, filled, horizons_of, read_table, windows
from rwkv_jax.models import LanguageModel, model_type
from rwkv_jax.models.language_model import PartTransform, identity
from rwkv_jax.models.layers import BiasedLinear, uniform
from rwkv_jax.training.application import Application, Forward, Losses, part_of
from rwkv_jax.training.examples import Examples

SMALLEST_DEVIATION = 0.05
"""Of a window, in deviations of the training part; a constant window has none."""
MOVING_AVERAGE = 25
"""Steps of DLinear's, as published; of a short window a third."""


def window_scale(past: Array) -> tuple[Array, Array]:
    """Mean and deviation [B, 1] of windows [B, steps]."""
    return jnp.mean(past, 1, keepdims=True), jnp.maximum(jnp.std(past, 1, keepdims=True), SMALLEST_DEVIATION)


def patches_of(x: Array, patch: int, stride: int) -> Array:
    """[B, steps] -> [B, number, patch]; the last patch ends with the last step."""
    number = (x.shape[1] - patch) // stride + 1
    at = jnp.arange(number)[:, None] * stride + jnp.arange(patch)
    return x[:, at + (x.shape[1] - patch - (number - 1) * stride)]


class Forecaster(nnx.Module):
    """Layers of any generation over patches."""

    def __init__(self, config: SeriesConfig, rngs: nnx.Rngs, shard_params: PartTransform) -> None:
        model, self.series = config.model, config.series
        inputs, dtype = self.series.patch * (1 + self.series.gaps), model.parameter_dtype
        weight = uniform(rngs.params(), (model.width, inputs), inputs**-0.5, dtype)
        self.patches = shard_params("patches", BiasedLinear(weight))
        self.stack = model_type(model)(
            model, rngs=rngs, shard_params=part_of("stack", shard_params), has_embedding=False, has_head=False
        )
        self.head = shard_params("head", BiasedLinear(jnp.zeros((self.series.horizon, model.width + inputs), dtype)))

    def __call__(self, past: Array, gap: Array, scale: tuple[Array, Array], state: Any, forward: Forward) -> Any:
        """Forecasts after each patch.

        Args:
          past, gap: [B, steps] as in `Batch`; scale: mean and deviation [B, 1].
          state: of the layers; None at the start.

        Returns:
          [B, patches, horizon], and the next state.
        """
        mean, deviation = scale
        own, size = self.series, (self.series.patch, self.series.stride)
        x = patches_of((past - mean) / deviation, *size)
        if own.gaps:
            x = jnp.concatenate([x, patches_of(jnp.log1p(gap), *size)], axis=-1)
        embedded = forward.gather_params("patches", self.patches)(x.astype(self.stack.config.dtype))
        hidden, state = self.stack.hidden(None, state, inputs_embeds=embedded, **forward.of_part("stack"))
        # The last patch itself, too: what is linear in it need not be learned through the layers.
        y = forward.gather_params("head", self.head)(jnp.concatenate([hidden, x.astype(hidden.dtype)], axis=-1))
        y = y.astype(past.dtype)
        return y * deviation[:, None] + mean[:, None], state

    def forecast(self, past: Array, gap: Array, forward: Forward = Forward()) -> Array:  # noqa: B008
        """Forecasts [B, horizon] of windows [B, window]."""
        return self(past, gap, window_scale(past), None, forward)[0][:, -1]

    def losses(self, batch: Batch, forward: Forward) -> Losses:
        """Squared and absolute errors."""
        return forecast_losses(self.forecast(batch.past, batch.gap, forward), batch)


class DLinear(nnx.Module):
    """The moving average and the rest of a normalized window, each mapped to the horizon."""

    def __init__(self, config: SeriesConfig, rngs: nnx.Rngs, shard_params: PartTransform) -> None:
        shape = (config.series.horizon, config.window)
        start = jnp.full(shape, 1 / config.window, config.model.parameter_dtype)  # the mean, as published
        self.trend = shard_params("trend", BiasedLinear(start))
        self.rest = shard_params("rest", BiasedLinear(start))

    def forecast(self, past: Array, gap: Array, forward: Forward = Forward()) -> Array:  # noqa: B008
        """Forecasts [B, horizon] of windows [B, window]."""
        del gap
        mean, deviation = window_scale(past)
        x = (past - mean) / deviation
        span = min(MOVING_AVERAGE, x.shape[1] // 3) | 1
        padded = jnp.pad(x, ((0, 0), (span // 2, span // 2)), mode="edge")
        trend = jnp.mean(patches_of(padded, span, 1), axis=-1)
        y = forward.gather_params("trend", self.trend)(trend) + forward.gather_params("rest", self.rest)(x - trend)
        return y.astype(past.dtype) * deviation + mean

    def losses(self, batch: Batch, forward: Forward) -> Losses:
        """Squared and absolute errors."""
        return forecast_losses(self.forecast(batch.past, batch.gap, forward), batch)


def forecast_losses(forecast: Array, batch: Batch) -> Losses:
    """Mean squared error, which is minimized, and mean absolute error of each row, over what was observed."""
    error, steps = (forecast - batch.future) * batch.seen, forecast.shape[1]
    metrics = {}
    for horizon in (*horizons_of(steps), steps):
        count = jnp.maximum(jnp.sum(batch.seen[:, :horizon], axis=1), 1)
        metrics[f"mse_{horizon}"] = jnp.sum(jnp.square(error[:, :horizon]), axis=1) / count
        metrics[f"mae_{horizon}"] = jnp.sum(jnp.abs(error[:, :horizon]), axis=1) / count
    return Losses(metrics[f"mse_{steps}"], metrics)


class Stream:
    """Forecasts of series that go on: a stride of new steps at a time, with a state that does not grow.

    Mean and deviation stay those of the window that it began with; begin again where a series drifts.
    """

    def __init__(self, model: Forecaster, past: Any, gap: Any = None) -> None:
        """Reads windows [B, steps] of the past, at least a patch, NaN where nothing was observed.

        Args:
          gap: as in `Batch`, for a past that is filled; None counts since what is no NaN.

        Raises:
          ValueError: a past of fewer steps, or one that does not begin with an observation.
        """
        given = np.asarray(past, np.float32)
        if given.ndim != 2 or given.shape[1] < model.series.patch:
            raise ValueError(f"past: shape {given.shape} must be rows and at least {model.series.patch} steps, a patch")
        if not np.isfinite(given[:, 0]).all():
            raise ValueError("past: each row must begin with a number, what was observed; leave out the steps before")
        columns, since = zip(*map(filled, given), strict=True)
        past = jnp.asarray(np.stack(columns))
        self.model, self.scale = model, window_scale(past)
        gap = jnp.asarray(np.stack(since) if gap is None else gap, past.dtype)
        forecasts, self.state = model(past, gap, self.scale, None, Forward())
        self.forecast: Array = forecasts[:, -1]
        overlap = model.series.patch - model.series.stride
        begin = past.shape[1] - overlap
        self.kept = past[:, begin:], gap[:, begin:]
        self.last = past[:, -1], gap[:, -1]
        self._step = nnx.jit(lambda model, past, gap, scale, state: model(past, gap, scale, state, Forward()))

    def push(self, values: Any) -> Array:
        """The forecast [B, horizon] after further steps [B, stride], NaN where nothing was observed.

        Raises:
          ValueError: not a stride of steps, or other rows than at the start.
        """
        given, stride = np.asarray(values, np.float32), self.model.series.stride
        if given.shape != (self.last[0].shape[0], stride):
            raise ValueError(
                f"values: shape {given.shape} must be {(self.last[0].shape[0], stride)}: rows and a stride"
            )
        columns, gaps = [], []
        (value, gap) = self.last
        for column in given.T:
            missing = np.isnan(column)
            value, gap = jnp.where(missing, value, column), jnp.where(missing, gap + 1, 0)
            columns.append(value)
            gaps.append(gap)
        self.last = value, gap
        past = jnp.concatenate([self.kept[0], jnp.stack(columns, 1)], axis=1)
        since = jnp.concatenate([self.kept[1], jnp.stack(gaps, 1)], axis=1)
        forecasts, self.state = self._step(self.model, past, since, self.scale, self.state)
        self.kept = past[:, stride:], since[:, stride:]
        self.forecast = forecasts[:, -1]
        return self.forecast


class SeriesApplication(Application):
    """Forecaster and windows."""

    def __init__(self, config: SeriesConfig) -> None:
        self.config: SeriesConfig = config

    @property
    @override
    def stacks(self) -> Mapping[str, type[LanguageModel]]:
        return {"stack": model_type(self.config.model)} if self.config.series.kind == "layers" else {}

    @override
    def new_model(self, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> Any:
        kind = Forecaster if self.config.series.kind == "layers" else DLinear
        return kind(self.config, rngs, shard_params)

    @override
    def examples(self, report: Callable[[str], None]) -> tuple[Examples, Examples]:
        table = read_table(self.config.series.source)
        report(f"{self.config.series.source}: {len(table.values):,} steps of {', '.join(table.names)}")
        return windows(table, self.config, "train"), windows(table, self.config, "validation")

    def test_metrics(self, model: Any, table: Table | None = None) -> dict[str, float]:
        """Mean errors over the windows of the part that no run reads."""
        found = read_table(self.config.series.source) if table is None else table
        batch = jax.tree.map(jnp.asarray, windows(found, self.config, "test").arrays)
        losses = nnx.jit(lambda model, batch: model.losses(batch, Forward()).metrics)(model, batch)
        return {name: float(jnp.mean(values)) for name, values in losses.items()}
