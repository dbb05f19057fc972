"""Operators as Pallas kernels: a driver that knows no device, and one module per backend."""
