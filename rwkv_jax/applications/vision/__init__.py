"""Images by their patches: classification, and patches that were taken out to be filled in."""
