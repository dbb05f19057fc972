"""What a run minimizes: the next token, what a teacher predicts, preferences, rewards."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rwkv_jax.checks import checker, is_number, require, require_choices

ObjectiveName = Literal["next_token", "distill", "align", "dpo", "orpo", "simpo", "kto", "grpo"]
OF_TEXT: tuple[ObjectiveName, ...] = ("next_token", "distill", "align")
"""Objectives that read rows of text, of whatever data."""
CROSS_ENTROPY: tuple[ObjectiveName, ...] = ("next_token", "distill")
"""Objectives whose logged loss is the cross-entropy of the text's next tokens."""
WITH_TEACHER: tuple[ObjectiveName, ...] = ("distill", "align")
"""Objectives that learn from a teacher."""
PREFERENCES: tuple[ObjectiveName, ...] = ("dpo", "orpo", "simpo", "kto")
"""Objectives that read preferences."""
WITH_REFERENCE: tuple[ObjectiveName, ...] = ("dpo", "kto")
"""Preferences that compare the model with a frozen one."""

PairLoss = Literal["sigmoid", "robust", "ipo", "hinge", "sigmoid_norm"]
RatioLevel = Literal["token", "sequence"]
RewardScale = Literal["group", "batch", "none"]
TokenMean = Literal["dapo", "bnpo", "grpo", "dr_grpo"]

_BETA = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}
_OF_OBJECTIVES = {
    "loss": ("dpo",),
    "label_smoothing": ("dpo", "simpo"),
    "gamma": ("simpo",),
    "chosen_weight": ("dpo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": WITH_REFERENCE,
}
"""Objectives that read a field; beta is read by all."""


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Preferences, read if training.objective is dpo, orpo, simpo or kto; data.source then names JSON records."""

    beta: float | None = None
    """How much preferences weigh: against the reference model (dpo, kto), the likelihood of the chosen reply (orpo), or
    as the factor of mean log-probabilities (simpo). None is 0.1, and 2 for simpo."""
    loss: PairLoss = "sigmoid"
    """Form of dpo: sigmoid, robust, ipo, hinge, or sigmoid_norm, which is sigmoid of means over tokens."""
    label_smoothing: float = 0.0
    """Share of the labels taken to be wrong, in dpo (sigmoid, sigmoid_norm: conservative DPO; robust) and simpo."""
    gamma: float = 1.0
    """The margin between rewards that simpo asks for."""
    chosen_weight: float = 0.0
    """Adds this multiple of the chosen reply's mean -log p per token to dpo or simpo; orpo has it anyway."""
    desirable_weight: float = 1.0
    """Weight of kto's desirable replies."""
    undesirable_weight: float = 1.0
    """Weight of kto's undesirable replies."""
    reference: Literal["stored", "adapter_off"] = "stored"
    """The reference model's log-probabilities, for dpo and kto: stored computes those of initial_weights once, before
    the first step; adapter_off computes them in each step with tuning.adapter switched off."""

    def beta_of(self, objective: ObjectiveName) -> float:
        """`beta` of an objective."""
        return _BETA[objective] if self.beta is None else self.beta

    def __post_init__(self) -> None:
        require_choices(self, "preference")
        check = checker(self, "preference")
        check(self.beta is None or (is_number(self.beta) and self.beta > 0), "beta", "must be greater than zero")
        check(0 <= self.label_smoothing < 0.5, "label_smoothing", "must lie in [0, 0.5)")
        check(
            not self.label_smoothing or self.loss not in ("ipo", "hinge"),
            "label_smoothing",
            f"preference.loss = {self.loss!r} has none; leave it out, or take sigmoid or robust",
        )
        for name in ("gamma", "chosen_weight", "desirable_weight", "undesirable_weight"):
            check(0 <= getattr(self, name) < float("inf"), name, "must not be negative")

    def check_objective(self, objective: ObjectiveName) -> None:
        """Raises ConfigError for a field that the objective does not read and that was set."""
        for field in dataclasses.fields(self):
            readers = _OF_OBJECTIVES.get(field.name, PREFERENCES)
            require(
                objective in readers or getattr(self, field.name) == field.default,
                f"preference.{field.name}",
                getattr(self, field.name),
                f"training.objective = {objective!r} does not read it; leave it out, or train {' or '.join(readers)}",
            )


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Rewards of replies that the model draws itself, read if training.objective is grpo; data.source names prompts."""

    rewards: tuple[tuple[str, float], ...] = ()
    """Functions of (record, reply) that give a number, and their weights, as FILE.py:NAME 1.0 or MODULE:NAME 0.5."""
    num_generations: int = 8
    """G: replies to each prompt; divides training.batch_size."""
    max_tokens: int = 256
    """Most tokens of a reply; prompts may have the rest of training.sequence_length."""
    iterations: int = 1
    """Steps taken with the replies of one draw; a run saves and stops after the last of them only."""
    clip_low: float = 0.2
    """How far below 1 a ratio of probabilities counts."""
    clip_high: float | None = None
    """How far above 1 it counts; None is clip_low, DAPO takes 0.28."""
    max_ratio: float | None = None
    """Bound of ratios where the clipped one is not the smaller; None is none."""
    ratio: RatioLevel = "token"
    """Ratios of tokens, or of sequences (GSPO, arXiv 2507.18071)."""
    mean: TokenMean = "dapo"
    """Means over all tokens (dapo, and bnpo, which is the same here), over each reply and then replies (grpo), or sums
    divided by max_tokens (dr_grpo)."""
    scale: RewardScale = "group"
    """Whether advantages are divided by the standard deviation of their group's rewards, of the batch's, or not."""
    kl_weight: float = 0.0
    """Weight of the KL divergence from the model with which training begins; 0 does without that model."""
    mask_truncated: bool = False
    """Whether replies that max_tokens cut off do not count."""

    def __post_init__(self) -> None:
        require_choices(self, "grpo")
        check = checker(self, "grpo")
        for name in ("num_generations", "max_tokens", "iterations"):
            check(getattr(self, name) >= 1, name, "must be greater than zero")
        check(self.num_generations > 1, "num_generations", "a reply is rewarded relative to others; draw at least two")
        check(0 < self.clip_low < 1, "clip_low", "must lie in (0, 1)")
        check(self.clip_high is None or self.clip_high > 0, "clip_high", "must be greater than zero")
        check(self.max_ratio is None or self.max_ratio > 1, "max_ratio", "must be greater than one")
        check(self.kl_weight >= 0, "kl_weight", "must not be negative")
        for name, weight in self.rewards:
            require(":" in name, "grpo.rewards", name, "must be FILE.py:NAME or MODULE:NAME")
            require(abs(weight) < float("inf") and weight != 0, f"grpo.rewards, weight of {name!r}", weight, "not zero")
        names = [name.rpartition(":")[2] for name, _ in self.rewards]
        check(len(set(names)) == len(names), "rewards", "functions are told apart by their names; rename one of two")

    def check_objective(self, objective: ObjectiveName) -> None:
        """Raises ConfigError for a field that was set although the objective does not read it."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            remedy = f"training.objective = {objective!r} does not read it; leave it out, or train grpo"
            require(objective == "grpo" or value == field.default, f"grpo.{field.name}", value, remedy)
