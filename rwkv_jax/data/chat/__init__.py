"""Chats and instructions as training data: records, samples with a mask, rows."""
