"""The log-probabilities of replies, which losses of preferences are functions of."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array


class ReplyLogP(NamedTuple):
    """Log-probabilities of replies, given their prompts; arrays [B]."""

    total: Array
    """Sum over the reply's tokens of log p(token), nats."""
    tokens: Array
    """Number of tokens in the reply."""
    reference: Array | None = None
    """`total` under the reference model; None for losses without one."""

    @property
    def mean(self) -> Array:
        """Mean log p per token of the reply."""
        return self.total / self.tokens

    @property
    def log_ratio(self) -> Array:
        """log p(reply) - log p_reference(reply), without a gradient to the reference."""
        assert self.reference is not None
        return self.total - self.reference
