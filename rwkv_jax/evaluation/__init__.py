"""How good a model is: held-out loss, and what compressors make of the same bytes."""
