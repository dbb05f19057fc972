"""Console output, metrics, plots and profiles of a run."""
