"""Spoken words, recognized frame by frame with a state of constant size."""
