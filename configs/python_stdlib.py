"""A small RWKV-7 on the source text of Python's standard library: the corpus that every machine has.

python train.py configs/python_stdlib.py
"""

from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)


def config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/python_stdlib",
        model=ModelConfig(vocab_size=2048, num_layers=4, width=192, head_dim=64),
        data=DataConfig(source="python-stdlib"),
        optimizer=OptimizerConfig(learning_rate=4e-3, final_learning_rate=2e-4, weight_decay=0.1, warmup_steps=20),
        training=TrainingConfig(num_steps=800, batch_size=4, sequence_length=512),
        evaluation=EvaluationConfig(every=100, batches=8),
        checkpoint=CheckpointConfig(every=100, keep=2),
        logging=LoggingConfig(every=10),
    )
