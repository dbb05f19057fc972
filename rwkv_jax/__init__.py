"""RWKV in JAX: models, training and inference."""
