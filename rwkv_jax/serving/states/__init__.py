"""States that a server keeps for its clients: stores, their records, and turns of conversations."""
