"""What training minimizes, one file an objective; the form they have is `training.step.Objective`."""
