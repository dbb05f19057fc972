"""What an application gives a run: its model, built of RWKV's layers, the losses of its examples, and the examples.

An application is one class, which its config's `load_application` makes. All else is as in any run: steps,
accumulation, meshes, mixed precision, checkpoints, resumption, evaluations and their best step, metrics.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rwkv_jax.checks import require_known
from rwkv_jax.config import ConfigError, Remat, StepConfig
from rwkv_jax.config.application import ApplicationConfig
from rwkv_jax.data.tokenizers import SymbolTokenizer, Tokenizer
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.context import UNSHARDED, MeshAxes
from rwkv_jax.models.language_model import Axes, Part, PartTransform, identity
from rwkv_jax.models.layers import wide_dtype
from rwkv_jax.models.tuned import merge_nested
from rwkv_jax.parallel.sharded_model import ShardedModel
from rwkv_jax.run_folder import load_part, run_config, with_averages
from rwkv_jax.training.examples import Examples
from rwkv_jax.training.run_model import RunModel
from rwkv_jax.training.step import LossSums


def part_of(name: str, transform: PartTransform) -> PartTransform:
    """The transform for the parts of a model that is itself the part `name` of another one."""

    def within(part_name: str, part: Part) -> Part:
        return transform(f"{name}.{part_name}", part)

    return within


class Forward(NamedTuple):
    """How a model runs in a step: with which recomputation, on which shards."""

    remat: Remat = "none"
    axes: MeshAxes = UNSHARDED
    gather_params: PartTransform = identity

    def of_part(self, name: str) -> dict[str, Any]:
        """The options of `LanguageModel.hidden` for a part that is a model."""
        return {"remat": self.remat, "axes": self.axes, "gather_params": part_of(name, self.gather_params)}


class Losses(NamedTuple):
    """What a model makes of a batch."""

    loss: Array
    """[B], to be minimized."""
    metrics: Mapping[str, Array] = {}
    """[B] each, whose means are reported."""


def classification_losses(logits: Array, label: Array) -> Losses:
    """Cross-entropy of each row, and whether its likeliest class is right.

    Args:
      logits: [B, classes]; label: integers [B].
    """
    log_p = jax.nn.log_softmax(logits.astype(wide_dtype(logits.dtype)))
    loss = -jnp.take_along_axis(log_p, label[:, None], axis=1)[:, 0]
    return Losses(loss, {"accuracy": (jnp.argmax(logits, axis=-1) == label).astype(loss.dtype)})


class ApplicationModel(Protocol):
    """An application's model: an `nnx.Module` whose attributes are its parts."""

    def losses(self, batch: Any, forward: Forward, /) -> Losses:
        """Loss and metrics of each row of a batch."""
        ...


class Application(abc.ABC):
    """A system built of RWKV's layers."""

    config: ApplicationConfig

    @property
    def stacks(self) -> Mapping[str, type[LanguageModel]]:
        """The parts of the model that are stacks of layers, by attribute: their class says how a mesh splits them."""
        return {}

    @abc.abstractmethod
    def new_model(self, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> ApplicationModel:
        """The model with initial values.

        Args:
          shard_params: applied to each part as soon as it is drawn; to the parts of stacks as `part_of` says.
        """

    @abc.abstractmethod
    def examples(self, report: Callable[[str], None]) -> tuple[Examples, Examples | None]:
        """What is trained on and what is held out; the same in every process. `report` gets lines to print."""

    def labels(self) -> tuple[str, ...]:
        """Names of what is predicted, for the run folder; such as classes."""
        return ("-",)

    def measure(self, params: Any, examples: Examples, num_examples: int | None) -> Mapping[str, float]:
        """What held-out examples are measured by besides losses and metrics, such as what has to be decoded first.

        Args:
          params: of the run, at an evaluation.
          num_examples: how many of them, the first ones; None is all.
        """
        del params, examples, num_examples
        return {}

    def parameter_axes(self, path: tuple[str, ...]) -> Axes:
        """Logical axes of a parameter (`LanguageModel.parameter_axes`); those in no stack have none, and are whole."""
        return self.stacks[path[0]].parameter_axes(path[1:]) if path[0] in self.stacks else ()

    def parameter_group(self, path: tuple[str, ...], ndim: int) -> tuple[float, bool]:
        """Factor on a parameter's learning rate, and whether it decays (`LanguageModel.parameter_group`)."""
        if path[0] in self.stacks:
            return self.stacks[path[0]].parameter_group(path[1:], ndim)
        return 1.0, path[-1] == "weight" and ndim >= 2

    @functools.cached_property
    def abstract(self) -> tuple[Any, Any]:
        """The model's static part and the shapes of its parameters, as a nested dict; allocates nothing."""
        graphdef, params = nnx.split(nnx.eval_shape(lambda: self.new_model(nnx.Rngs(0))), nnx.Param)
        return graphdef, nnx.to_pure_dict(params)

    def model(self, params: Any) -> Any:
        """The model of some parameters."""
        return nnx.merge(self.abstract[0], params)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The labels, as a run folder keeps a tokenizer."""
        return SymbolTokenizer(self.labels())


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleLoss:
    """Mean loss of an application's examples, each of which counts with its weight."""

    run_model: RunModel
    sharded: ShardedModel
    config: StepConfig
    """Provides `remat`."""

    def count(self, batch: Any) -> Array:
        """The sum of the examples' weights."""
        return jnp.sum(batch.weight)

    def loss_sums(self, params: Any, batch: Any, recurrent_state: Any) -> tuple[LossSums, Any]:
        """Sums over a device's rows; no state is carried."""
        del recurrent_state
        model = cast("ApplicationModel", self.run_model.model(params))
        forward = Forward(self.config.remat, self.sharded.axes, self.sharded.gather_params)
        losses, metrics = model.losses(batch, forward)
        weight = batch.weight
        loss = jnp.sum(weight * losses)
        sums = {name: jnp.sum(weight * values) for name, values in metrics.items()}
        return LossSums(minimized=loss, loss=loss, metrics=sums), None


def application_of(config: Any) -> Application | None:
    """The application of a run; None for a language model's."""
    return config.load_application() if isinstance(config, ApplicationConfig) else None


def load_application(run_dir: str, which: Literal["best", "newest"] = "best") -> tuple[Application, Any]:
    """A trained application and its model, from a run folder; of averages of weights if the run evaluates them.

    Args:
      which: checkpoint.

    Raises:
      ConfigError: the folder is no application's run, or its checkpoint is missing or damaged.
    """
    require_known(which, ("best", "newest"), "which", "checkpoint")
    place = Path(run_dir)
    application = application_of(run_config(place))
    if application is None:
        raise ConfigError(f"{run_dir!r}: is a language model's run; load it with rwkv_jax.from_pretrained")
    shapes, has_averages = application.abstract[1], application.config.evaluation.ema
    found = load_part(
        place, which, lambda config, saved: with_averages(shapes, saved) if has_averages else {"params": shapes}
    )
    params = merge_nested(found.get("params", {}), found.get("ema", {}))
    return application, application.model(jax.tree.map(jnp.asarray, params))
