"""The forecaster: windows of the past alone, streams equal to windows, gaps, and series that statsmodels ships."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.applications.series.config import Series, SeriesConfig
from rwkv_jax.applications.series.data import (
    SEASONS,
    Split,
    Table,
    filled,
    read_table,
    scales,
    seasonal_naive,
    split_points,
    windows,
)
from rwkv_jax.applications.series.model import SeriesApplication, Stream, forecast_losses, window_scale
from rwkv_jax.config import (
    CheckpointConfig,
    ConfigError,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
)
from rwkv_jax.training.application import Forward, load_application
from rwkv_jax.training.loop import train
from tests.applications.toy import params_of

SERIES = Series(source="waves", horizon=6, patch=4, stride=2)


def config(run_dir: str = "runs/x", **changes: Any) -> SeriesConfig:
    options: dict[str, Any] = {
        "run_dir": run_dir,
        "model": ModelConfig(vocab_size=1, num_layers=2, width=16, head_dim=8),
        "series": SERIES,
        "optimizer": OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=2),
        "training": StepConfig(batch_size=16, sequence_length=11, num_steps=12),
        "evaluation": EvaluationConfig(every=6, sample_prompts=()),
        "checkpoint": CheckpointConfig(every=6),
        "logging": LoggingConfig(every=1),
    }
    return SeriesConfig(**options | changes)


@pytest.fixture(scope="module")
def random_model() -> Any:
    application = SeriesApplication(config())
    return application.model(params_of(application))


def test_a_run_learns_and_is_tested(tmp_path: Path) -> None:
    result = train(config(str(tmp_path / "run")))
    assert result.measured is not None
    assert result.measured.metrics.keys() == {f"{kind}_{steps}" for kind in ("mse", "mae") for steps in (1, 3, 6)}
    application, model = load_application(str(tmp_path / "run"), "newest")
    assert isinstance(application, SeriesApplication)
    start = application.new_model(nnx.Rngs(0))
    assert application.test_metrics(model)["mse_6"] < 0.9 * application.test_metrics(start)["mse_6"]


def test_dlinear_is_a_run_like_any(tmp_path: Path) -> None:
    own = config(str(tmp_path / "run"), series=dataclasses.replace(SERIES, kind="dlinear"))
    result = train(own)
    assert sum(x.size for x in jax.tree.leaves(result.state.params)) == 2 * 6 * (own.window + 1)
    first = SeriesApplication(own).new_model(nnx.Rngs(0))
    past = jnp.asarray(np.random.default_rng(0).normal(size=(3, own.window)), jnp.float32)
    # At the start it says the mean of the window, whatever is trend and what is not.
    expected = jnp.broadcast_to(jnp.mean(past, 1, keepdims=True), (3, 6))
    np.testing.assert_allclose(first.forecast(past, None), expected, atol=1e-5)


@pytest.mark.parametrize("stride", [2, 4])
def test_a_stream_equals_the_parallel_form_with_a_state_of_one_size(stride: int) -> None:
    own = config(series=dataclasses.replace(SERIES, stride=stride))
    application = SeriesApplication(own)
    model = application.model(params_of(application))
    values = np.random.default_rng(0).normal(size=(2, own.window + 5 * stride)).astype(np.float32)
    values[:, own.window + 1 :: 3] = np.nan
    past, gap = map(np.stack, zip(*map(filled, values), strict=True))
    past, gap = past.astype(np.float32), gap.astype(np.float32)
    scale = window_scale(jnp.asarray(past[:, : own.window]))
    whole, _ = model(jnp.asarray(past), jnp.asarray(gap), scale, None, Forward())
    stream = Stream(model, past[:, : own.window], gap[:, : own.window])
    expected = model.forecast(jnp.asarray(past[:, : own.window]), jnp.asarray(gap[:, : own.window]))
    np.testing.assert_allclose(stream.forecast, expected, rtol=1e-5, atol=1e-5)
    shapes = jax.tree.map(jnp.shape, (stream.state, stream.kept))
    for at in range(5):
        begin = own.window + at * stride
        found = stream.push(values[:, begin : begin + stride])
        np.testing.assert_allclose(found, whole[:, at - 5], rtol=1e-4, atol=1e-4)
        assert jax.tree.map(jnp.shape, (stream.state, stream.kept)) == shapes
    assert np.std(whole) > 0.1
    with pytest.raises(ValueError, match="rows and a stride"):
        stream.push(values[:, :1])


def test_a_stream_begins_with_what_was_observed(random_model: Any) -> None:
    """What is missing of the past is filled as in windows; a past that cannot be is refused."""
    past = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    past[0, [3, 4, 11]] = past[1, 7] = np.nan
    found = Stream(random_model, past)
    own, gap = map(np.stack, zip(*map(filled, past), strict=True))
    expected = random_model.forecast(jnp.asarray(own), jnp.asarray(gap, jnp.float32))
    np.testing.assert_allclose(found.forecast, expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(found.push(np.zeros((2, 2)))).all()
    assert not np.allclose(Stream(random_model, own).forecast, expected)  # the gaps are read
    with pytest.raises(ValueError, match=r"past: shape \(2, 3\) must be rows and at least 4 steps, a patch"):
        Stream(random_model, past[:, :3])
    with pytest.raises(ValueError, match="past: each row must begin with a number"):
        Stream(random_model, past[:, 3:])


def test_a_forecast_after_a_patch_knows_no_later_one(random_model: Any) -> None:
    past = jnp.asarray(np.random.default_rng(0).normal(size=(1, 24)), jnp.float32)
    scale, gap = window_scale(past), jnp.zeros_like(past)
    found = random_model(past, gap, scale, None, Forward())[0]
    changed = random_model(past.at[:, 14:].add(1.0), gap, scale, None, Forward())[0]
    np.testing.assert_allclose(found[:, :6], changed[:, :6], rtol=1e-5)
    assert np.max(np.abs(found[:, 6] - changed[:, 6])) > 1e-2


def test_gaps_are_read_unless_left_out(random_model: Any) -> None:
    past = jnp.asarray(np.random.default_rng(0).normal(size=(1, 24)), jnp.float32)
    gap = jnp.zeros_like(past).at[:, 9].set(3.0)
    assert not np.array_equal(random_model.forecast(past, gap), random_model.forecast(past, 0 * gap))
    application = SeriesApplication(config(series=dataclasses.replace(SERIES, gaps=False)))
    without = application.model(params_of(application))
    assert np.array_equal(without.forecast(past, gap), without.forecast(past, 0 * gap))
    values, since = filled(np.array([1.0, np.nan, np.nan, 4.0]))
    assert values.tolist() == [1, 1, 1, 4]
    assert since.tolist() == [0, 1, 2, 0]


def test_parts_do_not_leak() -> None:
    """What is held out changes nothing of what is trained on, and what is tested nothing of either."""
    table, own = read_table("waves"), config()
    held_out, test = split_points(len(table.values), own.series)
    assert (held_out, test) == (234, 288)
    parts: tuple[Split, ...] = ("train", "validation")
    for begin, own_parts in ((held_out, parts[:1]), (test, parts)):
        values = table.values.copy()
        values[begin:] = 7 * np.nan_to_num(values[begin:]) + 3
        for part in own_parts:
            changed = windows(Table(table.names, values), own, part).fingerprint()
            assert changed == windows(table, own, part).fingerprint()
    center, scale = scales(table.values, own.series)
    last = windows(table, own, "train").arrays.future[-1]
    np.testing.assert_allclose(
        last, np.nan_to_num((table.values[held_out - 6 : held_out, 1] - center[1]) / scale[1]), rtol=1e-5
    )
    first = windows(table, own, "test").arrays
    expected = filled((table.values[:, 0] - center[0]) / scale[0])[0][test - own.window : test]
    np.testing.assert_allclose(first.past[0], expected, rtol=1e-5)


def test_what_was_not_observed_does_not_count() -> None:
    whole = windows(read_table("waves"), config(), "train").arrays
    gappy = np.flatnonzero((whole.seen == 0).any(axis=1))[:4]
    batch = jax.tree.map(lambda x: x[gappy], whole)
    forecast = np.random.default_rng(0).normal(size=batch.future.shape)
    found = forecast_losses(jnp.asarray(np.where(batch.seen, forecast, 99.0)), batch)
    for row in range(4):
        error = (forecast - batch.future)[row][batch.seen[row] > 0]
        np.testing.assert_allclose(found.metrics["mse_6"][row], np.mean(error**2), rtol=1e-5)
        np.testing.assert_allclose(found.metrics["mae_6"][row], np.mean(np.abs(error)), rtol=1e-5)


def test_no_row_counts_as_perfect_at_any_horizon() -> None:
    """Forecasts that are off by 1 everywhere have an error of 1 over the first steps, too."""
    table = read_table("waves")
    table.values[240:244] = table.values[300:304] = table.values[100:104] = np.nan
    own = config(series=dataclasses.replace(SERIES, horizon=8))  # errors are measured from 2 steps on
    parts: tuple[Split, ...] = ("train", "validation", "test")
    for part in parts:
        batch = windows(table, own, part).arrays
        assert (batch.seen[:, 0] == 0).any()  # all that was observed is used
        for name, errors in forecast_losses(jnp.asarray(batch.future + 1), batch).metrics.items():
            np.testing.assert_allclose(errors, 1, rtol=1e-5, err_msg=name)


def test_the_season_before() -> None:
    past = np.arange(10, dtype=np.float32)[None]
    assert seasonal_naive(past, 5, 3).tolist() == [[7, 8, 9, 7, 8]]
    with pytest.raises(ConfigError, match="a season of 12 steps does not fit in a window of 10"):
        seasonal_naive(past, 5, 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no numbers"),
        ("date,a\n1,2\n1\n", "line 3 has 1 fields and the header 2"),
        ("date,a\n1,x\n", "line 2, 'a': 'x' is no number"),
        ("date,a\n1,inf\n", "has infinite values"),
        ("date\n1\n", "has no numbers"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_series_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_table(str(path))


def test_a_file_is_a_series(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("date,a,b\n1,2,\n2,3,4.5\n")
    table = read_table(str(path))
    assert table.names == ("a", "b")
    np.testing.assert_array_equal(table.values, [[2, np.nan], [3, 4.5]])


def test_an_empty_line_of_one_column_is_missing_and_a_home_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.csv").write_text("a\n1\n\n3\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    np.testing.assert_array_equal(read_table("~/x.csv").values, [[1], [np.nan], [3]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 5}, "series.stride = 5: must be at most series.patch = 4"),
        ({"horizon": 0}, "series.horizon = 0"),
        ({"kind": "linear"}, "series.kind = 'linear'"),
        ({"kind": "dlinear", "gaps": False}, "series.gaps = False: dlinear reads none in any case; leave it out"),
        ({"validation": 0.8, "test": 0.2}, "must leave steps to train on"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SERIES, **changes)


def test_series_without_room_or_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="the part validation of waves, steps 234 to 288, has no room"):
        windows(read_table("waves"), config(series=dataclasses.replace(SERIES, horizon=60)), "validation")
    with pytest.raises(ConfigError, match=r"series.source = 'sunspot': no such series; did you mean sunspots"):
        read_table("sunspot")


@pytest.mark.skipif(importlib.util.find_spec("statsmodels") is None, reason="needs statsmodels")
@pytest.mark.parametrize(
    ("source", "shape", "missing"),
    [("sunspots", (309, 1), 0), ("co2", (2284, 1), 59), ("elnino", (732, 1), 0), ("macrodata", (203, 12), 0)],
)
def test_statsmodels_files(source: str, shape: tuple[int, int], missing: int) -> None:
    table = read_table(source)
    assert table.values.shape == shape
    assert np.isnan(table.values).sum() == missing
    assert len(table.names) == shape[1]
    assert source in SEASONS
