"""The official reference run: RWKV-7 12 x 768 on MiniPile, 1.5 billion tokens, whose losses are published.

    rwkv train configs/minipile.py --data.source PATH/minipile
    python benchmarks/minipile_curve.py runs/minipile
    rwkv plan configs/minipile.py --topology h100:1x1

PATH/minipile.bin and .idx are the official token files (minipile-tokenized, rwkv_vocab_v20230424). The official trainer
logs the mean loss of each mini-epoch of 40320 rows, and a run that is right stays within 0.01 of it:
minipile_curve.py holds this one against its first twelve. It was not run yet.

`rwkv plan` said: h100:1x1, one device: fits; arguments 2.14 GiB, peak 4.47 GiB of 79.14 GiB a device; at best
520,468 tokens/s, MFU 45%.

Source of every value: RWKV-v7/train_temp/demo-training-run.sh of BlinkDL/RWKV-LM.
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


def config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/minipile",
        model=ModelConfig(generation="7", vocab_size=65536, num_layers=12, width=768, dtype="bfloat16"),
        data=DataConfig(source="data/minipile", tokenizer="world", order="official", magic_prime=2926181, held_out=0.0),
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            final_learning_rate=6e-5,
            schedule="cosine",
            warmup_steps=10,
            beta1=0.9,
            beta2=0.99,
            epsilon=1e-18,
            weight_decay=0.001,
            clip_norm=1.0,
            clip_epsilon=1e-6,
            schedule_origin="official",
        ),
        # 1,498,226,207 tokens, after which the learning rate is at its end.
        training=StepConfig(
            num_steps=182_890, batch_size=16, sequence_length=512, reset_at_documents=False, remat="full"
        ),
        evaluation=EvaluationConfig(every=2520, sample_prompts=("The",)),
        checkpoint=CheckpointConfig(every=2520),
        logging=LoggingConfig(every=10),
    )
