"""How a run trains: its optimizer and its steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from rwkv_jax.checks import checker, require_choices, require_positive
from rwkv_jax.config.objective import ObjectiveName

Remat = Literal["none", "operator", "full"]
"""Activations that a block's backward pass recomputes."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam with RWKV's parameter groups: weight decay on the large matrices only, `w0` at twice the rate."""

    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up. RWKV-LM: lr_init."""
    final_learning_rate: float = 1e-4
    """Learning rate at the end of the schedule. RWKV-LM: lr_final."""
    schedule: Literal["cosine", "linear", "wsd", "exponential", "constant"] = "cosine"
    """Decay of the rate: cosine, linear, wsd (warm-up, stable, linear decay), exponential (like wsd, but by a constant
    factor per step), constant."""
    schedule_origin: Literal["last_step", "official"] = "last_step"
    """Where the decay ends: last_step gives the last step the final rate; official is RWKV-LM's formula, whose cosine
    would end one step after the last, and whose other schedules begin to decay one step earlier."""
    schedule_steps: tuple[int, ...] = ()
    """Steps of the schedule; none takes training.num_steps. One number keeps the schedule when a run is extended, with
    a constant rate after its end; several are cycles, each with a warm-up (warm restarts)."""
    warmup_steps: int = 10
    """Steps over which the rate rises linearly to its highest value. RWKV-LM: warmup_steps."""
    warmup_start: float = 0.01
    """Share of the highest rate at which the warm-up begins: 0.01 in RWKV-LM since RWKV-5, 0.2 in v4neo."""
    decay_fraction: float = 0.2
    """Share of the steps, the last ones, in which a wsd or exponential schedule decays. RWKV-LM: my_pile_edecay."""
    beta1: float = 0.9
    """Adam's decay of the gradient mean. RWKV-LM: beta1."""
    beta2: float = 0.99
    """Adam's decay of the squared gradient mean. RWKV-LM: beta2."""
    epsilon: float = 1e-18
    """Adam's epsilon; the official 1e-18 needs float32 moments, which is what we keep. RWKV-LM: adam_eps."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices (embedding, head, projections). RWKV-LM: weight_decay."""
    weight_decay_final: float | None = None
    """Weight decay at the end of the schedule, approached by a constant factor per step; None keeps it constant.
    RWKV-LM: weight_decay_final."""
    clip_norm: float = 1.0
    """Global norm above which gradients are scaled down; 0 disables clipping. RWKV-LM: grad_clip."""
    clip_epsilon: float = 0.0
    """Added to the norm when gradients are scaled; the official trainer's clipping has 1e-6. RWKV-LM: grad_clip."""
    stage: Literal[1, 2] = 1
    """2 is RWKV-LM's my_pile_stage 2: token-shift blends, decay and bonus learn five times as fast as the rest.
    RWKV-LM: my_pile_stage."""
    rates: tuple[tuple[str, float], ...] = ()
    """Factors on the learning rate by patterns of official names, such as att.* 0.1 blocks.0.* 0; the last one that
    matches a name counts. Zero freezes: no weight decay, and no optimizer state where all layers are frozen."""

    def __post_init__(self) -> None:
        require_choices(self, "optimizer")
        check = checker(self, "optimizer")
        require_positive(self, "optimizer", "learning_rate", "epsilon")
        check(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        check(self.final_learning_rate >= 0, "final_learning_rate", "must be >= 0")
        check(
            self.final_learning_rate <= self.learning_rate,
            "final_learning_rate",
            f"must not exceed optimizer.learning_rate = {self.learning_rate}",
        )
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, name, "must lie in [0, 1)")
        check(0 < self.decay_fraction <= 1, "decay_fraction", "must lie in (0, 1]")
        check(self.weight_decay >= 0, "weight_decay", "must not be negative")
        check(0 < self.warmup_start <= 1, "warmup_start", "must lie in (0, 1]")
        check(self.clip_epsilon >= 0, "clip_epsilon", "must not be negative")
        check(
            all(length > self.warmup_steps for length in self.schedule_steps),
            "schedule_steps",
            f"each must be greater than optimizer.warmup_steps = {self.warmup_steps}",
        )
        check(
            self.weight_decay_final is None or 0 < self.weight_decay_final <= self.weight_decay,
            "weight_decay_final",
            f"must be greater than zero and not exceed optimizer.weight_decay = {self.weight_decay}",
        )
        check(self.clip_norm >= 0, "clip_norm", "must not be negative")
        check(
            all(pattern and 0 <= factor < math.inf for pattern, factor in self.rates),
            "rates",
            "must be patterns of names, each with a factor that is not negative",
        )
        check(
            self.schedule != "exponential" or self.final_learning_rate > 0,
            "final_learning_rate",
            "must be greater than zero, which an exponential decay never reaches; or set optimizer.schedule to wsd",
        )


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Steps: their number, batch, sequence and memory settings."""

    objective: ObjectiveName = "next_token"
    """What is minimized: next_token; distill, the divergence from a teacher, or align, the distance of mixers from its
    attention (settings in `distillation`); a loss of preferences: dpo (arXiv 2305.18290), orpo (2403.07691), simpo
    (2405.14734) or kto (2402.01306), whose settings are in `preference`; or of rewards: grpo (2402.03300), whose
    settings are in `grpo`."""
    num_steps: int = 1000
    """Optimizer steps in the whole run. RWKV-LM: epoch_count, my_exit_tokens."""
    first_step: int = 0
    """The step at which the run begins, in schedule and data order, for initial_weights from another trainer's run
    (RWKV-LM's rwkv-N.pth: N + 1 times its epoch_steps). RWKV-LM: epoch_begin."""
    batch_size: int = 8
    """B: sequences, or pairs, in one optimizer step, over all micro-batches. RWKV-LM: micro_bsz."""
    sequence_length: int = 512
    """T: tokens in one sequence. RWKV-LM: ctx_len."""
    accumulation_steps: int = 1
    """Micro-batches into which a step's batch is split; divides batch_size. RWKV-LM: accumulate_grad_batches."""
    reset_at_documents: bool = True
    """Start each document of a row with the empty state, so that it does not see the text before it. The official
    trainer does not."""
    carry_state: bool = False
    """Truncated backpropagation: each row continues where the previous step stopped, with its recurrent state, so that
    documents longer than sequence_length are read whole."""
    remat: Remat = "none"
    """What the backward pass recomputes instead of storing: none (of the matrix products), operator (all but the WKV
    operator's inputs), full (all but each block's input). RWKV-LM: grad_cp."""
    loss_chunk: int | None = None
    """Tokens whose logits are in memory at a time; None computes all [B * T, V] at once. RWKV-LM: head_chunk."""
    fused_loss: bool = False
    """Compute the gradients of the head and its input in the loss's forward pass, from the same logits: three products
    with the head instead of four, in bfloat16 all with bfloat16 operands and float32 sums."""
    l2wrap: float = 1e-4
    """Strength of L2Wrap, the official penalty on each token's largest logit; 0 disables it. Of next_token only."""
    max_bad_steps: int = 10
    """Consecutive skipped steps, with a loss or gradient that is not finite, after which the run stops."""
    spike_factor: float | None = None
    """Skip steps whose loss or gradient norm exceeds this multiple of its median over the last spike_window steps
    taken; None never does. They count as bad steps."""
    spike_window: int = 64
    """Steps of the median that spike_factor multiplies; none is skipped before there are as many."""
    ema_decay: float | None = None
    """Share that an average of the trained weights keeps at each step, such as 0.999, smaller in the first ones; the
    average is saved with the run (evaluation.ema). None keeps none."""
    tune: Literal["auto", "always", "never"] = "auto"
    """Whether a new run with model.wkv_implementation = None takes the fastest one by measurement, of `rwkv tune` or at
    its start: auto does on a GPU or TPU. The choice is in run.json, and kept when the run is resumed."""

    def __post_init__(self) -> None:
        require_choices(self, "training")
        check = checker(self, "training")
        require_positive(
            self,
            "training",
            "num_steps",
            "batch_size",
            "sequence_length",
            "accumulation_steps",
            "max_bad_steps",
            "spike_window",
        )
        check(
            self.batch_size % self.accumulation_steps == 0,
            "batch_size",
            f"must be a multiple of training.accumulation_steps = {self.accumulation_steps}",
        )
        check(self.loss_chunk is None or self.loss_chunk > 0, "loss_chunk", "must be positive")
        check(isinstance(self.fused_loss, bool), "fused_loss", "must be True or False")
        check(self.l2wrap >= 0, "l2wrap", "must not be negative")
        check(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", "must lie between 0 and 1")
        check(self.spike_factor is None or self.spike_factor > 1, "spike_factor", "must be greater than 1")
