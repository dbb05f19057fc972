"""What a run begins with, and what a tuning run does at every start: its base is read, and is in no checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax import run_folder
from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.models.initial_state import MATRIX, SHIFTS
from rwkv_jax.models.tuned import ADAPTER, INITIAL_STATE, merge_nested
from rwkv_jax.training.functions import TrainFunctions, initial_state
from rwkv_jax.training.partition import split_params
from rwkv_jax.training.run_model import TEACHER
from rwkv_jax.training.state import TrainState
from rwkv_jax.training.teacher import begin_with_teacher, place_teacher
from rwkv_jax.tuning.initial import initial_adapter, with_magnitudes
from rwkv_jax.tuning.pretrained_state import open_first_state
from rwkv_jax.weights.base import place_base
from rwkv_jax.weights.digest import weights_digest
from rwkv_jax.weights.pretrained import initial_params, weights_for
from rwkv_jax.weights.sources import Weights, find_weights


def base_digest(config: TrainConfig) -> str | None:
    """The digest of a tuning run's base; None for other runs. Reads the whole file."""
    return weights_digest(_weights(config).tensors) if config.tuning.is_partial else None


def first_state_digest(config: TrainConfig) -> str | None:
    """The digest of the state that a run tunes on; None without one, or if it cannot be read."""
    if config.tuning.initial_state is None:
        return None
    try:
        return weights_digest(open_first_state(config.tuning.initial_state).tensors)
    except ConfigError:
        return None  # a new run refuses it when it begins; one that goes on has read it long ago


def _weights(config: TrainConfig) -> Weights:
    assert config.initial_weights is not None  # as the config has checked
    return weights_for(find_weights(config.initial_weights), config.model, warn=False)


def described_tuning(config: TrainConfig, trainer: TrainFunctions) -> list[str]:
    """A line that says what a tuning run trains of which base; none for other runs."""
    tuning = config.tuning
    if not tuning.is_partial:
        return []
    trained, _ = split_params(trainer.params, trainer.partition)
    numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(trained))
    parts = [f"{tuning.adapter} of rank {tuning.rank}"] if tuning.adapter else []
    parts += [*tuning.also, *(["state"] if tuning.state else [])]
    stored = f", its matrices in {tuning.quantize}" if tuning.quantize else ""
    lines = [f"trained: {', '.join(parts)}, {numbers / 1e6:.2f}M numbers; frozen: {config.initial_weights}{stored}"]
    rate, harmful = config.optimizer.learning_rate * tuning.state_rate, config.model.spec.harmful_state_rate
    if tuning.state and harmful is not None and rate >= harmful:
        lines.append(
            f"tuning.state: the rate {rate:g} (optimizer.learning_rate x tuning.state_rate) may destroy the "
            f"model: rates from {harmful:g} on have made released models of {config.model.title} worse; 3e-4 has helped"
        )
    return lines


def check_identity(saved_run: Mapping[str, Any], present: dict[str, Any], config: TrainConfig) -> None:
    """Refuses to resume a run with other settings, or on another base unless the config allows it.

    The state that is tuned on may lie elsewhere now; or be another one by now in the same place, since only the first
    step reads it.

    Args:
      saved_run: the content of run.json.

    Raises:
      ConfigError: with a table of the differences.
    """
    saved = saved_run["identity"]
    path, first_state = config.tuning.initial_state, run_folder.FIRST_STATE
    if path is not None and path in (saved.get(first_state), saved_run["config"]["tuning"].get("initial_state")):
        saved = saved | {first_state: present[first_state]}
    if config.tuning.allow_other_base:
        saved = saved | {run_folder.BASE: present.get(run_folder.BASE)}
    run_folder.refuse_difference(saved, present, str(Path(config.run_dir)))


def new_state(config: TrainConfig, trainer: TrainFunctions, tokenizer: Tokenizer) -> TrainState:
    """The state before the first step: random parameters, or the initial weights that the config names."""
    if config.tuning.is_partial:
        return initial_state(trainer, config.seed, first_params(config, trainer, tokenizer))
    if trainer.teacher is not None:
        return initial_state(trainer, config.seed, with_base(config, trainer, _own_params(config, trainer)))
    state = initial_state(trainer, config.seed)
    if config.initial_weights is None:
        return state
    params = initial_params(config.initial_weights, config.model, trainer.state_shardings.params)
    return state._replace(params=params, ema=trainer.first_averages(params))


def _own_params(config: TrainConfig, trainer: TrainFunctions) -> Any:
    """The parameters of the run's own model before the first step of a run that has a teacher."""
    where = {name: x for name, x in trainer.state_shardings.params.items() if name != TEACHER}
    if config.initial_weights is not None:
        return initial_params(config.initial_weights, config.model, where)
    drawn = jax.jit(trainer.draw_params)(jax.random.key(config.seed))
    return begin_with_teacher(config, drawn, where) if config.distillation.copy else jax.device_put(drawn, where)


def first_params(config: TrainConfig, trainer: TrainFunctions, tokenizer: Tokenizer | None = None) -> Any:
    """The parameters of a tuning run before its first step: base, and first values of what it trains.

    Args:
      tokenizer: of `tuning.initial_prompt`, if there is one.

    Raises:
      ConfigError: as `open_first_state`; or that state was trained with another base.
    """
    weights, tuning, model = _weights(config), config.tuning, config.model
    where, kept = trainer.state_shardings.params, dict[str, Any]()
    if ADAPTER in where:
        first = initial_adapter(weights.tensors, tuning, model, config.seed)
        kept[ADAPTER] = jax.tree.map(_placed, first, where[ADAPTER])
    params = with_base(config, trainer, kept, weights)
    if ADAPTER in where:
        params[ADAPTER] = with_magnitudes(kept[ADAPTER], params, tuning, model)
    if INITIAL_STATE in where:
        state = _first_state(config, trainer, params, tokenizer, weights)
        params[INITIAL_STATE] = jax.device_put(state, where[INITIAL_STATE])
    return params


def _first_state(
    config: TrainConfig, trainer: TrainFunctions, params: Any, tokenizer: Tokenizer | None, weights: Weights
) -> Any:
    """The state that is trained on: zeros, that of a file, or the one after a prompt."""
    tuning, shapes = config.tuning, trainer.params[INITIAL_STATE]
    found: dict[str, Any] = {"first_block": {}, "blocks": {}}
    if tuning.initial_state is not None:
        name, given = "tuning.initial_state", open_first_state(tuning.initial_state)
        given.check_base(lambda: weights_digest(weights.tensors), name, allow_other_base=tuning.allow_other_base)
        found = given.arrays(config.model, name)
    elif tuning.initial_prompt is not None:
        assert tokenizer is not None
        ids = [tokenizer.end_of_text, *tokenizer.encode(tuning.initial_prompt)]
        found = _state_after(ids, trainer, params)
    return {
        part: {name: jnp.asarray(found[part].get(name, np.zeros(x.shape)), x.dtype) for name, x in arrays.items()}
        for part, arrays in shapes.items()
    }


def _state_after(ids: list[int], trainer: TrainFunctions, params: Any) -> Any:
    """The state after some tokens, which begin with an empty one."""

    def read(params: Any) -> Any:
        _, state = trainer.run_model.model(params).hidden(jnp.asarray([ids], jnp.int32))
        arrays = {name: getattr(state, name)[:, 0] for name in (MATRIX, *SHIFTS)}
        return {
            "first_block": {name: x[0] for name, x in arrays.items()},
            "blocks": {name: x[1:] for name, x in arrays.items()},
        }

    return jax.jit(read)(params)


def _placed(x: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def with_base(config: TrainConfig, trainer: TrainFunctions, kept: Any, weights: Weights | None = None) -> Any:
    """A run's parameters, of those that its checkpoints hold: with its base and its teacher, if there are any."""
    shardings, params = trainer.state_shardings.params, kept
    if config.tuning.is_partial:
        where = {name: x for name, x in shardings.items() if name not in (ADAPTER, INITIAL_STATE, TEACHER)}
        weights = _weights(config) if weights is None else weights
        params = merge_nested(place_base(weights, config.tuning, config.model, kept, where), kept)
    if (teacher := trainer.teacher) is not None:
        assert config.distillation.teacher is not None
        placed = place_teacher(config.distillation.teacher, teacher.config, teacher.shapes, shardings[TEACHER])
        params = params | {TEACHER: placed}
    return params
