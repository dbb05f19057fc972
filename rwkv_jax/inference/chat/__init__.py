"""Conversations by turns, and which template a model takes."""
