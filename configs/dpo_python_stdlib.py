"""Preferences for the run of `configs/python_stdlib.py`: functions with a docstring rather than without.

    rwkv train configs/python_stdlib.py        (or `make train`)
    python -m examples.docstrings.pairs        (a thousand pairs, from Python's own standard library)
    rwkv train configs/dpo_python_stdlib.py
    python -m examples.docstrings.share runs/python_stdlib runs/dpo_python_stdlib

Seen on 2 CPU cores that a dozen other jobs shared (an AMD EPYC): 15 minutes, 2 minutes of processor time. Of 57
held-out pairs the chosen reply has the higher reward in all (accuracy 1), with a margin of 1.42 after 30 steps and 2.55
after 60; the loss falls from 0.693 to 0.0905. Functions that the library leaves without a docstring begin with one in
90.5% of 400 replies of the base, and in 98.8% afterwards (30 of the 400 first lines begin another function, too, which
has one). What the docstrings say is as poor as the base's other text.

Why these values: nothing was searched. The chosen and the rejected reply differ in their first line alone, so few steps
are enough.
"""

from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)

BASE = "runs/python_stdlib"


def config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/dpo_python_stdlib",
        initial_weights=BASE,
        model=ModelConfig(vocab_size=2048, num_layers=4, width=192, head_dim=64),
        data=DataConfig(source="runs/docstrings/pairs.jsonl", held_out=0.05, tokenizer=BASE),
        optimizer=OptimizerConfig(learning_rate=2e-4, final_learning_rate=2e-5, weight_decay=0.0, warmup_steps=5),
        training=StepConfig(objective="dpo", num_steps=60, batch_size=8, sequence_length=128),
        evaluation=EvaluationConfig(every=30, sample_prompts=("def read_table(path, sep=','):\n",), sample_tokens=48),
        checkpoint=CheckpointConfig(every=60, keep=1),
        logging=LoggingConfig(every=5),
    )
