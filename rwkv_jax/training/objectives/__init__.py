"""Training objectives, one file each; the interface is `training.step.Objective`."""
