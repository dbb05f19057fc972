"""Weights in and out: official files, other projects' layouts, our own checkpoints; read without running anything."""
