"""The WKV operators of RWKV in JAX: one call for each generation, whatever the platform.

Shape letters: B batch, T time, H heads, N head size of keys, M head size of values. The package imports jax only.
"""

from rwkv_kernels.wkv7 import wkv7, wkv7_step

__all__ = ["wkv7", "wkv7_step"]
