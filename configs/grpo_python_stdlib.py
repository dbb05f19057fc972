"""Rewards for the run of `configs/python_stdlib.py`: bodies of functions that parse, and that use the arguments.

    rwkv train configs/python_stdlib.py        (or `make train`)
    python -m examples.docstrings.pairs        (the first lines of functions of Python's own standard library)
    rwkv train configs/grpo_python_stdlib.py

Seen on 2 CPU cores (an AMD EPYC) that other work shared: 9 minutes; 452,291 tokens drawn. The held-out reward goes from
0.353 after 30 steps to 1.382 after 150, of at most 2: the first replies drawn parse in 3.9% of the cases, the last
in 94.6%, and they read 43% of the arguments for 1%. It is what was rewarded and no more: a reply is now one statement
such as `return self._list`, then comments up to its last token, and no docstring (0% of 400 functions, the base 90.5%).

Why these values: nothing was searched. Replies are short, so that those that end by themselves are learned first.
"""

from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GRPOConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)

BASE = "runs/python_stdlib"


def config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/grpo_python_stdlib",
        initial_weights=BASE,
        model=ModelConfig(vocab_size=2048, num_layers=4, width=192, head_dim=64),
        data=DataConfig(source="runs/docstrings/undocumented.jsonl", held_out=0.05, tokenizer=BASE),
        optimizer=OptimizerConfig(learning_rate=4e-4, final_learning_rate=4e-5, weight_decay=0.0, warmup_steps=5),
        training=StepConfig(objective="grpo", num_steps=150, batch_size=64, sequence_length=96),
        grpo=GRPOConfig(
            rewards=(("examples/docstrings/rewards.py:parses", 1.0), ("examples/docstrings/rewards.py:uses", 1.0)),
            num_generations=8,
            max_tokens=48,
        ),
        evaluation=EvaluationConfig(every=30, sample_prompts=("def read_table(path, sep=','):\n",), sample_tokens=48),
        checkpoint=CheckpointConfig(every=75, keep=1),
        logging=LoggingConfig(every=10),
    )
