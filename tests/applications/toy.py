"""The smallest application: which of two symbols a row has more of, by a bidirectional model with one head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from typing_extensions import override

from rwkv_jax.config import (
    APPLICATIONS,
    ApplicationConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
)
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.bidirectional import bidirectional_type, mean_over_rows
from rwkv_jax.models.language_model import PartTransform, identity
from rwkv_jax.models.layers import BiasedLinear
from rwkv_jax.training.application import Application, Forward, Losses, classification_losses, part_of
from rwkv_jax.training.examples import Examples

APPLICATIONS["majority"] = "tests.applications.toy:MajorityConfig"

LENGTH = 9


@dataclasses.dataclass(frozen=True)
class Majority:
    """The application's own settings."""

    num_examples: int = 64
    """Examples to train on."""


@dataclasses.dataclass(frozen=True)
class MajorityConfig(ApplicationConfig):
    """Which of two symbols a row has more of."""

    application = "majority"
    section = "majority"

    majority: Majority = dataclasses.field(default_factory=Majority)

    @override
    def load_application(self) -> Application:
        return MajorityApplication(self)


class Batch(NamedTuple):
    """Rows of symbols, with the symbol that is more frequent."""

    tokens: Any
    label: Any
    weight: Any


class MajorityModel(nnx.Module):
    """Mean over a bidirectional encoder's output, and a head."""

    def __init__(self, config: MajorityConfig, rngs: nnx.Rngs, shard_params: PartTransform) -> None:
        model = config.model
        self.encoder = bidirectional_type(model)(
            model, rngs=rngs, shard_params=part_of("encoder", shard_params), has_head=False
        )
        self.classes = shard_params("classes", BiasedLinear(jnp.zeros((2, model.width), model.parameter_dtype)))

    def losses(self, batch: Batch, forward: Forward) -> Losses:
        """Cross-entropy and accuracy of each row."""
        hidden, _ = self.encoder.hidden(batch.tokens, **forward.of_part("encoder"))
        logits = forward.gather_params("classes", self.classes)(mean_over_rows(hidden, None))
        return classification_losses(logits, batch.label)


class MajorityApplication(Application):
    """Model and examples."""

    def __init__(self, config: MajorityConfig) -> None:
        self.config: MajorityConfig = config

    @property
    @override
    def stacks(self) -> Mapping[str, type[LanguageModel]]:
        return {"encoder": bidirectional_type(self.config.model)}

    @override
    def new_model(self, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> MajorityModel:
        return MajorityModel(self.config, rngs, shard_params)

    @override
    def labels(self) -> tuple[str, ...]:
        return ("one", "two")

    @override
    def examples(self, report: Callable[[str], None]) -> tuple[Examples, Examples]:
        def drawn(seed: int, count: int) -> Examples:
            tokens = np.random.default_rng(seed).integers(1, 3, (count, LENGTH)).astype(np.int32)
            label = (np.sum(tokens == 2, axis=1) > LENGTH // 2).astype(np.int32)
            return Examples(Batch(tokens, label, np.ones(count, np.float32)), name="row")

        return drawn(1, self.config.majority.num_examples), drawn(2, 21)


def config(run_dir: str, **changes: Any) -> MajorityConfig:
    """A run of a few seconds."""
    options: dict[str, Any] = {
        "run_dir": run_dir,
        "model": ModelConfig(vocab_size=8, num_layers=2, width=32, head_dim=8),
        "training": StepConfig(batch_size=16, sequence_length=LENGTH, num_steps=6),
        "optimizer": OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-3, warmup_steps=2),
        "evaluation": EvaluationConfig(every=3, batches=1, sample_prompts=()),
        "checkpoint": CheckpointConfig(every=3),
        "logging": LoggingConfig(every=1),
    }
    return MajorityConfig(**options | changes)


def params_of(application: Application, seed: int = 0) -> Any:
    """Parameters with no zeros in them."""
    _, shapes = application.abstract
    leaves, structure = jax.tree.flatten(shapes)
    draws = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(0.2 * draws.normal(size=x.shape) + 0.3, x.dtype) for x in leaves])
