"""What tests and benchmarks of all operators share; it needs numpy only."""
