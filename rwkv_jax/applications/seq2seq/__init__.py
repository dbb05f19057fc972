"""Encoder-decoder: what an encoder has read is the state that a decoder begins from, or what it attends to."""
