"""From text to batches: sources, tokenizers, the prepared corpus on disk, and batches as a function of the step."""
