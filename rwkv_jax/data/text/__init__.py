"""Text sources: files, folders, JSON records and tables."""
