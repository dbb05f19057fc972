"""Series, split by time, and windows of them as examples."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.applications.series.config import Series, SeriesConfig
from rwkv_jax.checks import require_known
from rwkv_jax.config import ConfigError
from rwkv_jax.training.examples import Examples

Split = Literal["train", "validation", "test"]

DATES = ("YEAR", "year", "quarter", "date")
"""Columns of the data sets that say when."""
DATA_SETS = ("sunspots", "co2", "elnino", "macrodata")
SEASONS = {"sunspots": 11, "co2": 52, "elnino": 12, "macrodata": 4, "waves": 12}
"""Steps of a season; the sun's is about 11 years."""


class Batch(NamedTuple):
    """Windows of single channels, in deviations of the channel's training part."""

    past: Any
    """[n, window], where nothing was observed the value before."""
    gap: Any
    """[n, window], steps since the last observation; 0 where there is one."""
    future: Any
    """[n, horizon], 0 where nothing was observed."""
    seen: Any
    """[n, horizon], 1 where something was."""
    weight: Any


@dataclasses.dataclass(frozen=True)
class Table:
    """Channels side by side."""

    names: tuple[str, ...]
    values: NDArray[np.float64]
    """[steps, channels]; NaN where nothing was observed."""


def read_table(source: str) -> Table:
    """A series by its name in `Series.source`, or from a file.

    Raises:
      ConfigError: there is none, its package is missing, or a file has no numbers.
    """
    if source == "waves":
        return _waves()
    if source in DATA_SETS:
        # The files alone: importing the package would take seconds, and pandas.
        found = importlib.util.find_spec("statsmodels")
        if found is None or not found.submodule_search_locations:
            raise ConfigError(
                f"series.source = {source!r}: is a data set of statsmodels, which is not installed; "
                "pip install 'rwkv-jax[apps]'"
            )
        table = _read_csv(Path(found.submodule_search_locations[0], "datasets", source, f"{source}.csv"), source)
        if source == "elnino":  # a row for each year
            return Table(("temperature",), table.values.reshape(-1, 1))
        return table
    if not source.endswith(".csv"):
        require_known(source, (*DATA_SETS, "waves", "PATH.csv"), "series.source", "series")
    return _read_csv(Path(source), source)


def _read_csv(path: Path, source: str) -> Table:
    where = f"series.source = {source!r}"
    try:
        with path.expanduser().open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{where}: cannot be read ({error}); take a .csv file with a header") from error
    kept = [column for column, name in enumerate(header) if name.strip() not in DATES]
    values = np.full((len(rows), len(kept)), np.nan)
    for line, found in enumerate(rows):
        row = found or [""] if len(header) == 1 else found  # an empty line is an empty field
        if len(row) != len(header):
            raise ConfigError(f"{where}: line {line + 2} has {len(row)} fields and the header {len(header)}")
        for at, column in enumerate(kept):
            text = row[column].strip()
            try:
                values[line, at] = float(text) if text else np.nan
            except ValueError as error:
                raise ConfigError(
                    f"{where}: line {line + 2}, {header[column]!r}: {text!r} is no number; leave it empty if it is "
                    f"missing; columns that say when are called {', '.join(DATES)}"
                ) from error
    if not kept or not rows:
        raise ConfigError(f"{where}: has no numbers; take a .csv file with a header and a column for each channel")
    if np.isinf(values).any():
        raise ConfigError(f"{where}: has infinite values; leave them empty if they are missing")
    return Table(tuple(header[column].strip() for column in kept), values)


def _waves() -> Table:
    """Two waves with noise, of which a tenth is missing."""
    draws = np.random.default_rng(0)
    steps = np.arange(360)[:, None] + np.array([0, 5])
    values = np.sin(2 * np.pi * steps / 12) + 0.5 * np.sin(2 * np.pi * steps / 31) + 0.1 * draws.normal(size=(360, 2))
    return Table(("first", "second"), np.where(draws.random((360, 2)) < 0.1, np.nan, values))


def split_points(steps: int, series: Series) -> tuple[int, int]:
    """Where what is held out begins, and where what is tested."""
    test = steps - round(series.test * steps)
    return test - round(series.validation * steps), test


def scales(values: NDArray[np.float64], series: Series) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation of each channel [C] over what is trained on."""
    part = values[: split_points(len(values), series)[0]]
    return np.nanmean(part, axis=0), np.maximum(np.nanstd(part, axis=0), 1e-8)


def filled(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A channel [steps] with the last observation in place of what is missing, and the steps since that."""
    steps = np.arange(len(values))
    last = np.maximum.accumulate(np.where(np.isnan(values), -1, steps))
    return values[np.maximum(last, 0)], (steps - last).astype(float)


def windows(table: Table, config: SeriesConfig, split: Split) -> Examples:
    """All windows whose forecast lies in a part of the steps; their past may begin before it.

    Something was observed within the first steps of each forecast that errors are measured over: without, there is no
    error of these, and it would count as none.

    Raises:
      ConfigError: the part has no room for one.
    """
    series, values = config.series, table.values
    if np.isnan(values[: split_points(len(values), series)[0]]).all(axis=0).any():
        raise ConfigError(f"series.source = {series.source!r}: a channel has no values before series.validation")
    center, scale = scales(values, series)
    held_out, test = split_points(len(values), series)
    begin, end = {"train": (0, held_out), "validation": (held_out, test), "test": (test, len(values))}[split]
    shortest = min((*horizons_of(series.horizon), series.horizon))
    rows: list[Sequence[Any]] = []
    for channel in ((values - center) / scale).T:
        past, gap = filled(channel)
        first = int(np.flatnonzero(~np.isnan(channel))[0])
        for at in range(max(begin, first + config.window), end - series.horizon + 1):
            future = channel[at : at + series.horizon]
            if not np.isnan(future[:shortest]).all():
                own = slice(at - config.window, at)
                rows.append((past[own], gap[own], np.nan_to_num(future), ~np.isnan(future), 1.0))
    if not rows:
        raise ConfigError(
            f"series.horizon = {series.horizon}: the part {split} of {series.source}, steps {begin} to {end}, has no "
            f"room for it after a window of {config.window}, or nothing observed in the first steps after any; take "
            "fewer steps, or less training.sequence_length"
        )
    arrays = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    return Examples(Batch(*arrays), name="window")


def seasonal_naive(past: NDArray[np.float32], horizon: int, season: int) -> NDArray[np.float32]:
    """The season before, [n, window] -> [n, horizon]."""
    if past.shape[1] < season:
        raise ConfigError(f"a season of {season} steps does not fit in a window of {past.shape[1]}")
    return past[:, past.shape[1] - season + np.arange(horizon) % season]


def horizons_of(horizon: int) -> tuple[int, ...]:
    """Where errors are measured besides the whole horizon: after a quarter and a half of it."""
    return tuple(sorted({max(1, horizon // 4), max(1, horizon // 2)} - {horizon}))
