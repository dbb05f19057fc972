"""What a model carries from one token to the next: the same three fields in every generation.

`wkv` is float32 (float64 in a float64 model) whatever the compute dtype. RWKV-5, 6 and 7 keep a matrix a head there,
[B, H, N, N] with the value axis before the key axis; RWKV-4 keeps (numerator, denominator, max_exponent), each [B, C].
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array


class TimeMixState(NamedTuple):
    """What time mixing carries from one token to the next."""

    shift: Array
    """[B, C], the last input."""
    wkv: Any
    """The recurrence's state."""


class State(NamedTuple):
    """What a block carries from one token to the next; a model's state has a leading axis L on each array."""

    att_shift: Array
    """[B, C], the last input of time mixing."""
    ffn_shift: Array
    """[B, C], the last input of channel mixing."""
    wkv: Any
    """The recurrence's state."""
