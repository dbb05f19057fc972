"""Runs whose batches are not rows of text: preferences, rewards and applications."""

from __future__ import annotations

from collections.abc import Callable

from rwkv_jax.config import PREFERENCES, TrainConfig
from rwkv_jax.data.preference.pairs import PairCorpus, prepare_pairs
from rwkv_jax.data.preference.prompts import PromptCorpus, prepare_prompts
from rwkv_jax.parallel.processes import Processes
from rwkv_jax.training.application import Application
from rwkv_jax.training.examples import ApplicationCorpus, ExampleRows
from rwkv_jax.training.functions import TrainFunctions
from rwkv_jax.training.preferences import PreferenceRows
from rwkv_jax.training.rollouts import RolloutRows, rollout_rows

OwnCorpus = PairCorpus | PromptCorpus | ApplicationCorpus
OwnRows = PreferenceRows | RolloutRows | ExampleRows
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


def open_examples(
    application: Application, functions: TrainFunctions, report: Callable[[str], None]
) -> tuple[ApplicationCorpus, ExampleRows]:
    """The data of an application's run.

    Raises:
      ConfigError: as the application's `examples`.
    """
    training, held_out = application.examples(report)
    prints = [training.fingerprint(), *([] if held_out is None else [held_out.fingerprint()])]
    corpus = ApplicationCorpus(application.tokenizer, "-".join(prints))
    counted = f"{len(training):,} {training.name}s to train on"
    if held_out is not None:
        counted += f", {len(held_out):,} held out"
    report(f"{application.config.application}: {counted}; fingerprint {corpus.fingerprint}")
    return corpus, ExampleRows(application, training, held_out, functions)
