"""Measurements behind `rwkv bench`."""
