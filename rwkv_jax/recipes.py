"""Official training recipes of released models, for the files in configs/.

Official values with their sources, and values chosen here; gradients are clipped at 1, as in every official trainer:

RWKV-4, arXiv 2305.13048, appendix G: learning rates, the mini-epochs before they decay, betas, no weight decay, 1024
tokens a row, one pass over the Pile. Epsilon is the default of the trainer (RWKV-v4neo of BlinkDL/RWKV-LM). Chosen:
256 rows a step throughout; the paper switches between 128 and 256 and does not say when.

RWKV-6, arXiv 2404.05892, appendix H: learning rates and rows a step (for 7B those of Eagle; the paper has no Finch of
that size), 4096 tokens a row, warm-up, betas, weight decay. Epsilon is what the trainer's scripts pass. Later,
against loss spikes, the README of BlinkDL/RWKV-LM advises a final rate of a hundredth, 20 steps of warm-up, weight
decay 0.1 and beta2 0.95.

RWKV-7, the models trained on the Pile: learning rates, weight decay and rows a step are on their page
(huggingface.co/BlinkDL/rwkv-7-pile); warm-up, betas, epsilon and 4096 tokens a row in the script of the smallest
(RWKV-v7/train_temp/demo-training-run-v7-pile.sh). Chosen: corpus and vocabulary of the World models, which were
continued from RWKV-5 and 6 rather than trained from initial values (arXiv 2503.14456, section 6); 352 rows for 1.5B,
not 360, so that 16 devices split them evenly; and for 2.9B and 7.2B, for which nothing is published, the rate that the
trainer's help text has for 24 x 2048, the largest it names, the final rate of 1.5B, and 256 rows.
"""

from __future__ import annotations

import dataclasses
import math

from rwkv_jax.config import (
    GENERATIONS,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    Generation,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    Remat,
    StepConfig,
    TrainConfig,
)


@dataclasses.dataclass(frozen=True)
class ReleasedModel:
    """Shape of a released model, and the training settings that depend on its size."""

    generation: Generation
    num_layers: int
    width: int
    learning_rate: float
    final_learning_rate: float
    batch_size: int
    """Rows per step, over all devices."""
    remat: Remat = "full"
    """The least that fits in the memory of the devices that the recipe is planned for, whichever implementation of the
    operator a run takes there."""
    constant_mini_epochs: int | None = None
    """Mini-epochs, of PILE_MINI_EPOCHS, before the learning rate decays, if the schedule has a constant part."""


RELEASED_MODELS = {
    "rwkv4_169m": ReleasedModel("4", 12, 768, 6e-4, 1e-5, 256, remat="none", constant_mini_epochs=361),
    "rwkv4_430m": ReleasedModel("4", 24, 1024, 4e-4, 1e-5, 256, remat="none", constant_mini_epochs=411),
    "rwkv4_1_5b": ReleasedModel("4", 24, 2048, 3e-4, 1e-5, 256, remat="none", constant_mini_epochs=443),
    "rwkv4_3b": ReleasedModel("4", 32, 2560, 1.5e-4, 1e-5, 256, remat="none", constant_mini_epochs=451),
    "rwkv4_7b": ReleasedModel("4", 32, 4096, 1.5e-4, 1e-5, 256, remat="none", constant_mini_epochs=465),
    "rwkv4_14b": ReleasedModel("4", 40, 5120, 1e-4, 7e-6, 256, remat="none", constant_mini_epochs=544),
    "rwkv6_1_6b": ReleasedModel("6", 24, 2048, 3e-4, 2e-5, 384),
    "rwkv6_3b": ReleasedModel("6", 32, 2560, 2e-4, 1.5e-5, 192),
    "rwkv6_7b": ReleasedModel("6", 32, 4096, 1.5e-4, 1e-5, 576),
    "rwkv7_0_1b": ReleasedModel("7", 12, 768, 8e-4, 3e-5, 240, remat="operator"),
    "rwkv7_0_4b": ReleasedModel("7", 24, 1024, 6e-4, 2e-5, 240),
    "rwkv7_1_5b": ReleasedModel("7", 24, 2048, 5e-4, 1.5e-5, 352),
    "rwkv7_2_9b": ReleasedModel("7", 32, 2560, 3e-4, 1.5e-5, 256),
    "rwkv7_7_2b": ReleasedModel("7", 32, 4096, 3e-4, 1.5e-5, 256),
}
"""Released models by recipe name."""

PILE_MINI_EPOCHS = 8043
"""Mini-epochs, of 40320 rows of 1024 tokens, in one pass over the Pile."""


def official_run(name: str, *, fsdp: int) -> TrainConfig:
    """Config that trains a released model from initial values, with one pass over its corpus.

    The corpus is binidx in the official order; --data.source gives its path.

    Args:
      name: one of RELEASED_MODELS; also names the run's folder.
      fsdp: devices over which the weights are sharded; the remaining ones go to `data`.

    Raises:
      ConfigError: an unknown name.
    """
    if name not in RELEASED_MODELS:
        raise ConfigError(f"name = {name!r}: there is no such recipe; must be one of {', '.join(RELEASED_MODELS)}")
    model = RELEASED_MODELS[name]
    recipe, constant = GENERATIONS[model.generation].recipe, model.constant_mini_epochs
    assert recipe is not None, model
    return TrainConfig(
        run_dir=f"runs/{name}",
        model=ModelConfig(
            generation=model.generation,
            vocab_size=recipe.vocab_size,
            num_layers=model.num_layers,
            width=model.width,
            dtype="bfloat16",
            embedding_bound=model.learning_rate if recipe.has_embedding_bound else None,
            **recipe.sizes.get(model.width, {}),
        ),
        data=DataConfig(
            source=recipe.corpus,
            tokenizer=recipe.tokenizer,
            order="official",
            held_out=0.0,
        ),
        optimizer=dataclasses.replace(
            recipe.optimizer,
            learning_rate=model.learning_rate,
            final_learning_rate=model.final_learning_rate,
            decay_fraction=recipe.optimizer.decay_fraction if constant is None else 1 - constant / PILE_MINI_EPOCHS,
        ),
        training=StepConfig(
            num_steps=math.ceil(recipe.num_tokens / (model.batch_size * recipe.sequence_length)),
            batch_size=model.batch_size,
            sequence_length=recipe.sequence_length,
            reset_at_documents=False,
            remat=model.remat,
            loss_chunk=4096,
            fused_loss=True,
        ),
        parallel=ParallelConfig(fsdp=fsdp),
        evaluation=EvaluationConfig(every=1000, sample_prompts=("The",)),
        checkpoint=CheckpointConfig(every=1000),
        logging=LoggingConfig(every=10),
    )
