"""What a run minimizes: the next token, preferences, rewards."""

from __future__ import annotations

from typing import Literal

ObjectiveName = Literal["next_token", "dpo", "orpo", "simpo", "kto", "grpo"]
PairLoss = Literal["sigmoid", "robust", "ipo", "hinge", "sigmoid_norm"]
RatioLevel = Literal["token", "sequence"]
RewardScale = Literal["group", "batch", "none"]
TokenMean = Literal["dapo", "bnpo", "grpo", "dr_grpo"]
