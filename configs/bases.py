"""Sequences that are no text: two million bases, of whose next one 1.387 bits are not to be known.

    python -m examples.bases.make
    rwkv train configs/bases.py

Seen on 2 CPU cores that much other work shared: 11 minutes, 3.3 of them this process's. After 1000 steps 1.402 bits a
base of the 40,000 held-out ones, where gzip -9 has 2.121 and xz -9 2.011. (Of a row of 256 the first six lack what they
depend on.) The base before alone would leave 1.829, and after 150 steps it was 1.79.
"""

from rwkv_jax.config import DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig, StepConfig, TrainConfig


def config() -> TrainConfig:
    """RWKV-7 of 0.1M parameters on two million numbers from 0 to 3."""
    return TrainConfig(
        run_dir="runs/bases/run",
        model=ModelConfig(vocab_size=8, num_layers=2, width=64, head_dim=32),
        data=DataConfig(source="runs/bases/bases.npy", held_out=0.02),
        optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=50),
        training=StepConfig(batch_size=16, sequence_length=256, num_steps=1000),
        evaluation=EvaluationConfig(every=250, sample_tokens=32),
    )
