"""Preferences: prompts with a reply that is chosen and one that is rejected, or with one that is desirable or not."""
