"""Digits spoken by espeak-ng with noise, recognized while they are heard.

FILL
"""

from rwkv_jax.applications.audio.config import Audio, AudioConfig
from rwkv_jax.config import CheckpointConfig, EvaluationConfig, LoggingConfig, ModelConfig, OptimizerConfig, StepConfig


def config() -> AudioConfig:
    """RWKV-7 of 0.4M parameters, one to four digits in up to 3.2 seconds."""
    return AudioConfig(
        run_dir="runs/audio_digits",
        model=ModelConfig(vocab_size=16, num_layers=3, width=96, head_dim=32),
        audio=Audio(),
        optimizer=OptimizerConfig(learning_rate=4e-3, final_learning_rate=1e-4, warmup_steps=30),
        training=StepConfig(batch_size=16, sequence_length=160, num_steps=600),
        evaluation=EvaluationConfig(every=150, batches=4, sample_prompts=()),
        checkpoint=CheckpointConfig(every=300, keep=1),
        logging=LoggingConfig(every=20),
    )
