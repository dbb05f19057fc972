"""A generation that lives in this file alone goes through everything that the others do; docs/extending.md tells how.

Its time mixing keeps a moving average of each channel, h_t = w h_{t-1} + (1 - w) v_t, behind a low-rank gate: no
operator of rwkv_kernels, no heads, and a recurrent state of one number a channel.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.cli import doctor
from rwkv_jax.cli.program_cache import programs_kept_in
from rwkv_jax.config import (
    GENERATIONS,
    CheckpointConfig,
    ConfigError,
    EvaluationConfig,
    GenerationSpec,
    ModelConfig,
    ParallelConfig,
    ResolvedSizes,
    StepConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from rwkv_jax.config.generations import Shapes, StateArray, size_of
from rwkv_jax.models.block import Block
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.language_model import Axes, LanguageModel
from rwkv_jax.models.layers import (
    Linear,
    Mixer,
    MixOutput,
    TimeMixer,
    broadcast_param,
    channel_param,
    low_rank,
    orthogonal,
    row_parallel_linear,
    token_shift,
)
from rwkv_jax.models.state import TimeMixState
from rwkv_jax.plan.devices import parse_topology
from rwkv_jax.plan.run import plan_run
from rwkv_jax.training import loop
from rwkv_jax.training.reporting.step_logger import StepLogger
from tests.config import test_generations
from tests.inference import models as inference_models
from tests.inference import test_engine
from tests.models import parameters, small_models, test_gradients, test_language_model
from tests.programs import compiled_quickly
from tests.runs import Workplace, kill_one
from tests.small_runs import assert_same_bits, small_config
from tests.train.in_process import run
from tests.weights import files, test_official, test_pretrained

if TYPE_CHECKING:
    from collections.abc import Iterator


# The generation: its spec


class ToySpec(GenerationSpec):
    """What a file of config/generations says."""

    name = "toy"
    model_class = f"{__name__}:Toy"
    own_fields = ("gate_rank",)
    operator = None
    has_heads = False
    tensors = frozenset({"att.average"})
    low_rank = frozenset({"att.g1", "att.g2"})

    def check_run(self, run: TrainConfig) -> None:
        parallel = run.parallel
        if parallel.sequence > 1:
            raise ConfigError(f"parallel.sequence = {parallel.sequence}: a toy's averages are not split over time")

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        return ResolvedSizes(config.ffn_width or 2 * config.width, gate_rank=config.gate_rank or 8)

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        sizes, width = self.sizes(config), config.width
        return 2 * width**2 + 2 * width * (sizes.gate_rank + sizes.ffn_width)

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        return (3 + 1 + 4 + (2 if first else 0)) * config.width  # blends; average; norms

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        return 3 * config.width

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        shift = StateArray((config.width,), (None,), config.dtype)
        return shift, shift, StateArray((config.width,), ("heads",), config.parameter_dtype)

    def prefill_implementation(self, platform: str) -> tuple[str | None, str]:
        return None, "a toy has no operator"

    def read_fields(self, shapes: Shapes) -> dict[str, Any]:
        return {"gate_rank": size_of(shapes, "blocks.0.att.g1", 1)}


# The generation: its model


def moving_average(v: Array, w: Array, h: Array, segment_ids: Array | None, lengths: Array | None) -> Array:
    """h_t = w h_{t-1} + (1 - w) v_t, for v [B, T, C], w [C] and h [B, C] before the first token: [B, T, C].

    It begins anew where the segment changes, and stays as it is beyond a row's length.
    """
    step = jnp.arange(v.shape[1])
    begins = jnp.zeros(v.shape[:2], bool)
    if segment_ids is not None:
        begins = begins.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
    is_read = jnp.ones(v.shape[:2], bool) if lengths is None else step < lengths[:, None]
    keep = jnp.where(is_read[..., None], jnp.where(begins[..., None], 0, w), 1)
    add = jnp.where(is_read[..., None], (1 - w) * v, 0)

    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    kept, added = jax.lax.associative_scan(compose, (keep, add), axis=1)
    return kept * h[:, None] + added


class TimeMix(TimeMixer):
    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, rank, dtype = config.width, config.sizes().gate_rank, config.parameter_dtype
        self.x_v, self.x_g = (channel_param(jnp.arange(width, dtype=dtype) / width) for _ in range(2))
        self.average = nnx.Param(jnp.linspace(-2, 4, width, dtype=dtype) + layer)
        self.value = Linear(orthogonal(rngs.params(), (width, width), 1.0, dtype))
        self.g1 = nnx.Param(jnp.zeros((width, rank), dtype))
        self.g2 = nnx.Param(orthogonal(rngs.params(), (rank, width), 0.1, dtype))
        self.output = Linear(jnp.zeros((width, width), dtype))

    @override
    def mix(self, x: Array, *, state: TimeMixState, context: SequenceContext) -> MixOutput:
        x_prev, shift = token_shift(x, state.shift, context)
        xv, xg = (x + (x_prev - x) * broadcast_param(blend[...], x) for blend in (self.x_v, self.x_g))
        w = jax.nn.sigmoid(self.average[...].astype(self.config.parameter_dtype))
        h = moving_average(self.value(xv).astype(w.dtype), w, state.wkv, context.segment_ids, context.lengths)
        g = low_rank(xg, self.g1[...], self.g2[...], jax.nn.sigmoid)
        y = row_parallel_linear(h.astype(x.dtype) * g, self.output.weight[...], context.axes.tensor)
        return MixOutput(y, TimeMixState(shift, h[:, -1], generation=self.config.generation))


class ChannelMix(Mixer):
    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        del layer
        self.config = config
        width, ffn_width, dtype = config.width, config.sizes().ffn_width, config.parameter_dtype
        self.x_k = channel_param(jnp.arange(width, dtype=dtype) / width)
        self.key = Linear(orthogonal(rngs.params(), (ffn_width, width), 1.0, dtype))
        self.value = Linear(jnp.zeros((width, ffn_width), dtype))

    @override
    def mix(self, x: Array, *, state: Array, context: SequenceContext) -> MixOutput:
        x_prev, shift = token_shift(x, state, context)
        k = jnp.square(jax.nn.relu(self.key(x + (x_prev - x) * broadcast_param(self.x_k[...], x))))
        return MixOutput(row_parallel_linear(k, self.value.weight[...], context.axes.tensor), shift)


class ToyBlock(Block):
    time_mix_type = TimeMix
    channel_mix_type = ChannelMix


BLOCK_AXES: dict[str, Axes] = {
    **{f"att.{name}": (None, None, None) for name in ("x_v", "x_g")},
    "att.average": ("heads",),
    "att.value.weight": ("heads", "embed"),
    "att.g1": ("embed", None),
    "att.g2": (None, "low_rank_heads"),
    "att.output.weight": ("embed", "heads"),
    "ffn.x_k": (None, None, None),
    "ffn.key.weight": ("ffn", "embed"),
    "ffn.value.weight": ("embed", "ffn"),
}


class Toy(LanguageModel):
    block_type = ToyBlock
    block_axes = BLOCK_AXES


# What every generation must do


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> GenerationSpec:
    """Makes it known, and gives the suites its small models."""
    spec = ToySpec()
    monkeypatch.setitem(GENERATIONS, spec.name, spec)
    small = parameters.named_config("toy", vocab_size=41, num_layers=3, width=32, gate_rank=5, dtype="float64")
    monkeypatch.setitem(parameters.SMALL, "toy", dataclasses.replace(small, ffn_width=48))
    monkeypatch.setitem(small_models.FLOAT32, "toy", dataclasses.replace(small, dtype="float32"))
    engine = ModelConfig("toy", vocab_size=inference_models.VOCAB_SIZE, num_layers=2, width=16, gate_rank=4)
    monkeypatch.setitem(inference_models.CONFIGS, "toy", engine)
    stored = ModelConfig("toy", vocab_size=29, num_layers=3, width=32, ffn_width=48, gate_rank=5)
    monkeypatch.setitem(files.CONFIGS, "toy", stored)
    return spec


@pytest.mark.parametrize(
    "suite",
    [
        test_language_model.test_without_a_state_and_from_embeddings,
        test_language_model.test_a_text_may_be_split_anywhere,
        test_language_model.test_rows_of_a_batch_do_not_see_each_other,
        test_language_model.test_texts_packed_in_a_row_are_as_each_alone,
        test_language_model.test_ragged_rows_are_as_each_cut_to_its_length,
        test_language_model.test_packed_and_ragged_at_once,
        test_language_model.test_every_branch_starts_at_zero,
        test_gradients.test_nothing_reaches_where_it_must_not,
        test_engine.test_layers_of_their_own_are_the_same_model,
    ],
    ids=lambda suite: suite.__name__,
)
def test_the_model_is_as_all_are(float64: None, suite: Callable[..., None]) -> None:
    suite(float64, "toy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_its_spec_tells_the_truth(toy: GenerationSpec, dtype: Any) -> None:
    test_generations.test_the_state_is_as_the_spec_says(toy, dtype)
    config = ModelConfig("toy", vocab_size=300, num_layers=4, width=48, dtype=dtype)
    test_language_model.test_the_number_of_parameters(config, None)
    assert from_dict(to_dict(TrainConfig(model=config))).model == config


def test_it_is_converted_out_and_in(tmp_path: Path) -> None:
    config = files.CONFIGS["toy"]
    for dtype in ("float32", "bfloat16"):
        test_official.test_a_config_is_read_from_names_shapes_and_dtype(config, dtype)
        test_official.test_what_goes_in_comes_out_again_bit_for_bit(config, dtype)
        for name in ("again.pth", "again.safetensors", "again"):
            folder = tmp_path / f"{dtype} {name}"
            folder.mkdir()
            test_pretrained.test_official_to_ours_to_official_is_bit_exact(folder, config, dtype, name)


def test_it_writes_through_the_engine() -> None:
    config = inference_models.CONFIGS["toy"]
    engine = inference_models.quick_engine(inference_models.random_model(config))
    for ids in (inference_models.IDS, inference_models.LONG_IDS):
        completion = engine.generate(ids, max_tokens=9, sampling=inference_models.GREEDY, stop_ids=())
        expected = inference_models.whole_logits(config, ids + completion.ids, room=80)
        assert completion.ids == tuple(expected[len(ids) - 1 : -1].argmax(axis=-1).tolist())


def toy_run(folder: Path) -> TrainConfig:
    config = small_config(ModelConfig("toy", vocab_size=300, num_layers=2, width=32), folder)
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, num_steps=6),
        evaluation=EvaluationConfig(every=3, batches=2, sample_prompts=()),
        checkpoint=CheckpointConfig(every=3),
    )


@pytest.fixture
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled quickly, and kept on disk."""
    folder = tmp_path_factory.getbasetemp() / "programs"
    with compiled_quickly(), programs_kept_in(folder):
        yield folder


class CrashError(Exception):
    """As if the process ended."""


@pytest.mark.long  # as every run does, tests/test_resume.py
def test_a_run_that_crashed_goes_on_with_the_same_bits(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_run(tmp_path)
    unbroken = run(config, tmp_path / "unbroken").result.state

    def crash(logger: StepLogger, step: int, *arguments: Any, **options: Any) -> None:
        if step == 4:
            raise CrashError
        real(logger, step, *arguments, **options)

    real = StepLogger.step
    with monkeypatch.context() as patch:
        patch.setattr(loop.StepLogger, "step", crash)
        with pytest.raises(CrashError):
            run(config, tmp_path / "crashed")
    resumed = run(config, tmp_path / "crashed")
    assert "resuming after step 3" in resumed.output
    assert_same_bits(resumed.result.state, unbroken)


def test_it_is_planned() -> None:
    training = StepConfig(batch_size=8, sequence_length=32, remat="full")
    plan = plan_run(TrainConfig(model=ModelConfig("toy", vocab_size=256, width=64), training=training), CPU)
    assert plan.fits
    assert plan.work.model_flops > 0
    with pytest.raises(ConfigError, match=r"^parallel\.sequence = 2: a toy's averages are not split over time"):
        TrainConfig(model=ModelConfig("toy"), parallel=ParallelConfig(sequence=2))


CPU = parse_topology("cpu:1")


def test_the_doctor_tells_of_operators_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [*doctor.describe_operators(), *doctor.describe_engine()]
    monkeypatch.delitem(GENERATIONS, "toy")
    assert told == [*doctor.describe_operators(), *doctor.describe_engine()]


CONFIG = """
from rwkv_jax.config import *
from tests.test_toy_generation import ToySpec

GENERATIONS["toy"] = ToySpec()

def config():
    return TrainConfig(
        model=ModelConfig("toy", vocab_size=300, num_layers=2, width=32),
        data=DataConfig(source={source!r}, cache_dir={cache!r}, held_out=0.2),
        training=StepConfig(num_steps=9, batch_size=4, sequence_length=32),
        evaluation=EvaluationConfig(every=9, batches=2, sample_tokens=8, sample_prompts=("def",)),
        optimizer=OptimizerConfig(warmup_steps=3),
        checkpoint=CheckpointConfig(every=3, keep=2),
        logging=LoggingConfig(every=3),
    )
"""


@pytest.mark.long
def test_a_kill_leaves_no_trace(tmp_path: Path, programs: Path) -> None:
    place = Workplace(tmp_path, programs, CONFIG)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    place.finish(place.command(unbroken), unbroken)
    kill_one([place.start(place.command(killed), killed)], 0, killed, 3, random.Random(0))
    place.finish(place.command(killed), killed)
    place.assert_same_end(unbroken, killed)
