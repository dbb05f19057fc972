"""Engine: continuous batching of any number of texts on one device or mesh."""
