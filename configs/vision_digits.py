"""Written digits, classified by RWKV-7 from both ends.

    rwkv train configs/vision_digits.py

Seen on 2 CPU cores that much other work shared: 2 minutes; 96.7% of the held-out digits. One seed; no
other rate or size was tried.
"""

from rwkv_jax.applications.vision.config import Vision, VisionConfig
from rwkv_jax.config import CheckpointConfig, EvaluationConfig, LoggingConfig, ModelConfig, OptimizerConfig, StepConfig


def config() -> VisionConfig:
    """RWKV-7 of 0.3M parameters on 16 patches of 2 x 2 pixels."""
    return VisionConfig(
        run_dir="runs/vision_digits",
        model=ModelConfig(vocab_size=16, num_layers=3, width=64, head_dim=16),
        vision=Vision(),
        optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-5, warmup_steps=30),
        training=StepConfig(batch_size=64, sequence_length=16, num_steps=500),
        evaluation=EvaluationConfig(every=250, sample_prompts=()),
        checkpoint=CheckpointConfig(every=500, keep=1),
        logging=LoggingConfig(every=50),
    )
