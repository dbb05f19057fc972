"""Operators in XLA: the loop over chunks, state passing, and backward passes that keep `jax.jvp`."""
