"""Every knob of a run, as frozen dataclasses that refuse contradictory values when they are built.

Standard library only, so that a config file, a test or a planner can be read without loading JAX.
Shape letters, here and in the whole project: B batch, T time, C width, H heads, N head size, F feed-forward
width, D low rank, V vocabulary, L layers.

    run.py           TrainConfig, a whole run, and what its sections ask of each other
    model.py         model: generation, sizes, number of parameters, operations a token
    data.py          data: sources, their order, the tokenizer
    training.py      optimizer, training: learning rates, the shape of a step
    parallel.py      parallel, distributed: devices and processes
    outputs.py       evaluation, checkpoint, logging
    generations.py   which generations there are, and which sizes are whose
    dicts.py         to JSON and back
"""

from rwkv_jax.checks import ConfigError
from rwkv_jax.config.data import DataConfig
from rwkv_jax.config.dicts import from_dict, to_dict
from rwkv_jax.config.generations import Generation, ResolvedSizes, architecture_name
from rwkv_jax.config.model import ModelConfig
from rwkv_jax.config.parallel import DistributedConfig, ParallelConfig
from rwkv_jax.config.reporting import CheckpointConfig, EvaluationConfig, LoggingConfig
from rwkv_jax.config.run import TrainConfig
from rwkv_jax.config.step import OptimizerConfig, Remat, StepConfig

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "Generation",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Remat",
    "ResolvedSizes",
    "StepConfig",
    "TrainConfig",
    "architecture_name",
    "from_dict",
    "to_dict",
]
