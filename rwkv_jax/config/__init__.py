"""Every setting of a run, as frozen dataclasses that reject contradictory values on construction.

Standard library only, so that config files can be read without loading JAX.
Shape letters, here and in the whole project: B batch, T time, C width, H heads, N head size, F feed-forward
width, D low rank, V vocabulary, L layers.

    run.py           TrainConfig, a whole run, and checks across its sections
    application.py   runs whose model, data and objective are an application's
    model.py         model: architecture, generation, sizes, number of parameters, operations per token
    generations/     what is specific to each generation: fields, sizes, counts, state, tensor names, recipe
    data.py          data: sources, their order, the tokenizer
    step.py          optimizer, training: learning rates, batch and sequence sizes
    tuning.py        tuning: adapters, and what else of a base is trained
    objective.py     preference, grpo: what is minimized besides the next token
    distillation.py  distillation: a teacher
    parallel.py      parallel, distributed: devices and processes
    reporting.py     evaluation, checkpoint, logging
    dicts.py         to JSON and back
"""

from rwkv_jax.checks import ConfigError
from rwkv_jax.config.application import APPLICATIONS, ApplicationConfig
from rwkv_jax.config.data import DataConfig
from rwkv_jax.config.dicts import from_dict, to_dict
from rwkv_jax.config.distillation import DistillationConfig
from rwkv_jax.config.generations import GENERATIONS, Architecture, Generation, GenerationSpec, ResolvedSizes
from rwkv_jax.config.model import ModelConfig, student_of
from rwkv_jax.config.objective import (
    CROSS_ENTROPY,
    OF_TEXT,
    PREFERENCES,
    WITH_REFERENCE,
    WITH_TEACHER,
    GRPOConfig,
    ObjectiveName,
    PreferenceConfig,
)
from rwkv_jax.config.parallel import DistributedConfig, ParallelConfig
from rwkv_jax.config.reporting import CheckpointConfig, EvaluationConfig, LoggingConfig
from rwkv_jax.config.run import TrainConfig
from rwkv_jax.config.step import OptimizerConfig, Remat, StepConfig
from rwkv_jax.config.tuning import AdapterKind, TuningConfig

__all__ = [
    "APPLICATIONS",
    "CROSS_ENTROPY",
    "GENERATIONS",
    "OF_TEXT",
    "PREFERENCES",
    "WITH_REFERENCE",
    "WITH_TEACHER",
    "AdapterKind",
    "ApplicationConfig",
    "Architecture",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DistillationConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "GRPOConfig",
    "Generation",
    "GenerationSpec",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveName",
    "OptimizerConfig",
    "ParallelConfig",
    "PreferenceConfig",
    "Remat",
    "ResolvedSizes",
    "StepConfig",
    "TrainConfig",
    "TuningConfig",
    "from_dict",
    "student_of",
    "to_dict",
]
