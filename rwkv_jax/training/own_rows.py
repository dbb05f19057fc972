"""Runs whose batches are not rows of text: preferences and rewards."""

from __future__ import annotations

from collections.abc import Callable

from rwkv_jax.config import PREFERENCES, TrainConfig
from rwkv_jax.data.preference.pairs import PairCorpus, prepare_pairs
from rwkv_jax.data.preference.prompts import PromptCorpus, prepare_prompts
from rwkv_jax.parallel.processes import Processes
from rwkv_jax.training.functions import TrainFunctions
from rwkv_jax.training.preferences import PreferenceRows
from rwkv_jax.training.rollouts import RolloutRows, rollout_rows

OwnCorpus = PairCorpus | PromptCorpus
OwnRows = PreferenceRows | RolloutRows
"""Rows that make a step's batch themselves, with `load(step, params)`."""


def open_own_rows(
    config: TrainConfig, functions: TrainFunctions, processes: Processes, report: Callable[[str], None]
) -> tuple[OwnCorpus, OwnRows]:
    """The data of a run on preferences or rewards.

    Raises:
      ConfigError: as `prepare_pairs`, `prepare_prompts` and `rollout_rows`.
    """
    if config.training.objective in PREFERENCES:
        pairs = prepare_pairs(config, report)
        return pairs, PreferenceRows(pairs, config, functions)
    prompts = prepare_prompts(config, report)
    return prompts, rollout_rows(prompts, config, functions, processes, report)
