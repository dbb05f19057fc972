"""What runs a trained model: sampling and generation with a state of constant size."""
