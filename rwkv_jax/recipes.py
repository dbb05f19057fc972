"""The official training recipes of released models, for the files of configs/.

Source: the official trainers, BlinkDL/RWKV-LM. Their help text has 6e-4 for 12 x 768, 4e-4 for 24 x 1024 and 3e-4 for
24 x 2048; none is published there for larger models, which get that of the largest that is. Adam's betas are 0.9 and
0.99, gradients are clipped at 1. RWKV-4 was trained by plain Adam down to 1e-5; RWKV-7's run on the Pile decays its
large matrices by 0.1, falls to 3e-5 and has 240 rows of 4096 tokens a step, and RWKV-6 is given the same here.
"""

from __future__ import annotations

import math

from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    Generation,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)

LEARNING_RATES = {768: 6e-4, 1024: 4e-4, 2048: 3e-4}
"""By width."""

RANKS = {1024: (64, 64, 32, 128), 2048: (96, 96, 64, 256), 2560: (96, 96, 64, 320), 4096: (128, 128, 96, 480)}
"""Of RWKV-7's low-rank maps for decay, in-context learning rate, value and gate, by width, as released. The present
trainer's functions of the width give others, but for 768."""

TOKENS = {"4": 332_115_325_534, "6": 1_120_000_000_000, "7": 3_100_000_000_000}
"""Of the corpora: the Pile; RWKV World v2 (arXiv 2404.05892); RWKV World v3 (arXiv 2503.14456)."""


def official_run(
    name: str,
    generation: Generation,
    num_layers: int,
    width: int,
    *,
    batch_size: int = 256,
    sequence_length: int = 4096,
    fsdp: int,
) -> TrainConfig:
    """The run that trains a model of a released size from its initial values, once through its corpus.

    The corpus is binidx in the official order, its path for --data.source to give.

    Args:
      name: of the run's folder.
      batch_size: rows of a step, over all devices; 256 rather than the official 240 where the devices are a power of 2.
      fsdp: devices over which the weights are scattered; those that remain go to `data`.
    """
    is_pile = generation == "4"
    names = ("decay_rank", "iclr_rank", "value_rank", "gate_rank")
    ranks = dict(zip(names, RANKS[width], strict=True)) if generation == "7" and width in RANKS else {}
    adam = OptimizerConfig(
        learning_rate=LEARNING_RATES.get(width, min(LEARNING_RATES.values())),
        final_learning_rate=1e-5 if is_pile else 3e-5,
        schedule="cosine",
        warmup_steps=10,
        beta1=0.9,
        beta2=0.99,
        epsilon=1e-8 if is_pile else 1e-18,
        weight_decay=0.0 if is_pile else 0.1,
        clip_norm=1.0,
    )
    return TrainConfig(
        run_dir=f"runs/{name}",
        model=ModelConfig(
            generation=generation,
            vocab_size=50277 if is_pile else 65536,
            num_layers=num_layers,
            width=width,
            dtype="bfloat16",
            **ranks,
        ),
        data=DataConfig(
            source="data/pile_20B_tokenizer_text_document" if is_pile else "data/world_text_document",
            tokenizer="20B_tokenizer.json" if is_pile else "world",
            order="official",
            held_out=0.0,
        ),
        optimizer=adam,
        training=TrainingConfig(
            num_steps=math.ceil(TOKENS[generation] / (batch_size * sequence_length)),
            batch_size=batch_size,
            sequence_length=sequence_length,
            reset_at_documents=False,
            remat="full",
            loss_chunk=4096,
        ),
        parallel=ParallelConfig(fsdp=fsdp),
        evaluation=EvaluationConfig(every=1000, sample_prompts=("The",)),
        checkpoint=CheckpointConfig(every=1000),
        logging=LoggingConfig(every=10),
    )
