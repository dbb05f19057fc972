"""The state in which the model of python_stdlib.py begins, tuned on the source text of NumPy.

    rwkv train configs/python_stdlib.py
    rwkv train configs/python_stdlib_state.py
    rwkv generate runs/python_stdlib --state runs/python_stdlib_state --prompt "def "

Seen on 2 CPU cores (an AMD with AVX2) under the load of a dozen other jobs: 13 minutes for the 200 steps with their
evaluations. On 8 batches of files of NumPy that were not trained on, 3.963 nats a token without a state (2.242 bits a
byte), 3.942 after 50 steps, and 3.922 (2.218 bits a byte) after 200.

The rate is far above what released models bear: docs/tuning.md has other rates for this one, which was trained briefly.
"""

import dataclasses
import importlib.util
from pathlib import Path

from rwkv_jax.cli import load_config
from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    TrainConfig,
    TuningConfig,
)


def config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("python_stdlib.py"))
    numpy = importlib.util.find_spec("numpy")
    assert numpy is not None
    assert numpy.submodule_search_locations is not None
    return dataclasses.replace(
        base,
        run_dir="runs/python_stdlib_state",
        initial_weights=base.run_dir,
        tuning=TuningConfig(state=True, state_rate=1.0),
        data=DataConfig(source=numpy.submodule_search_locations[0], glob="**/*.py", tokenizer=base.run_dir),
        optimizer=OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=5),
        training=dataclasses.replace(base.training, num_steps=200, sequence_length=256),
        evaluation=EvaluationConfig(every=50, batches=8),
        checkpoint=CheckpointConfig(every=100, keep=1),
    )
