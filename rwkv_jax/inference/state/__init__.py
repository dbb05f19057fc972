"""States of texts between calls: snapshots, sessions, files, caches."""
