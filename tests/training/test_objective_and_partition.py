"""What else can be trained without another step: an objective, a partition, parameters and batches of this file's own.

The objective is one of preferences, in which each step calls two models twice: the policy, a frozen model with a small
trained adapter and a trained head, and a frozen reference. As a program this file prints how a mesh of eight fake
devices differs from one device.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from rwkv_jax.config import ConfigError, ModelConfig, OptimizerConfig, StepConfig, TrainConfig
from rwkv_jax.parallel.mesh import MeshShape, mesh_from_shape
from rwkv_jax.parallel.rules import shardings
from rwkv_jax.parallel.sharded_model import ShardedModel
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.checkpoints import Checkpoints
from rwkv_jax.training.functions import TrainFunctions, abstract_state, initial_state, make_train_functions
from rwkv_jax.training.loss import token_losses
from rwkv_jax.training.partition import merge_params, split_params
from rwkv_jax.training.run_model import RunModel
from rwkv_jax.training.state import TrainState
from rwkv_jax.training.step import LossSums, loss_and_gradients
from tests.fake_devices import run_on_fake_devices
from tests.golden import QUICK, relative_error
from tests.small_runs import assert_same_bits
from tests.training.saved import restore

PAIRS, TIME = 8, 6
CONFIG = TrainConfig(
    model=ModelConfig("4", vocab_size=32, num_layers=2, width=16, ffn_width=32, wkv_implementation="scan"),
    optimizer=OptimizerConfig(warmup_steps=0),
    training=StepConfig(num_steps=4, batch_size=PAIRS, sequence_length=TIME, accumulation_steps=2),
)
FLOAT64 = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype="float64"))


class PairBatch(NamedTuple):
    """Texts of which one is preferred: int32 [B, T + 1] twice, and what each pair counts for, [B]."""

    chosen: Any
    rejected: Any
    weight: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Preference:
    """Direct preference optimization (arXiv 2305.18290) of a model with an adapter."""

    run_model: RunModel
    sharded: ShardedModel
    config: StepConfig

    def count(self, batch: PairBatch) -> Array:
        return jnp.sum(batch.weight)

    def loss_sums(self, params: Any, batch: PairBatch, recurrent_state: Any) -> tuple[LossSums, Any]:
        base = {name: part for name, part in params.items() if name not in ("adapter", "reference")}
        scale = params["adapter"]["scale"]

        def advantage(text: Array) -> Array:
            return self.log_p(base, text, 1 + scale) - self.log_p(params["reference"], text, jnp.ones_like(scale))

        margin = advantage(batch.chosen) - advantage(batch.rejected)
        loss = jnp.sum(-jax.nn.log_sigmoid(margin) * batch.weight)
        return LossSums(minimized=loss, loss=loss, metrics={"margin": jnp.sum(margin * batch.weight)}), None

    def log_p(self, params: Any, text: Array, scale: Array) -> Array:
        """log p [B] of texts [B, T + 1]."""
        model = self.run_model.model(params)
        hidden, _ = model.hidden(text[:, :-1], axes=self.sharded.axes, gather_params=self.sharded.gather_params)
        model.head = self.sharded.gather_params("head", model.head)
        logits = model.logits((hidden * scale).reshape(-1, hidden.shape[-1]))
        nll, _ = token_losses(logits, text[:, 1:].reshape(-1), self.sharded.axes.tensor)
        return -jnp.sum(nll.reshape(hidden.shape[:2]), axis=1)


def is_trained(path: tuple[str, ...]) -> bool:
    return path[0] in ("adapter", "head") or path == ("blocks", "ffn", "value", "weight")


def preference_functions(config: TrainConfig = CONFIG, mesh: Mesh | None = None) -> TrainFunctions:
    """The functions of a model, with parameters beside it and another optimizer."""
    own = make_train_functions(config, mesh, objective=Preference, partition=is_trained)
    scale = jax.ShapeDtypeStruct((CONFIG.model.width,), own.params["head"]["weight"].dtype)
    sharded = own.sharded
    if mesh is not None:
        specs = sharded.param_specs
        sharded = dataclasses.replace(
            sharded, param_specs=specs | {"adapter": {"scale": PartitionSpec()}, "reference": specs}
        )

    def draw_params(key: Array) -> Any:
        params = own.draw_params(key)
        return params | {"adapter": {"scale": jnp.zeros(scale.shape, scale.dtype)}, "reference": params}

    return dataclasses.replace(
        own,
        sharded=sharded,
        params=own.params | {"adapter": {"scale": scale}, "reference": own.params},
        draw_params=draw_params,
        optimizer=optax.adam(1e-2),
    )


def batch_of(step: int, functions: TrainFunctions) -> PairBatch:
    draws = np.random.default_rng(step)
    texts = draws.integers(0, CONFIG.model.vocab_size, (2, PAIRS, TIME + 1)).astype(np.int32)
    batch = PairBatch(texts[0], texts[1], draws.uniform(0.5, 1.5, PAIRS))
    if functions.sharded.mesh is None:
        return batch
    return jax.device_put(batch, shardings(functions.sharded.mesh, functions.sharded.batch_specs(batch)))


def train(functions: TrainFunctions, state: TrainState, steps: range) -> tuple[TrainState, list[Any]]:
    step, metrics = jax.jit(functions.train_step, compiler_options=QUICK), []
    for number in steps:
        state, reported = step(state, batch_of(number, functions))
        metrics.append(reported)
    return state, metrics


def num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Trained(NamedTuple):
    functions: TrainFunctions
    first: TrainState
    last: TrainState
    metrics: list[Any]


@pytest.fixture(scope="module")
def trained() -> Trained:
    functions = preference_functions()
    first = initial_state(functions, 0)
    return Trained(functions, first, *train(functions, first, range(4)))


def test_frozen_parameters_keep_their_bits_and_all_others_move(trained: Trained) -> None:
    moved, frozen = split_params(trained.last.params, is_trained)
    before, untouched = split_params(trained.first.params, is_trained)
    assert moved.keys() == {"adapter", "head", "blocks"}
    assert frozen.keys() == {"emb", "first_block", "blocks", "ln_out", "reference"}
    assert_same_bits(frozen, untouched)
    for after, start in zip(jax.tree.leaves(moved), jax.tree.leaves(before), strict=True):
        assert np.any(np.asarray(after) != np.asarray(start))
    assert_same_bits(merge_params(moved, frozen), trained.last.params)


def test_the_optimizer_has_no_state_of_frozen_parameters(trained: Trained) -> None:
    weights = num_bytes(split_params(trained.first.params, is_trained)[0])
    counter = 4
    assert num_bytes(trained.last.opt_state) == 2 * weights + counter
    # And the one that a config asks for has none either.
    abstract = make_train_functions(CONFIG, partition=lambda path: path[0] == "head")
    assert num_bytes(abstract_state(abstract).opt_state) == 2 * num_bytes(abstract.params["head"]) + 2 * counter


def test_what_the_objective_reports_are_means_over_its_count(trained: Trained) -> None:
    """At first the policy is the reference, and each pair loses log 2; micro-batches make no difference."""
    first = trained.metrics[0]
    np.testing.assert_allclose(first.loss, np.log(2), rtol=1e-6)
    assert abs(float(first.metrics["margin"])) < 1e-6
    assert all(bool(metrics.taken) for metrics in trained.metrics)
    assert abs(float(trained.metrics[-1].metrics["margin"])) > 1e-3
    whole = dataclasses.replace(trained.functions, accumulation_steps=1)
    last, metrics = train(whole, trained.first, range(2))
    evaluated = jax.jit(whole.eval_step, compiler_options=QUICK)(last.params, batch_of(2, whole))
    for ours, theirs in zip(metrics, trained.metrics, strict=False):
        assert relative_error(ours.loss, theirs.loss) < 1e-5
        assert relative_error(ours.gradient_norm, theirs.gradient_norm) < 1e-5
    assert relative_error(evaluated.loss / evaluated.count, trained.metrics[2].loss) < 1e-5


def test_a_run_goes_on_from_a_checkpoint_bit_by_bit(trained: Trained, tmp_path: Path) -> None:
    half, _ = train(trained.functions, trained.first, range(2))
    restored = saved_and_restored(half, trained.functions, tmp_path)
    assert_same_bits(restored, half)
    last, _ = train(trained.functions, restored, range(2, 4))
    assert_same_bits(last, trained.last)


def saved_and_restored(state: TrainState, functions: TrainFunctions, folder: Path) -> TrainState:
    with Checkpoints(folder, 1, pytest.fail) as checkpoints:
        checkpoints.save(state, int(state.step))
        checkpoints.wait()
        restored = restore(checkpoints, abstract_state(functions))
    assert restored is not None
    return restored


@pytest.mark.long  # as an application's does, tests/applications
def test_a_mesh_trains_what_one_device_trains() -> None:
    found = run_on_fake_devices(8, "tests.training.test_objective_and_partition")
    assert found["frozen is untouched"]
    assert found["restored bit by bit"]
    assert found["loss"] < 1e-12
    assert found["parameters"] < 1e-9  # Adam's first steps have the size of the rate, however small a gradient
    assert found["optimizer bytes of a device"] <= 0.3 * found["optimizer bytes"]


def test_gradients_of_a_part_are_that_part_of_all_gradients(float64: None) -> None:
    functions = make_train_functions(FLOAT64)
    params = jax.jit(functions.draw_params, compiler_options=QUICK)(jax.random.key(0))
    batch = make_batch(batch_of(0, functions).chosen, end_of_text=0)

    def gradients(trained: Any, frozen: Any) -> Any:
        return loss_and_gradients(trained, frozen, batch, None, functions.objective, functions.sharded)[:2]

    some, rest = split_params(params, lambda path: "att" in path)
    run = jax.jit(gradients, compiler_options=QUICK)
    (loss, part), (whole_loss, whole) = run(some, rest), run(params, {})
    assert relative_error(loss[0], whole_loss[0]) < 1e-14
    expected, _ = split_params(whole, lambda path: "att" in path)
    assert jax.tree.structure(part) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(part), jax.tree.leaves(expected), strict=True):
        assert relative_error(ours, theirs) < 1e-12


def test_a_partition_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^partition = .*trains none of the model's \d+ arrays"):
        make_train_functions(CONFIG, partition=lambda path: path[0] == "heads")


def main() -> None:
    jax.config.update("jax_enable_x64", True)  # for Orbax's threads too

    def of_a_device(tree: Any) -> int:
        return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    one = preference_functions(FLOAT64)
    expected, expected_metrics = train(one, initial_state(one, 0), range(3))
    mesh = mesh_from_shape(MeshShape(data=2, fsdp=2, tensor=2), jax.devices())
    functions = preference_functions(FLOAT64, mesh)
    first = initial_state(functions, 0)
    last, metrics = train(functions, first, range(3))
    with tempfile.TemporaryDirectory() as folder:
        restored = saved_and_restored(last, functions, Path(folder))

    def equal(left: Any, right: Any) -> bool:
        return all(map(np.array_equal, jax.tree.leaves(left), jax.tree.leaves(right)))

    pairs = zip(*map(jax.tree.leaves, (last.params, expected.params)), strict=True)
    found = {
        "frozen is untouched": equal(*(split_params(state.params, is_trained)[1] for state in (last, first))),
        "restored bit by bit": equal(restored, last),
        "loss": max(relative_error(a.loss, b.loss) for a, b in zip(metrics, expected_metrics, strict=True)),
        "parameters": max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs),
        "optimizer bytes": num_bytes(last.opt_state),
        "optimizer bytes of a device": of_a_device(last.opt_state),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
