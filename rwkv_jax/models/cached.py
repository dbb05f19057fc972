"""Models whose state grows with the text, up to a limit: what remains of it is asked, and checked."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ConfigError
from rwkv_jax.models.language_model import LanguageModel
from rwkv_kernels.arguments import is_concrete


class CachedModel(LanguageModel):
    """Base of models with a cache, whose `position` counts the tokens of each row, in some or all layers.

    A state has room for `config.sizes().context_length` tokens of each row. Calls outside jit raise if there are more;
    within jit, tokens that do not fit are visible only in their own call, so compiled loops must count, or use
    `max_tokens` or `check_room`.
    """

    def room(self, state: Any) -> Array | None:
        """int32 [B]: tokens of each row for which a state still has room; negative if it overflowed.

        None if no layer has a cache, and so no limit.
        """
        parts = jax.tree.leaves(state, is_leaf=_is_cache)
        position = next((part.position for part in parts if _is_cache(part)), None)
        if position is None:
            return None
        return self.config.sizes().context_length - (position[0] if self.is_stacked else position)

    @override
    def _run(self, tokens: Array | None, state: Any, *arguments: Any, **options: Any) -> tuple[Array, Any, Any]:
        """As in `LanguageModel`, but raises, if values are concrete, for tokens that the state has no room for."""
        x, next_state, streams = super()._run(tokens, state, *arguments, **options)
        self.check_room(next_state)
        return x, next_state, streams

    def check_room(self, state: Any) -> None:
        """Raises ConfigError if values are concrete and the state had no room for some tokens."""
        room = self.room(state)
        if room is not None and is_concrete(room) and (least := int(room.min())) < 0:
            raise ConfigError(
                f"model.context_length = {self.config.sizes().context_length}: the state has no room for {-least} of "
                f"the tokens of row {int(room.argmin())}; make it larger, or read fewer"
            )


def _is_cache(x: Any) -> bool:
    """Whether a part of a state is the cache of attention."""
    return hasattr(x, "position")
