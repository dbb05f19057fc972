"""Token files, and the rows that steps read from them."""
