"""Sampling of tokens: parameters, and the choice inside jit."""
