"""Chat formats and conversations."""
