"""Many short runs in memory: the trainer's step, compiled once for all learning rates and lengths of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.fine_tuning_methods.text import Asked
from rwkv_jax.chat.formats import RAVEN
from rwkv_jax.config import DataConfig, ModelConfig, OptimizerConfig, StepConfig, TrainConfig, TuningConfig
from rwkv_jax.data.chat.records import read_conversation
from rwkv_jax.data.chat.rows import PackedRows, packed_rows
from rwkv_jax.data.chat.samples import Samples, make_sample, pieces_of
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.functions import initial_state, make_train_functions
from rwkv_jax.training.schedule import learning_rate_schedule
from rwkv_jax.training.state import TrainState
from rwkv_jax.training.step import StepMetrics
from rwkv_jax.training.tuned import first_params


def rows_of(records: Sequence[Asked], tokenizer: Tokenizer, batch_size: int, length: int) -> PackedRows:
    """Prompts with their replies, one a row; the replies count."""
    fields = [{"prompt": record.prompt, "completion": record.reply} for record in records]
    samples = [
        make_sample(pieces_of(read_conversation(each, "completion"), RAVEN, "assistant"), tokenizer, "assistant")
        for each in fields
    ]
    places = [str(number) for number in range(len(samples))]
    return packed_rows(
        Samples.of(samples, places),
        apart=True,
        seed=0,
        batch_size=batch_size,
        sequence_length=length,
        end_of_text=tokenizer.end_of_text,
    )


def with_rate(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer whose state has the factor on its updates, so that another one compiles nothing."""

    def init(params: Any) -> Any:
        return optimizer.init(params), jnp.ones(())

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        inner, rate = state
        updates, inner = optimizer.update(updates, inner, params)
        return jax.tree.map(lambda x: rate * x, updates), (inner, rate)

    return optax.GradientTransformation(init, update)


class Trained(NamedTuple):
    """What a run left."""

    params: Any
    losses: list[float]
    """Of every step, in nats a token that counts."""


class Learner:
    """A method's step."""

    def __init__(self, model: ModelConfig, tuning: TuningConfig, rows: PackedRows, base: str | None) -> None:
        """Args: `base`, the file of weights that is tuned; None without one."""
        self.model = model
        self._config = TrainConfig(
            model=model,
            tuning=tuning,
            initial_weights=base,
            data=DataConfig(tokenizer="bytes"),
            optimizer=OptimizerConfig(
                learning_rate=1.0, final_learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0
            ),
            training=StepConfig(
                batch_size=rows.batch_size, sequence_length=rows.sequence_length, reset_at_documents=False
            ),
        )
        made = make_train_functions(self._config)
        functions = dataclasses.replace(made, optimizer=with_rate(made.optimizer))

        def step(state: TrainState, batch: Any, rate: jax.Array) -> tuple[TrainState, StepMetrics]:
            state = state._replace(opt_state=(state.opt_state[0], rate))
            return functions.train_step(state, batch)

        self.functions, self._step = functions, jax.jit(step)

    def first_params(self) -> Any:
        """Base and first values of what a method adds."""
        return first_params(self._config, self.functions)

    def run(self, params: Any, rows: PackedRows, num_steps: int, rate: float) -> Trained:
        """Steps with a warm-up and a cosine to a tenth of the rate; None draws the first parameters."""
        schedule = OptimizerConfig(
            learning_rate=rate, final_learning_rate=rate / 10, warmup_steps=min(20, num_steps // 10)
        )
        rates = np.asarray(learning_rate_schedule(schedule, num_steps)(jnp.arange(num_steps)), np.float32)
        state, losses = initial_state(self.functions, 0, params), []
        for number in range(num_steps):
            read = rows.read(number)
            batch = make_batch(read.tokens, end_of_text=None, mask=read.mask, targets=read.targets)
            state, metrics = self._step(state, batch, rates[number])
            losses.append(metrics.loss)
        return Trained(state.params, [float(loss) for loss in losses])
