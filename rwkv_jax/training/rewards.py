"""Reward functions: plain callables of (record, reply), found by name, called reply by reply.

A function that raises, or gives what is no finite number, spoils the comparison within its group: the group is skipped
and counted. Replies are text that a model made up: a function that runs them needs a sandbox of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from rwkv_jax.config import ConfigError

RewardFunction = Callable[[Mapping[str, Any], str], Any]
"""(record of the prompt, text of the reply) -> reward: what float() takes, but no text; True is 1."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward function with its weight."""

    name: str
    weight: float
    function: RewardFunction


class Rewarded(NamedTuple):
    """Rewards of replies."""

    values: np.ndarray
    """float64 [R, rewards], NaN where a function failed."""
    totals: np.ndarray
    """float64 [R], weighted sums."""
    usable: np.ndarray
    """bool [R], False for all replies of a group in which a function failed."""
    failures: tuple[str, ...]
    """The first failure of each function that failed."""


def load_rewards(named: Sequence[tuple[str, float]]) -> list[Reward]:
    """The functions of `grpo.rewards`.

    Raises:
      ConfigError: there is no such file, module or function.
    """
    return [Reward(name.rpartition(":")[2], weight, _load(name)) for name, weight in named]


def _load(name: str) -> RewardFunction:
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            found = runpy.run_path(str(Path(place).expanduser())).get(attribute)
        else:
            found = getattr(importlib.import_module(place), attribute, None)
    except Exception as error:  # whatever the file raises when it is run
        raise ConfigError(f"grpo.rewards = {name!r}: cannot be loaded ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ConfigError(f"grpo.rewards = {name!r}: {place} has no function of this name")
    return cast(RewardFunction, found)


def give_rewards(
    rewards: Sequence[Reward], records: Sequence[Mapping[str, Any]], replies: Sequence[str], group_size: int
) -> Rewarded:
    """Calls all functions for all replies, of which consecutive ones are of one prompt."""
    values, failures = np.full((len(replies), len(rewards)), np.nan), dict[str, str]()
    for column, reward in enumerate(rewards):
        for row, (record, reply) in enumerate(zip(records, replies, strict=True)):
            try:
                value: Any = reward.function(record, reply)
                number = math.nan if isinstance(value, str | bytes) else float(value)
                if not math.isfinite(number):
                    raise ValueError(f"gave {value!r}, which is no finite number")
                values[row, column] = number
            except Exception as error:  # users' code raises anything
                failures.setdefault(reward.name, f"{reward.name}: {type(error).__name__}: {error}; reply {reply!r}")
    usable = np.isfinite(values).all(axis=1).reshape(-1, group_size).all(axis=1)
    totals = values @ np.array([reward.weight for reward in rewards])
    return Rewarded(values, totals, np.repeat(usable, group_size), tuple(failures.values()))
