"""The teacher of a run: a second model, frozen, among the run's parameters and in none of its checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rwkv_jax.config import ConfigError, ModelConfig, StepConfig, TrainConfig
from rwkv_jax.config.model import IMPLEMENTATIONS
from rwkv_jax.data.tokenizers import Tokenizer, fits_model
from rwkv_jax.models import abstract_model
from rwkv_jax.parallel.sharded_model import ShardedModel, shard_model
from rwkv_jax.run_folder import run_config
from rwkv_jax.training.copying import check_copy, copied_params
from rwkv_jax.training.run_model import TEACHER, RunModel
from rwkv_jax.weights.digest import weights_digest
from rwkv_jax.weights.hugging_face import hub_positions
from rwkv_jax.weights.layout_rules import LLAMA
from rwkv_jax.weights.model_difference import ignored_fields
from rwkv_jax.weights.official import check_tensors, place_params
from rwkv_jax.weights.pretrained import find_tokenizer, open_model
from rwkv_jax.weights.sources import Weights, find_weights, open_weights, prefix_errors
from rwkv_jax.weights.tensors import tensor_spec


class TeacherModel(NamedTuple):
    """How a teacher computes; its parameters are `params[TEACHER]` of a run."""

    config: ModelConfig
    """Its sizes; it computes in the dtype of the run's model."""
    run_model: RunModel
    """Makes its model of `params[TEACHER]`."""
    sharded: ShardedModel
    shapes: Any
    """Nested dict of the shapes of its parameters, in the dtype in which they are stored."""


def read_teacher(config: TrainConfig, mesh: Mesh | None = None) -> TeacherModel | None:
    """The teacher that a run has in memory; reads names and shapes, no numbers.

    Raises:
      ConfigError: it cannot read the run's rows or be split over its mesh, or there is none of that name.
    """
    source = config.distillation.teacher
    if source is None or config.distillation.stored is not None:
        return None
    model, dtype = read_model(source, config.training.sequence_length)
    alike = model.spec is config.model.spec
    chosen = {name: getattr(config.model, name) if alike else None for name in IMPLEMENTATIONS}
    model = dataclasses.replace(model, dtype=config.model.dtype, **chosen)
    check_rows(model, config)
    if config.distillation.copy:
        check_copy(model, config.model, source)
    graphdef, shapes = abstract_model(model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    try:
        sharded = shard_model(model, shapes, mesh)
    except ConfigError as error:
        raise ConfigError(f"distillation.teacher = {source!r}: {error}") from error
    return TeacherModel(model, RunModel(graphdef, config=model), sharded, shapes)


def with_teacher(sharded: ShardedModel, teacher: TeacherModel) -> ShardedModel:
    """A run's sharded model, which knows how its teacher is split too."""
    if sharded.mesh is None:
        return sharded
    return dataclasses.replace(
        sharded,
        param_specs=sharded.param_specs | {TEACHER: teacher.sharded.param_specs},
        carried_specs={"model": sharded.state_specs, TEACHER: teacher.sharded.state_specs},
    )


def read_model(source: str, length: int = 0) -> tuple[ModelConfig, str]:
    """A teacher's config, and the dtype of its parameters: that of all its tensors, or float32.

    Args:
      length: tokens of a row, for which a model of the hub has room if its config.json allows them.
    """
    path = find_weights(source)
    if path.is_dir():
        run = run_config(path)
        if run.tuning.state:
            raise ConfigError(
                f"distillation.teacher = {source!r}: is a run that tunes a state, in which its texts begin, and a "
                "teacher's begin with zeros; name a run without tuning.state"
            )
        return run.model, run.model.parameter_dtype
    weights = open_weights(path)
    with prefix_errors(path):
        model = weights.model_config()
        check_tensors(weights.tensors, model)
    allowed = hub_positions(path.parent) if weights.layout == LLAMA else None
    if allowed is not None and model.context_length is not None:
        # Inference takes less than allowed, as its cache is allocated whole; training has none.
        model = dataclasses.replace(model, context_length=max(model.context_length, min(length, allowed)))
    dtypes = {str(tensor_spec(weights.tensors, name).dtype) for name in weights.tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return model, "float32" if dtype == "float64" and not jax.config.read("jax_enable_x64") else dtype


def check_rows(teacher: ModelConfig, config: TrainConfig) -> None:
    """Refuses a teacher that cannot take a run's rows, as a run that trained it would be.

    Raises:
      ConfigError: with the reason.
    """
    source, training = config.distillation.teacher, config.training
    try:
        rows = StepConfig(
            batch_size=training.batch_size,
            sequence_length=training.sequence_length,
            carry_state=training.carry_state,
            reset_at_documents=training.reset_at_documents,
        )
        TrainConfig(model=teacher, training=rows, parallel=config.parallel)
    except ConfigError as error:
        raise ConfigError(f"distillation.teacher = {source!r}: cannot read the run's rows: {error}") from error
    sizes = (teacher.vocab_size, config.model.vocab_size)
    if sizes[0] != sizes[1] and config.parallel.tensor > 1:
        raise ConfigError(
            f"parallel.tensor = {config.parallel.tensor}: the teacher's vocabulary has {sizes[0]} rows and "
            f"model.vocab_size = {sizes[1]}, so devices would hold other parts of them; make model.vocab_size "
            f"{sizes[0]}, or split over parallel.fsdp"
        )


def check_teacher_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Refuses a teacher whose tokens are not those of the run.

    Raises:
      ConfigError: with both sizes, or since the tokenizer saved with the teacher is another one.
    """
    source = config.distillation.teacher
    if source is None:
        return
    size = read_model(source)[0].vocab_size
    if not fits_model(tokenizer, size):
        raise ConfigError(
            f"distillation.teacher = {source!r}: has a vocabulary of {size}, and the run one of {tokenizer.vocab_size} "
            "(model.vocab_size, data.tokenizer); take the teacher's tokenizer, or another teacher"
        )
    path = find_weights(source)
    beside = find_tokenizer(path, size)
    if beside is not None and beside.fingerprint != tokenizer.fingerprint:
        folder = path if path.is_dir() else path.parent
        raise ConfigError(
            f"distillation.teacher = {source!r}: was trained with the tokenizer that lies beside it, and the run has "
            f"another one; to take it: --data.tokenizer {folder}"
        )


def teacher_digest(config: TrainConfig) -> str | None:
    """The digest of the teacher's numbers, which are all read, and of what else it computes with; None without one."""
    source = config.distillation.teacher
    if source is None:
        return None
    model, _ = read_model(source)
    free = ignored_fields(model) | {"unused_value_residual"}  # whose tensors are not among the digest's
    fields = {name: value for name, value in dataclasses.asdict(model.resolved()).items() if name not in free}
    of_model = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(f"{weights_digest(_open(source).tensors)} {of_model}".encode()).hexdigest()


def begin_with_teacher(config: TrainConfig, drawn: Any, shardings: Any) -> Any:
    """A student's first parameters, of which its teacher has some (`distillation.copy`).

    Args:
      drawn: nested dict of random ones, on the devices; shardings: where each goes.
    """
    assert config.distillation.teacher is not None  # as the config has checked
    return copied_params(_open(config.distillation.teacher).tensors, config.model, drawn, shardings)


def place_teacher(source: str, model: ModelConfig, shapes: Any, shardings: Any) -> Any:
    """The teacher's parameters on the devices, as stored.

    Args:
      model: its config; shapes, shardings: nested dicts.
    """
    weights, dtype = _open(source), str(jax.tree.leaves(shapes)[0].dtype)
    return place_params(weights.tensors, model, dtype=dtype, shardings=shardings, drop_pages=weights.drop_pages)


def described_teacher(config: TrainConfig, teacher: TeacherModel | None) -> list[str]:
    """A line that says which model teaches; none without one."""
    if teacher is None:
        return []
    model = teacher.config
    return [
        f"teacher, frozen: {config.distillation.teacher}, {model.title} {model.num_layers} x {model.width}, "
        f"{model.num_parameters() / 1e6:.1f}M parameters"
    ]


def _open(source: str) -> Weights:
    return open_model(find_weights(source), warn=False)
