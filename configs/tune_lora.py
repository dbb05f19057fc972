"""LoRA on the run of `configs/python_stdlib.py`: a model of Python code learns the prose of this project's documents.

    rwkv train configs/tune_lora.py        (after `make train`, from the repository's folder)

Seen on 2 CPU cores that had other work (an AMD EPYC): 6 minutes, 2 minutes of processor time; all held-out text from
4.841 to 4.128 nats a token, 2.971 to 2.533 bits a byte, where gzip -9 needs 3.465. The documents grow with the
project, so figures will differ.

Why these values: rank 16 on all linear maps is a twelfth of the model's numbers. The learning rate is the base's
highest; it was not searched. The tokenizer is the base's, for which prose takes more tokens than one of its own would.
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
    TuningConfig,
)

BASE = "runs/python_stdlib"


def config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/tune_lora",
        initial_weights=BASE,
        model=ModelConfig(vocab_size=2048, num_layers=4, width=192, head_dim=64),
        data=DataConfig(source="docs", glob="*.md", held_out=0.1, tokenizer=BASE),
        tuning=TuningConfig(adapter="lora", rank=16),
        optimizer=OptimizerConfig(learning_rate=4e-3, final_learning_rate=4e-4, warmup_steps=10),
        training=StepConfig(num_steps=150, batch_size=4, sequence_length=512),
        evaluation=EvaluationConfig(every=50, batches=8, sample_prompts=("The state of a model",)),
        checkpoint=CheckpointConfig(every=50, keep=2),
        logging=LoggingConfig(every=10),
    )
