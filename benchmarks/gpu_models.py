"""Models on a GPU: a training step of 0.1B and decoding of 1.5B by each implementation; parts of `wkv_gpu.py`."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import rwkv_kernels
from gpu_items import Item, Record, skipping
from gpu_operators import Settings
from rwkv_jax.autotune import DECODED_TOKENS
from rwkv_jax.bench.measure import throughput
from rwkv_jax.bench.random_model import NumberTokenizer, random_model
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.decoding import unstacked, with_implementation
from rwkv_jax.recipes import official_run
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.functions import abstract_batch, abstract_state, initial_state, make_train_functions
from rwkv_kernels import autotune

ROWS = 30
"""Of a device that trains 0.1B: an eighth of the recipe's."""

_LOCK = threading.Lock()  # of what several programs share, and is made once

_SMALL: dict[str, Any] = {"vocab_size": 64, "num_layers": 2, "width": 32, "head_dim": 16}


def _refusals(operator: str, settings: Settings) -> dict[str, str | None]:
    """Why an implementation cannot run, or None: of the kernels, and of `chunked` and `xla` beside them."""
    size = 64 if settings.on_gpu else 16
    refusals = rwkv_kernels.explain(operator, (1, 64, 2, size, size)).refusals
    return {name: x for name, x in refusals.items() if name in ("chunked", "xla") or name.startswith("pallas")}


# Training


def training(settings: Settings) -> list[Item]:
    """A step by each implementation of the operator; by the split kernels with those of the output as well."""
    refusals = _refusals("wkv7", settings)
    ways: list[dict[str, str]] = [{"wkv_implementation": name} for name in refusals]
    ways.append({"wkv_implementation": "pallas_triton_split", "output_implementation": "pallas_triton"})
    items = []
    for named in ways:
        title = f"0.1B {', '.join(named.values())}"
        if refusal := refusals[named["wkv_implementation"]]:
            items.append(skipping("training", title, refusal))
        else:
            items.append(Item("training", title, functools.partial(_prepare_step, settings, named)))
    return items


def _config(settings: Settings, **named: str) -> TrainConfig:
    config = official_run("rwkv7_0_1b", fsdp=1)
    sizes: dict[str, Any] = {"batch_size": ROWS, "num_steps": 1000}
    model = config.model
    if not settings.on_gpu:
        sizes |= {"batch_size": 2, "sequence_length": 32, "loss_chunk": 16}
        model = ModelConfig("7", dtype="bfloat16", **_SMALL)
    training = dataclasses.replace(config.training, **sizes)
    return dataclasses.replace(config, model=dataclasses.replace(model, **named), training=training)


def _prepare_step(settings: Settings, named: dict[str, str]) -> Callable[[], Record]:
    config = _config(settings, **named)
    functions = make_train_functions(config)
    shapes = abstract_batch(functions, config)
    step = jax.jit(functions.train_step, donate_argnums=0).lower(abstract_state(functions), shapes).compile()
    with _LOCK:
        first = _first_state(settings)

    def run() -> Record:
        state = jax.device_put(first, functions.state_shardings)
        training = config.training
        rows = np.random.default_rng(0).integers(
            1, config.model.vocab_size, (training.batch_size, training.sequence_length + 1), np.int32
        )
        batch = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), make_batch(rows, end_of_text=None), shapes
        )
        seconds, loss = [], 0.0
        for _ in range(settings.repetitions + 1):
            started = time.perf_counter()
            state, metrics = step(state, batch)
            loss = float(metrics.loss)
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds[1:])
        tokens = training.batch_size * training.sequence_length / median
        return {"step_ms": 1e3 * median, "tokens_a_second": tokens, "loss": loss}

    return run


@functools.cache
def _first_state(settings: Settings) -> Any:
    """On the host, for all implementations: a step donates its state."""
    return jax.device_get(initial_state(make_train_functions(_config(settings)), 0))


# Decoding


def decoding(settings: Settings) -> list[Item]:
    """`wkv7_step` by each of its implementations, and engines with one and many texts at once, with each of them."""
    rows = (1, 64) if settings.on_gpu else (1, 2)
    refusals = _refusals("wkv7_step", settings)
    ways: dict[str | None, str | None] = {None: None} | {x: y for x, y in refusals.items() if x != "xla"}
    items = [Item("decoding", f"wkv7_step, {count} rows", functools.partial(_prepare_tuning, count)) for count in rows]
    for count in rows:
        for name, refusal in ways.items():
            title = f"1.5B, {count} texts, step_implementation {name}"
            if refusal:
                items.append(skipping("decoding", title, refusal))
            else:
                items.append(Item("decoding", title, functools.partial(_prepare_engine, settings, count, name)))
    return items


def _prepare_tuning(rows: int) -> Callable[[], Record]:
    """A layer's heads alone, token by token."""
    workload = autotune.workload_here("wkv7_step", (rows, DECODED_TOKENS, 32, 64, 64), "bfloat16", gradients=False)

    def run() -> Record:
        trials = autotune.tune(workload).trials
        return {
            trial.name: trial.failure if trial.seconds is None else 1e6 * trial.seconds / DECODED_TOKENS
            for trial in trials
        } | {"unit": "us a token"}

    return run


def _prepare_engine(settings: Settings, texts: int, step: str | None) -> Callable[[], Record]:
    with _LOCK:
        model = _model(settings)
    options = EngineOptions(num_slots=texts, batch_sizes=(texts,), prefix_bytes=0, tune="never")
    named = model if step is None else with_implementation(model, step=step)
    engine = Engine(named, NumberTokenizer(model.config.vocab_size), options)
    throughput({texts: engine}, num_tokens=1, repetitions=1)

    def run() -> Record:
        timing = throughput({texts: engine}, num_tokens=256 if settings.on_gpu else 8, repetitions=3)[texts]
        return {"tokens_a_second": texts / timing.median, "ms_a_token": 1e3 * timing.median}

    return run


@functools.cache
def _model(settings: Settings) -> LanguageModel:
    """Random weights of 1.5B."""
    sizes: dict[str, Any] = {"vocab_size": 65536, "num_layers": 24, "width": 2048} if settings.on_gpu else _SMALL
    return unstacked(random_model(ModelConfig("7", dtype="bfloat16", **sizes)))
