"""The generations of RWKV as Flax NNX modules."""

from rwkv_jax.models.rwkv7 import RWKV7

__all__ = ["RWKV7"]
